"""The latents of two-level generation, where the networks read them: the clips in flight, and single latents.

`Clips` says what is made of what; these do it, on the host here and on a card in `pyengine.runtime.cuda.clip_latents`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from pyengine import _C
from pyengine.plans.plan import Variant
from pyengine.schedule.samplers import Coefficients

if TYPE_CHECKING:
    from pyengine.runtime.executor import Executor

__all__ = ["Batch", "Call", "ClipLatents", "HostClipLatents"]

Draw = Callable[[np.ndarray], object]  # fills one clip with noise


@dataclass(frozen=True)
class Batch:
    """The clips that one network makes at a time. Of `frames` it knows the first `known` ones or, with `ends`, the two ends."""

    variant: Variant
    clips: int
    frames: int
    known: int
    ends: bool

    @property
    def places(self) -> tuple[int, ...]:
        """Frames that are known where anything is."""
        return (0, self.frames - 1) if self.ends else tuple(range(self.known))


@dataclass(frozen=True)
class Call:
    """What one call of a network takes beside the clips.

    mask       [branches, clips, frames] float32, 1 = known, for networks that have such a channel
    embedding  row and step of the network's table, for each branch
    weights    of the branches, [branches] float32
    scales     the sampler's, one of each per clip
    noise      what the sampler adds to each clip, if anything
    """

    mask: np.ndarray
    embedding: tuple[tuple[int, int], ...]
    weights: np.ndarray
    scales: Coefficients
    noise: tuple[Draw, ...] = ()


class ClipLatents(Protocol):
    """Clips are float32 [clips, channels, frames, height, width]. A single latent [channels, height, width] is whatever `made` and
    `own` return: only this class looks inside.
    """

    def begin(self, batch: Batch, known: Sequence[Sequence[Any]], noise: Sequence[Draw]) -> None:
        """Clips of noise, and the latents that are known of each, the same number of all."""
        ...

    def perturb(self, keep: float, mix: float, noise: Sequence[Draw]) -> None:
        """What is known becomes keep * known + mix * noise."""
        ...

    def call(self, call: Call) -> None:
        """Writes what is known over the clips, runs the network and updates them by what it predicts."""
        ...

    def made(self, clip: int, frame: int) -> Any:
        """A copy of one latent."""
        ...

    def window(self, latents: Sequence[Any]) -> Any:
        """Latents as one array for the decoder, [count, channels, height, width]."""
        ...

    def own(self, latent: np.ndarray) -> Any:
        """A latent from outside as one of these."""
        ...

    def host(self, latent: Any) -> np.ndarray: ...

    def state(self) -> dict[str, np.ndarray]:
        """`sample` and `condition`, the clips in flight and what is known of them."""
        ...

    def load_state(self, batch: Batch | None, state: Mapping[str, np.ndarray]) -> None:
        """Puts back what `state()` returned; None where nothing is in flight."""
        ...


class HostClipLatents:
    """numpy."""

    def __init__(
        self, executor: Executor, frame_shape: tuple[int, int, int], tables: Mapping[str, np.ndarray]
    ) -> None:
        """tables: per network the projected embeddings of every timestep, [rows, steps, values] float32."""
        self._executor, self._tables = executor, tables
        self._frame_shape = frame_shape
        self._batch: Batch | None = None
        channels, height, width = frame_shape
        self._sample = self._condition = np.zeros((0, channels, 0, height, width), np.float32)

    def begin(self, batch: Batch, known: Sequence[Sequence[np.ndarray]], noise: Sequence[Draw]) -> None:
        self._batch = batch
        channels, height, width = self._frame_shape
        self._sample = self._drawn((batch.clips, channels, batch.frames, height, width), noise)
        self._condition = np.zeros((batch.clips, channels, len(known[0]), height, width), np.float32)
        for clip, latents in enumerate(known):
            for place, latent in enumerate(latents):
                self._condition[clip, :, place] = latent

    def perturb(self, keep: float, mix: float, noise: Sequence[Draw]) -> None:
        known, fresh = self._condition, self._drawn(self._condition.shape, noise)
        kept, dropped, mixed = (np.full(len(known), scale, np.float32) for scale in (keep, 0, mix))
        nothing, no_weight = np.zeros((1, *known.shape), np.float32), np.zeros(1, np.float32)
        _C.denoise_step(known, nothing, no_weight, kept, dropped, mixed, noise=fresh, out=known)

    def call(self, call: Call) -> None:
        batch, sample = self._batch, self._sample
        assert batch is not None
        if self._condition.shape[2]:  # it stays there for both branches and for the update, as released
            sample[:, :, batch.places] = self._condition
        inputs, branches = self._executor.inputs(batch.variant), len(call.weights)
        table = self._tables[batch.variant.component]
        given = {
            "latents": np.concatenate([sample] * branches),
            "mask": call.mask,
            "embedding": np.repeat(np.stack([table[place] for place in call.embedding]), batch.clips, 0),
        }
        for name in given.keys() & inputs.keys():
            inputs[name][...] = given[name].reshape(inputs[name].shape)
        self._executor.run(batch.variant)
        predicted = self._executor.output(batch.variant, "predicted").reshape(branches, *sample.shape)
        noise = self._drawn(sample.shape, call.noise) if call.noise else None
        _C.denoise_step(sample, predicted, call.weights, *call.scales, noise=noise, out=sample)

    def made(self, clip: int, frame: int) -> np.ndarray:
        return self._sample[clip, :, frame].copy()

    def window(self, latents: Sequence[np.ndarray]) -> np.ndarray:
        return np.stack(latents)

    def own(self, latent: np.ndarray) -> np.ndarray:
        return latent.copy()

    def host(self, latent: np.ndarray) -> np.ndarray:
        return latent

    def state(self) -> dict[str, np.ndarray]:
        return {"sample": self._sample.copy(), "condition": self._condition.copy()}

    def load_state(self, batch: Batch | None, state: Mapping[str, np.ndarray]) -> None:
        self._batch = batch
        self._sample, self._condition = state["sample"].copy(), state["condition"].copy()

    def _drawn(self, shape: tuple[int, ...], noise: Sequence[Draw]) -> np.ndarray:
        drawn = np.empty(shape, np.float32)
        for clip, draw in zip(drawn, noise, strict=True):
            draw(clip)
        return drawn
