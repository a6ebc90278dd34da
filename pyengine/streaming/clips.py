"""The clips in flight of two-level generation: does what each ClipStep says and hands out windows of latents to decode.

What is constant is made once: the embedding of every timestep, projected for every ResBlock, with and without the perturbation level;
keys and values of a text (by the text encoder). Features of clean frames are not kept, since GroupNorm over time makes
them depend on the noisy ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pyengine.bundle.bundle import Latent
from pyengine.errors import PromptError, ShapeError
from pyengine.methods.hierarchical import Hierarchical
from pyengine.plans.plan import Variant
from pyengine.runtime.executor import Executor
from pyengine.runtime.host.clip_latents import Batch, Call, Draw
from pyengine.schedule.hierarchy import ClipStep
from pyengine.schedule.samplers import alphas_cumprod, ddim, frame_noise

__all__ = ["Clips"]

INTERPOLATION_STREAM = (
    1 << 40
)  # numbers of interpolation windows for the noise start here, those of prediction clips at 0
CONDITION_CALL = 1 << 20  # the draw that perturbs the conditioning latents; steps draw as calls 0, 1, ...


class Clips:
    """Latents of one stream. What one looks like, only its ClipLatents know."""

    def __init__(
        self, executor: Executor, latent: Latent, method: Hierarchical, *, guidance: float, seed: int
    ) -> None:
        self._executor, self._method, self._seed = executor, method, seed
        self._config = method.config
        self._weights = np.array(method.guidance_weights(guidance), np.float32)
        self._batches = {
            (network, clips): self._batch(network, clips, variant)
            for (network, clips), variant in method.denoiser_variants(len(self._weights)).items()
        }
        self._alpha_bar = alphas_cumprod(*method.betas, self._config.timesteps)
        self._sampler = ddim(self._alpha_bar, method.eta, method.predicts)
        tables = {name: self._table(variant) for name, variant in method.embedding_variants().items()}
        self.call = 0
        self._place = (latent.channels, latent.height, latent.width)
        batches = tuple(self._batches.values())
        self._latents = executor.clip_latents(self._place, batches, tables, len(self._weights))
        # Keys of which intervals are still to be made, or that the next prediction reads; the first is key number `_first_key`.
        self._keys: list[Any] = []
        self._first_key = 0
        self._tail: list[Any] = []  # dense latents that the next decoder window sees again

    @property
    def variants(self) -> tuple[Variant, ...]:
        """The denoiser variants that it runs."""
        return tuple(batch.variant for batch in self._batches.values())

    def give(self, latents: np.ndarray) -> None:
        raise ShapeError("[start] expected no start frames: this model makes videos from noise alone")

    def set_text(self, features: Mapping[str, np.ndarray]) -> None:
        """Keys and values of the text, [branches, ...] each, in place."""
        for variant in self.variants:
            for name, value in features.items():
                self._executor.input(variant, name)[...] = np.ascontiguousarray(value[: len(self._weights)])

    def recache(self) -> None:
        if self.call:
            raise PromptError("the prompt of a clip cannot change on the way; start another stream")

    def advance(self) -> list[tuple[int, Any]]:
        """One call of one network. Returns decoder windows that are complete: (round, latents [n, channels, height, width])."""
        step = self._config.step_at(self.call)
        if step.network == "interpolation" and not self._wanted(step):
            self.call += 1
            return []
        known = self._known(step)
        if step.index == 0:
            self._begin(step, known)
        self._denoise(step, known)
        self.call += 1
        return self._finish(step) if step.is_last else []

    def state(self) -> dict[str, np.ndarray]:
        """All that later calls depend on, beside the executor's state."""
        return {
            "call": np.array(self.call),
            "keys": self._on_host(self._keys),
            "first_key": np.array(self._first_key),
            "tail": self._on_host(self._tail),
            **self._latents.state(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Puts back what `state()` returned."""
        if state["keys"].shape[1:] != self._place:
            raise ShapeError(
                f"expected latents {list(self._place)} but the snapshot has {list(state['keys'].shape[1:])}"
            )
        self.call, self._first_key = int(state["call"]), int(state["first_key"])
        self._keys = [self._latents.own(latent) for latent in state["keys"]]
        self._tail = [self._latents.own(latent) for latent in state["tail"]]
        step = self._config.step_at(self.call)
        self._latents.load_state(self._batch_of(step) if step.index else None, state)

    def _on_host(self, latents: Sequence[Any]) -> np.ndarray:
        copies = [self._latents.host(latent) for latent in latents]
        return np.stack(copies) if copies else np.zeros((0, *self._place), np.float32)

    def _batch(self, network: str, clips: int, variant: Variant) -> Batch:
        config = self._config
        if network == "prediction":
            return Batch(variant, clips, config.clip_frames, config.known, ends=False)
        return Batch(variant, clips, config.stride + 1, 2, ends=True)

    def _batch_of(self, step: ClipStep) -> Batch:
        return self._batches[step.network, len(self._numbers(step))]

    def _wanted(self, step: ClipStep) -> range:
        """Intervals of the batch that are to be shown. A windowed decoder sees the whole round, also past the end of the video,
        so that a short video is the head of a longer one; otherwise making stops at the end.
        """
        config = self._config
        if config.made_intervals is None or (config.decode == "windowed" and config.behaviour == "intended"):
            return step.intervals
        return range(step.intervals.start, min(step.intervals.stop, config.made_intervals))

    def _numbers(self, step: ClipStep) -> list[int]:
        """The clips of a batch, as the noise knows them."""
        if step.network == "prediction":
            return [step.clip]
        return [INTERPOLATION_STREAM + interval for interval in step.intervals]

    def _draws(self, step: ClipStep, frames: int, call: int | None = None) -> tuple[Draw, ...]:
        """What fills each clip of the batch with noise."""
        channels, height, width = self._place
        shape = (channels, frames, height, width)

        def draw(number: int) -> Draw:
            return lambda out: frame_noise(self._seed, number, shape, call, out)

        return tuple(draw(number) for number in self._numbers(step))

    def _known(self, step: ClipStep) -> int:
        """Frames of the step's clips that are known."""
        return 0 if step.clip == 0 else self._batch_of(step).known

    def _begin(self, step: ClipStep, count: int) -> None:
        """Fresh noise for every clip of the batch, and its conditioning latents, perturbed once."""
        batch = self._batch_of(step)
        if batch.ends:
            firsts = [interval - self._first_key for interval in step.intervals]
            known = [self._keys[first : first + 2] for first in firsts]
        else:
            known = [self._keys[len(self._keys) - count :]]
        self._latents.begin(batch, known, self._draws(step, batch.frames))
        level = self._method.perturbation
        if level is not None and count:
            a = float(self._alpha_bar[level])
            self._latents.perturb(a**0.5, (1 - a) ** 0.5, self._draws(step, count, CONDITION_CALL))

    def _denoise(self, step: ClipStep, known: int) -> None:
        batch, branches = self._batch_of(step), len(self._weights)
        mask = np.zeros((branches, batch.clips, batch.frames), np.float32)
        if known and self._config.behaviour == "released" and not batch.ends:
            mask[0] = 1  # the published loop forgets how many frames are known
        elif known:
            mask[0][:, batch.places] = 1
        labelled = known > 0 and self._method.perturbation is not None
        scale = self._config.timesteps
        now = np.full(batch.clips, (step.timestep + 1) / scale)
        then = np.full(batch.clips, (step.timestep_next + 1) / scale)
        scales = self._sampler(now, then)
        self._latents.call(
            Call(
                mask,
                tuple((0 if labelled and branch == 0 else -1, step.index) for branch in range(branches)),
                self._weights,
                scales,
                self._draws(step, batch.frames, step.index) if scales.needs_noise else (),
            )
        )

    def _finish(self, step: ClipStep) -> list[tuple[int, Any]]:
        batch, made = self._batch_of(step), self._latents.made
        if step.network == "prediction":
            fresh = [made(0, frame) for frame in range(self._known(step), batch.frames)]
            if not self._config.interpolates:
                return [(0, self._latents.window(fresh))]
            self._keys += fresh
            return []
        wanted = self._wanted(step)
        dense = []
        for place, interval in enumerate(wanted):
            dense.append(
                self._keys[interval - self._first_key]
            )  # the clean key, not the one that the clip saw
            dense += [made(place, frame) for frame in range(1, batch.frames - 1)]
        end = wanted.stop - self._first_key
        dense.append(self._keys[end])
        drop = min(end, len(self._keys) - self._config.known)
        self._keys, self._first_key = self._keys[drop:], self._first_key + drop
        return self._windows(step.round_index, dense)

    def _windows(self, round_index: int, made: list[Any]) -> list[tuple[int, Any]]:
        """What the decoder can take now. `made` ends with the key that opens the next round."""
        config, joined, window = self._config, [*self._tail, *made], self._latents.window
        if config.decode == "streamed":
            starts = range(0, len(joined) - 1, config.stride)
            return [(round_index, window(joined[start : start + config.stride])) for start in starts]
        if config.decode == "whole":
            self._tail = joined[:-1]
            last = config.rounds is not None and round_index == config.rounds - 1
            return [(0, window(joined))] if last else []
        self._tail = joined[max(0, len(joined) - 1 - config.left_context) : -1]
        # A short last round is padded by holding its last latent, so that it fits the compiled size.
        size = self._method.decoder_sizes[round_index > 0]
        held = [joined[-1]] * (size - len(joined))
        return [(round_index, window([*joined, *held]))]

    def _table(self, variant: Variant) -> np.ndarray:
        """Projected embeddings [with and without the level, steps, values] float32."""
        inputs = self._executor.inputs(variant)
        inputs["timesteps"][...] = self._config.ladder
        if "level" in inputs:
            inputs["level"][...] = self._method.perturbation or 0
        self._executor.run(variant)
        return self._executor.output(variant, "projected").copy()
