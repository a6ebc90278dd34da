"""What a stream begins with: given frames, checked and brought to what its method reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from pyengine.arguments import as_array
from pyengine.bundle.bundle import Bundle
from pyengine.bundle.variant import Variant
from pyengine.errors import ShapeError
from pyengine.methods import MethodSettings
from pyengine.runtime.codec import encode_chunk, encoder_variants
from pyengine.runtime.program import Program

__all__ = ["start_of"]


def start_of(
    start: np.ndarray,
    bundle: Bundle,
    settings: MethodSettings,
    program: Callable[[tuple[Variant, ...]], Program],
) -> np.ndarray | Mapping[str, np.ndarray]:
    """The last whole chunks of a start, uint8 [frames, height, width, 3], as many as the context holds, as latents [frames, channels,
    height, width]; or, of methods that begin with pixels, what their calls read. Raises ShapeError.
    """
    video = bundle.video
    assert video is not None
    if not settings.start_chunks:
        raise ShapeError("[start] expected no start frames: this model makes videos from noise alone")
    start = as_array("start", start)
    if (
        start.ndim != 4
        or start.shape[1:] != (video.height, video.width, 3)
        or start.dtype != np.uint8
        or not len(start)
    ):
        raise ShapeError(
            f"[start] expected uint8 [frames, {video.height}, {video.width}, 3] but got {start.dtype} {list(start.shape)}"
        )
    size = video.frames(settings.chunk_frames)
    if len(start) < size:
        start = np.concatenate([np.repeat(start[:1], size - len(start), 0), start])
    if settings.reads_pixels:
        return settings.pixels_of(start)
    chunks = min(len(start) // size, settings.start_chunks)
    start = start[len(start) - chunks * size :]
    executor = program(encoder_variants(bundle, settings.chunk_frames)).executor()
    try:
        parts = (start[index * size : (index + 1) * size] for index in range(chunks))
        return np.concatenate([encode_chunk(executor, bundle, part, settings.chunk_frames) for part in parts])
    finally:
        executor.close()
