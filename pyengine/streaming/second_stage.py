"""The networks of a second stage, which streams of an engine share: what they read of a prompt, and frames as its latents."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from pyengine.build.library import VariantLibrary
from pyengine.build.progress import Progress
from pyengine.build.variants import PROJECTOR, TEXT, enhanced_variants
from pyengine.bundle.bundle import Bundle
from pyengine.bundle.variant import Variant
from pyengine.methods.enhancement import Enhancement
from pyengine.options import EngineOptions
from pyengine.plans.plan import Plan
from pyengine.runtime.codec import encode_chunk
from pyengine.runtime.program import Program
from pyengine.runtime.prompt_encoder import PromptEncoder
from pyengine.video.letterbox import letterboxed

if TYPE_CHECKING:
    from pyengine.runtime.executor import Executor

__all__ = ["SecondStage"]

Features = Mapping[str, np.ndarray]


class SecondStage:
    """Networks of a bundle's second stage, loaded when a stream first wants them. Threads may share it.

    bundle  as `bundle.second.second_stage` makes it
    words   makes a text encoder's inputs of a prompt
    text    what the first stage's text encoder gives; where this one has none of its own, that is read
    """

    def __init__(
        self,
        bundle: Bundle,
        options: EngineOptions,
        words: Callable[[str], Features] | None,
        text: Callable[[str], Features],
        progress: Progress | None = None,
    ) -> None:
        self.bundle = bundle
        self._library = VariantLibrary(bundle, options, progress=progress, relieve=self._relieve)
        self._chain: list[PromptEncoder] = []
        self._text = text
        if TEXT.component in bundle.components and words is not None:
            self._text = self._encoder(TEXT, words)
        if PROJECTOR.component in bundle.components:
            self._text = self._encoder(PROJECTOR, self._text)

    def features(self, prompt: str) -> dict[str, np.ndarray]:
        """What its denoiser reads of a prompt, for every guidance branch. Raises PromptError."""
        return dict(self._text(prompt))

    def program(self, schedule: Enhancement) -> Program:
        """What a stream runs, with the encoder of its frames; built the first time."""
        return self.prepare(enhanced_variants(self.bundle, schedule))

    def prepare(self, variants: tuple[Variant, ...]) -> Program:
        """These variants, loaded; what is missing is built first."""
        return self._library.program(variants)

    def latents(self, executor: Executor, frames: np.ndarray) -> np.ndarray:
        """Frames of the stage before, uint8 [frames, h, w, 3], scaled up and encoded one by one. [frames, channels, height, width]"""
        video = self.bundle.video
        assert video is not None
        large = (letterboxed(frame[None], video.height, video.width) for frame in frames)
        return np.concatenate([encode_chunk(executor, self.bundle, frame, 1) for frame in large])

    @property
    def plans(self) -> list[Plan]:
        """As of `Engine`."""
        return self._library.plans

    @property
    def nbytes(self) -> int:
        """As of `Engine`."""
        return self._library.nbytes

    def close(self) -> None:
        """Lets go of every network."""
        for encoder in self._chain:
            encoder.close()
        self._library.close()

    def _encoder(self, variant: Variant, inputs: Callable[[str], Features]) -> Callable[[str], Features]:
        component = self.bundle.component(variant.component)
        made = PromptEncoder(
            variant,
            component.outputs,
            lambda prompt: {
                name: value for name, value in inputs(prompt).items() if name in component.inputs
            },
            lambda: self._library.program((variant,)),
            lambda: self._library.has_room(),
        )
        self._chain.append(made)
        return made.features

    def _relieve(self) -> None:
        for encoder in self._chain:
            encoder.release()
