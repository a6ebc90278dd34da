"""The latents in flight: does what each Step says, through the executor, and hands out the chunks that became clean."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pyengine.bundle.bundle import Latent
from pyengine.methods import Progressive, Replacement
from pyengine.plans.plan import Variant
from pyengine.runtime.executor import Executor
from pyengine.schedule.positions import PositionPolicy, positions
from pyengine.schedule.progressive import Step
from pyengine.schedule.samplers import Coefficients, Sampler, cfg, frame_noise

__all__ = ["Window"]

FRESH_NOISE_STREAM = 1 << 40  # calls numbered from here draw the noise of re-noised rows, never a sampler's


class Window:
    """The window of one stream. All latents are float32 [frames, channels, height, width], where the executor keeps them."""

    def __init__(
        self,
        executor: Executor,
        latent: Latent,
        method: Progressive | Replacement,
        sampler: Sampler,
        *,
        guidance: float,
        seed: int,
        policy: PositionPolicy = "local",
        sink_frames: int = 0,
    ) -> None:
        self._executor, self._method, self._sampler, self._seed = executor, method, sampler, seed
        self._policy, self._sink_frames = policy, sink_frames
        self._weights = cfg(guidance)
        self._frame_shape = (latent.channels, latent.height, latent.width)
        self._latents = executor.latents(self._frame_shape, max(method.row_counts))
        # Clean latents by frame, so that a new prompt can rewrite the ring; given ones are kept until they entered.
        self._clean: dict[int, Any] = {}
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
            self._clean[frame] = self._latents.own(latent)

    def set_text(self, features: Mapping[str, np.ndarray]) -> None:
        """What the denoiser reads of the prompt, in place for every variant."""
        for variant in self.variants:
            for name, value in features.items():
                self._executor.input(variant, name)[...] = value

    def advance(self) -> list[tuple[int, Any]]:
        """One call of the network. Returns the chunks that became clean: (chunk, latents)."""
        step = self._method.step_at(self.call)
        self._gather(step)
        scales = self._scales(step)
        if scales.needs_noise:
            for row, frame in enumerate(step.frame_index):
                if frame >= 0:
                    self._latents.draw_noise(row, self._noise(frame, max(step.call, 0)))
        self._feed(step)
        variant = self._variants[step.frames]
        self._latents.call(variant, self._weights, scales, scales.needs_noise)
        emitted = [(chunk, self._latents.take(step.rows(chunk))) for chunk in step.emit]
        self._remember(step, emitted)
        self.call += 1
        return emitted

    def recache(self) -> None:
        """Rewrites keys and values of every clean frame in the ring under the text that is set now."""
        for step in self._method.recache_steps(self.call):
            self._latents.begin(step.frames)
            for row in range(step.frames):
                if row in step.given:
                    self._latents.put(row, self._clean[step.frame_index[row]])
                else:
                    self._latents.clear(row)
            self._feed(step)
            self._latents.call(self._variants[step.frames], None, None, False)

    def state(self) -> dict[str, np.ndarray]:
        """All that later calls depend on, beside the executor's state."""
        frames = sorted(self._clean)
        clean = (
            np.stack([self._latents.host(self._clean[frame]) for frame in frames])
            if frames
            else np.zeros((0, *self._frame_shape), np.float32)
        )
        return {
            "call": np.array(self.call),
            "latents": self._latents.state(),
            "clean_index": np.array(frames, np.int64),
            "clean": clean,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Puts back what `state()` returned."""
        self._latents.load_state(state["latents"])
        self.call = int(state["call"])
        self._clean = {
            int(frame): self._latents.own(latent)
            for frame, latent in zip(state["clean_index"], state["clean"], strict=True)
        }

    def _gather(self, step: Step) -> None:
        """The rows of this call, moved up from the last one, born, or given."""
        latents = self._latents
        latents.begin(step.frames)
        born, given, warmed = set(step.born), set(step.given), set(step.warmed)
        stays: list[int] = []
        for row, frame in enumerate(step.frame_index):
            if row in born:
                latents.draw(row, self._noise(frame))
            elif row in given:
                latents.put(row, self._clean[frame])
            elif row in warmed:
                level = np.float32(step.level[row])
                fresh = frame_noise(self._seed, frame, self._frame_shape)
                latents.put(row, latents.own((1 - level) * latents.host(self._clean[frame]) + level * fresh))
            elif frame < 0:
                latents.clear(row)
            else:
                stays.append(row)
        for row, source, count in _runs(stays, step.source):
            latents.move(row, source, count)

    def _noise(self, frame: int, call: int | None = None) -> Callable[[np.ndarray], object]:
        """What fills a latent with the noise of a frame."""
        return lambda out: frame_noise(self._seed, frame, self._frame_shape, call, out)

    def _feed(self, step: Step) -> None:
        """Writes everything that the denoiser reads."""
        variant = self._variants[step.frames]
        call = FRESH_NOISE_STREAM + step.call
        self._latents.feed(
            variant,
            [(row, step.level[row], self._noise(step.frame_index[row], call)) for row in step.renoised],
        )
        inputs = self._executor.inputs(variant)
        inputs["level"][...] = step.level
        frame_index, ring_index = positions(
            self._policy, step.frame_index, step.ring_index, self._sink_frames
        )
        inputs["frame_index"][...] = frame_index
        if "ring_index" in inputs:  # a network whose context is recomputed has no ring
            inputs["ring_index"][...] = ring_index
            inputs["append_slot"][...] = step.append_slot

    def _scales(self, step: Step) -> Coefficients:
        """The sampler's coefficients; a steady schedule repeats after a few calls, so they are kept."""
        levels = (step.level, step.level_next)
        if levels not in self._coefficients:
            if len(self._coefficients) > 256:
                self._coefficients.clear()
            self._coefficients[levels] = self._sampler(*levels)
        return self._coefficients[levels]

    def _remember(self, step: Step, emitted: list[tuple[int, Any]]) -> None:
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


def _runs(rows: Sequence[int], source: Sequence[int]) -> list[tuple[int, int, int]]:
    """(row, source of the row, rows) of neighbours that come from neighbours. One copy for many: numpy lets go of the
    interpreter in each, and a thread that decodes may be slow to give it back.
    """
    runs: list[tuple[int, int, int]] = []
    for row in rows:
        if runs:
            first, start, count = runs[-1]
            if (first + count, start + count) == (row, source[row]):
                runs[-1] = (first, start, count + 1)
                continue
        runs.append((row, source[row], 1))
    return runs
