"""The clips in flight of two-level generation: does what each ClipStep says and hands out windows of latents to decode.

What is constant is made once: the embedding of every timestep, projected for every ResBlock, with and without the perturbation level;
keys and values of a text (by the text encoder). Features of clean frames are not kept, since GroupNorm over time makes
them depend on the noisy ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pyengine import _C
from pyengine.bundle import Latent
from pyengine.errors import PromptError, ShapeError
from pyengine.executor import Executor
from pyengine.hierarchy import ClipStep
from pyengine.methods.hierarchical import Hierarchical
from pyengine.plan import Variant
from pyengine.samplers import alphas_cumprod, ddim, frame_noise

__all__ = ["Clips"]

INTERPOLATION_STREAM = (
    1 << 40
)  # numbers of interpolation windows for the noise start here, those of prediction clips at 0
CONDITION_CALL = 1 << 20  # the draw that perturbs the conditioning latents; steps draw as calls 0, 1, ...


class Clips:
    """Latents of one stream, float32 [channels, frames, height, width] per clip."""

    def __init__(
        self, executor: Executor, latent: Latent, method: Hierarchical, *, guidance: float, seed: int
    ) -> None:
        self._executor, self._method, self._seed = executor, method, seed
        self._config = method.config
        self._weights = np.array(method.guidance_weights(guidance), np.float32)
        self._variants = method.denoiser_variants(len(self._weights))
        self._latent = latent
        self._alpha_bar = alphas_cumprod(*method.betas, self._config.timesteps)
        self._sampler = ddim(self._alpha_bar, method.eta, method.predicts)
        self._tables = {name: self._table(variant) for name, variant in method.embedding_variants().items()}
        self.call = 0
        channels, height, width = latent.channels, latent.height, latent.width
        self._place = (channels, height, width)
        # Keys of which intervals are still to be made, or that the next prediction reads; the first is key number `_first_key`.
        self._keys = np.zeros((0, *self._place), np.float32)
        self._first_key = 0
        self._sample = np.zeros((0, channels, 0, height, width), np.float32)
        self._condition = np.zeros_like(self._sample)
        self._tail = np.zeros(
            (0, *self._place), np.float32
        )  # dense latents that the next decoder window sees again

    @property
    def variants(self) -> tuple[Variant, ...]:
        """The denoiser variants that it runs."""
        return tuple(self._variants.values())

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

    def advance(self) -> list[tuple[int, np.ndarray]]:
        """One call of one network. Returns decoder windows that are complete: (round, latents [n, channels, height, width])."""
        step = self._config.step_at(self.call)
        if step.network == "interpolation" and not self._wanted(step):
            self.call += 1
            return []
        if step.index == 0:
            self._begin(step)
        self._denoise(step)
        self.call += 1
        return self._finish(step) if step.is_last else []

    def state(self) -> dict[str, np.ndarray]:
        """All that later calls depend on, beside the executor's state."""
        return {
            "call": np.array(self.call),
            "keys": self._keys.copy(),
            "first_key": np.array(self._first_key),
            "sample": self._sample.copy(),
            "condition": self._condition.copy(),
            "tail": self._tail.copy(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Puts back what `state()` returned."""
        if state["keys"].shape[1:] != self._place:
            raise ShapeError(
                f"expected latents {list(self._place)} but the snapshot has {list(state['keys'].shape[1:])}"
            )
        self.call, self._first_key = int(state["call"]), int(state["first_key"])
        self._keys, self._tail = state["keys"].copy(), state["tail"].copy()
        self._sample, self._condition = state["sample"].copy(), state["condition"].copy()

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

    def _begin(self, step: ClipStep) -> None:
        """Fresh noise for every clip of the batch, and its conditioning latents, perturbed once."""
        frames = self._config.clip_frames if step.network == "prediction" else self._config.stride + 1
        channels, height, width = self._place
        shape = (channels, frames, height, width)
        numbers = self._numbers(step)
        self._sample = np.stack([frame_noise(self._seed, number, shape) for number in numbers])
        if step.network == "interpolation":
            firsts = [interval - self._first_key for interval in step.intervals]
            known = np.stack([self._keys[[first, first + 1]] for first in firsts])
        else:
            count = self._config.known if step.clip else 0
            known = self._keys[None, len(self._keys) - count :]
        known = known.swapaxes(1, 2)  # [clips, channels, known, height, width]
        level = self._method.perturbation
        if level is not None and known.size:
            a = self._alpha_bar[level]
            noise = [frame_noise(self._seed, n, known.shape[1:], CONDITION_CALL) for n in numbers]
            known = (a**0.5 * known + (1 - a) ** 0.5 * np.stack(noise)).astype(np.float32)
        self._condition = np.ascontiguousarray(known, np.float32)

    def _denoise(self, step: ClipStep) -> None:
        sample, known = self._sample, self._condition.shape[2]
        clips, branches = len(sample), len(self._weights)
        ends = step.network == "interpolation"
        places = [0, -1] if ends else list(range(known))
        if known:
            sample[:, :, places] = (
                self._condition
            )  # it stays there for both branches and for the update, as released
        variant = self._variants[step.network, clips]
        inputs = self._executor.inputs(variant)
        # Made here and given as wholes: on a card an input is written, not read.
        given = {"latents": np.concatenate([sample] * branches)}
        if "mask" in inputs:
            mask = np.zeros((branches, clips, sample.shape[2]), np.float32)
            if known and self._config.behaviour == "released" and not ends:
                mask[0] = 1  # the published loop forgets how many frames are known
            elif known:
                mask[0][:, places] = 1
            given["mask"] = mask
        table = self._tables[step.network]
        labelled = known > 0 and self._method.perturbation is not None
        rows = np.repeat(table[-1, step.index][None], branches, 0)
        if labelled:
            rows[0] = table[0, step.index]
        given["embedding"] = np.repeat(rows, clips, 0)
        for name, value in given.items():
            inputs[name][...] = value.reshape(inputs[name].shape)
        self._executor.run(variant)
        predicted = self._executor.output(variant, "predicted").copy().reshape(branches, *sample.shape)
        scale = self._config.timesteps
        now = np.full(clips, (step.timestep + 1) / scale)
        then = np.full(clips, (step.timestep_next + 1) / scale)
        coefficients = self._sampler(now, then)
        noise = None
        if coefficients.needs_noise:
            shape = sample.shape[1:]
            noise = np.stack([frame_noise(self._seed, n, shape, step.index) for n in self._numbers(step)])
        _C.denoise_step(sample, predicted, self._weights, *coefficients, noise=noise, out=sample)

    def _finish(self, step: ClipStep) -> list[tuple[int, np.ndarray]]:
        frames = self._sample.swapaxes(1, 2)  # [clips, frames, channels, height, width]
        if not self._config.interpolates:
            return [(0, frames[0].copy())]
        if step.network == "prediction":
            fresh = frames[0] if step.clip == 0 else frames[0, self._config.known :]
            self._keys = np.concatenate([self._keys, fresh])
            return []
        wanted = self._wanted(step)
        dense = []
        for place, interval in enumerate(wanted):
            first = interval - self._first_key
            dense += [
                self._keys[first : first + 1],
                frames[place, 1:-1],
            ]  # clean keys, not those the clip saw
        end = wanted.stop - self._first_key
        made = np.concatenate([*dense, self._keys[end : end + 1]])
        drop = min(end, len(self._keys) - self._config.known)
        self._keys, self._first_key = self._keys[drop:].copy(), self._first_key + drop
        return self._windows(step.round_index, made)

    def _windows(self, round_index: int, made: np.ndarray) -> list[tuple[int, np.ndarray]]:
        """What the decoder can take now. `made` ends with the key that opens the next round."""
        config, joined = self._config, np.concatenate([self._tail, made])
        if config.decode == "streamed":
            return [
                (round_index, joined[start : start + config.stride])
                for start in range(0, len(joined) - 1, config.stride)
            ]
        if config.decode == "whole":
            self._tail = joined[:-1].copy()
            last = config.rounds is not None and round_index == config.rounds - 1
            return [(0, joined)] if last else []
        self._tail = joined[max(0, len(joined) - 1 - config.left_context) : -1].copy()
        # A short last round is padded by holding its last latent, so that it fits the compiled size.
        size = self._method.decoder_sizes[round_index > 0]
        held = np.repeat(joined[-1:], max(0, size - len(joined)), 0)
        return [(round_index, np.concatenate([joined, held]))]

    def _table(self, variant: Variant) -> np.ndarray:
        """Projected embeddings [with and without the level, steps, values] float32."""
        inputs = self._executor.inputs(variant)
        inputs["timesteps"][...] = self._config.ladder
        if "level" in inputs:
            inputs["level"][...] = self._method.perturbation or 0
        self._executor.run(variant)
        return self._executor.output(variant, "projected").copy()
