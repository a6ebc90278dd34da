"""The latents in flight: does what each Step says, through the executor, and hands out the chunks that became clean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pyengine import _C
from pyengine.bundle import Latent
from pyengine.errors import ShapeError
from pyengine.executor import Executor
from pyengine.methods import Progressive, Replacement
from pyengine.plan import Variant
from pyengine.positions import positions
from pyengine.samplers import Coefficients, Sampler, cfg, frame_noise
from pyengine.schedule import Step

__all__ = ["Window"]

FRESH_NOISE_STREAM = 1 << 40  # calls numbered from here draw the noise of re-noised rows, never a sampler's


class Window:
    """The window of one stream. All latents are float32 [frames, channels, height, width]."""

    def __init__(
        self,
        executor: Executor,
        latent: Latent,
        method: Progressive | Replacement,
        sampler: Sampler,
        *,
        guidance: float,
        seed: int,
    ) -> None:
        self._executor, self._method, self._sampler, self._seed = executor, method, sampler, seed
        self._weights = cfg(guidance)
        self._frame_shape = (latent.channels, latent.height, latent.width)
        rows = max(method.row_counts)
        # Two buffers take turns: a call reads rows of one by `source` and leaves its result in the other.
        self._now, self._next = (np.zeros((rows, *self._frame_shape), np.float32) for _ in range(2))
        self._noise = np.zeros((rows, *self._frame_shape), np.float32)
        # Clean latents by ring slot, so that a new prompt can rewrite the ring; given ones are kept until they entered.
        self._clean: dict[int, np.ndarray] = {}
        self._variants = {
            count: Variant.of("denoiser", frames=count, ring=method.ring_frames)
            for count in method.row_counts
        }
        self._coefficients: dict[tuple[tuple[float, ...], tuple[float, ...]], Coefficients] = {}
        self.call = method.first_call

    @property
    def variants(self) -> tuple[Variant, ...]:
        """The variants of the denoiser that the window runs."""
        return tuple(self._variants.values())

    def give(self, latents: np.ndarray) -> None:
        """Clean latents of the given chunks, the frames 0.. of the stream."""
        for frame, latent in enumerate(latents):
            self._clean[frame] = latent.copy()

    def set_text(self, features: Mapping[str, np.ndarray]) -> None:
        """What the denoiser reads of the prompt, in place for every variant."""
        for variant in self.variants:
            for name, value in features.items():
                self._executor.input(variant, name)[...] = value

    def advance(self) -> list[tuple[int, np.ndarray]]:
        """One call of the network. Returns the chunks that became clean: (chunk, latents)."""
        step = self._method.step_at(self.call)
        count = step.frames
        sample = self._gather(step)
        self._run(step, sample)
        coefficients = self._scales(step)
        noise = None
        if coefficients.needs_noise:
            noise = self._noise[:count]
            for row, frame in enumerate(step.frame_index):
                if frame >= 0:
                    frame_noise(self._seed, frame, self._frame_shape, max(step.call, 0), noise[row])
        velocity = self._executor.output(self._variants[count], "velocity")
        updated = self._now[:count]
        _C.denoise_step(sample, velocity, self._weights, *coefficients, noise=noise, out=updated)
        emitted = [(chunk, updated[step.rows(chunk)].copy()) for chunk in step.emit]
        self._remember(step, emitted)
        self.call += 1
        return emitted

    def recache(self) -> None:
        """Rewrites keys and values of every clean frame in the ring under the text that is set now."""
        for step in self._method.recache_steps(self.call):
            sample = self._next[: step.frames]
            sample[...] = 0
            for row in step.given:
                sample[row] = self._clean[step.frame_index[row]]
            self._run(step, sample)

    def state(self) -> dict[str, np.ndarray]:
        """All that later calls depend on, beside the executor's state."""
        frames = sorted(self._clean)
        clean = (
            np.stack([self._clean[frame] for frame in frames])
            if frames
            else np.zeros((0, *self._frame_shape), np.float32)
        )
        return {
            "call": np.array(self.call),
            "latents": self._now.copy(),
            "clean_index": np.array(frames, np.int64),
            "clean": clean,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Puts back what `state()` returned."""
        if state["latents"].shape != self._now.shape:
            raise ShapeError(
                f"expected a window of {list(self._now.shape)} but the snapshot has {list(state['latents'].shape)}"
            )
        self.call = int(state["call"])
        self._now[...] = state["latents"]
        self._clean = {
            int(frame): latent.copy()
            for frame, latent in zip(state["clean_index"], state["clean"], strict=True)
        }

    def _gather(self, step: Step) -> np.ndarray:
        """The rows of this call, moved up from the last one, born, or given. [rows, channels, height, width]"""
        sample = self._next[: step.frames]
        born, given = set(step.born), set(step.given)
        for row, frame in enumerate(step.frame_index):
            if row in born:
                frame_noise(self._seed, frame, self._frame_shape, out=sample[row])
            elif row in given:
                sample[row] = self._clean[frame]
            elif frame < 0:
                sample[row] = 0
            else:
                sample[row] = self._now[step.source[row]]
        return sample

    def _run(self, step: Step, sample: np.ndarray) -> None:
        variant = self._variants[step.frames]
        inputs = self._executor.inputs(variant)
        latents = inputs["latents"]
        latents[...] = sample
        for row in step.renoised:
            level = np.float32(step.level[row])
            fresh = frame_noise(
                self._seed, step.frame_index[row], self._frame_shape, FRESH_NOISE_STREAM + step.call
            )
            latents[row] = (1 - level) * sample[row] + level * fresh
        inputs["level"][...] = step.level
        inputs["frame_index"][...], inputs["ring_index"][...] = positions(
            "local", step.frame_index, step.ring_index
        )
        inputs["append_slot"][...] = step.append_slot
        self._executor.run(variant)

    def _scales(self, step: Step) -> Coefficients:
        """The sampler's coefficients; a steady schedule repeats after a few calls, so they are kept."""
        levels = (step.level, step.level_next)
        if levels not in self._coefficients:
            if len(self._coefficients) > 256:
                self._coefficients.clear()
            self._coefficients[levels] = self._sampler(*levels)
        return self._coefficients[levels]

    def _remember(self, step: Step, emitted: list[tuple[int, np.ndarray]]) -> None:
        """Keep the clean latents of the frames the ring can hold, forget the rest."""
        size = self._method.chunk_frames
        for chunk, latents in emitted:
            for place, latent in enumerate(latents):
                self._clean[chunk * size + place] = latent
        newest = max((*step.frame_index, 0))
        if len(self._clean) > self._method.ring_frames + 2 * max(self._method.row_counts):
            visible = {frame for frame in step.ring_index if frame >= 0}
            for frame in [
                f for f in self._clean if f not in visible and f < newest - 2 * max(self._method.row_counts)
            ]:
                del self._clean[frame]
