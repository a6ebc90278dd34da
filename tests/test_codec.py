"""Decoding where one network works over time and another frame by frame."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pyengine.bundle.bundle import Video
from pyengine.bundle.variant import Variant
from pyengine.runtime.codec import FRAME_DECODER, decode_chunk

DECODER = Variant.of("decoder", chunk=2)
BUNDLE: Any = SimpleNamespace(video=Video(8, 8, 24.0, 4, 1), components={"frame_decoder": None})


class Networks:
    """Four planes of each latent, numbered, and frames that show the number of their plane. Planes are decoded three at a time."""

    def __init__(self) -> None:
        self.arrays = {
            (DECODER, "latents"): np.zeros((2, 1, 1, 1), np.float32),
            (DECODER, "planes"): np.zeros((8, 1, 1, 1), np.float32),
            (FRAME_DECODER, "planes"): np.zeros((3, 1, 1, 1), np.float32),
            (FRAME_DECODER, "frames"): np.zeros((3, 8, 8, 3), np.uint8),
        }

    def input(self, variant: Variant, name: str) -> np.ndarray:
        return self.arrays[variant, name]

    output = input

    def run(self, variant: Variant) -> None:
        if variant == DECODER:
            latents = self.arrays[DECODER, "latents"]
            self.arrays[DECODER, "planes"][...] = np.repeat(latents, 4, 0) + np.arange(8).reshape(8, 1, 1, 1)
        else:
            self.arrays[FRAME_DECODER, "frames"][...] = self.arrays[FRAME_DECODER, "planes"]


@pytest.mark.parametrize("lead", [0, 3])
def test_frames_before_the_first_one_of_a_video_are_left_out(lead: int) -> None:
    executor: Any = Networks()
    latents = np.float32([10, 20]).reshape(2, 1, 1, 1)
    frames = decode_chunk(executor, BUNDLE, latents, lead=lead)
    assert frames[:, 0, 0, 0].tolist() == [10, 11, 12, 13, 24, 25, 26, 27][lead:]
    assert BUNDLE.video.lead(0) == 3
