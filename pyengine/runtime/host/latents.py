"""The latents of streams on the CPU, in numpy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pyengine import _C
from pyengine.bundle.variant import Variant
from pyengine.errors import ShapeError
from pyengine.runtime.latents import Draw, kept

if TYPE_CHECKING:
    from pyengine.runtime.executor import Executor

__all__ = ["HostCallBuffers", "HostLatentStore", "check_state"]


class HostLatentStore:
    """`LatentStore` in numpy."""

    def __init__(self, frame_shape: tuple[int, ...], places: int) -> None:
        self.flight = np.zeros((places, *frame_shape), np.float32)
        self.clean: dict[int, np.ndarray] = {}

    def draw(self, place: int, noise: Draw) -> None:
        noise(self.flight[place])

    def put(self, place: int, frame: int) -> None:
        self.flight[place] = self.read(frame)

    def mix(self, place: int, frame: int, keep: float, share: float, noise: Draw) -> None:
        fresh = np.empty_like(self.flight[place])
        noise(fresh)
        _mix(self.read(frame), keep, share, fresh, self.flight[place])

    def finish(self, place: int, frame: int) -> None:
        self.clean[frame] = self.flight[place].copy()

    def give(self, frame: int, latent: np.ndarray) -> None:
        self.clean[frame] = np.array(latent, np.float32)

    def forget(self, pinned: int, oldest: int) -> None:
        for frame in [frame for frame in self.clean if pinned <= frame < oldest]:
            del self.clean[frame]

    def window(self, frames: Sequence[int]) -> np.ndarray:
        return np.stack([self.read(frame) for frame in frames])

    def read(self, frame: int) -> np.ndarray:
        """A clean latent."""
        return kept(self.clean, frame)

    def state(self) -> dict[str, np.ndarray]:
        frames = sorted(self.clean)
        clean = np.zeros((len(frames), *self.flight.shape[1:]), np.float32)
        for place, frame in enumerate(frames):
            clean[place] = self.clean[frame]
        return {"latents": self.flight.copy(), "clean_index": np.array(frames, np.int64), "clean": clean}

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        check_state(state, self.flight.shape)
        self.flight[...] = state["latents"]
        pairs = zip(state["clean_index"].tolist(), state["clean"], strict=True)
        self.clean = {frame: latent.copy() for frame, latent in pairs}


class HostCallBuffers:
    """`CallBuffers` in numpy. The latents lie in the very memory that the network reads."""

    def __init__(self, executor: Executor, variant: Variant) -> None:
        self._executor, self._variant = executor, variant
        self._inputs = executor.inputs(variant)
        self._sample = self._inputs["latents"]
        self.lanes = len(self._sample)
        self._noise: np.ndarray | None = None
        self._prediction = executor.output(variant, "prediction")
        self.branches = len(self._prediction)
        self._recalled: np.ndarray | None = None  # what was kept of the step before
        self._kept: np.ndarray | None = None  # and of this one

    def claim(self, store: HostLatentStore) -> None:
        """Nothing to wait for: a host run is done when it returns."""

    def load(self, lane: int, row: int, store: HostLatentStore, place: int, count: int) -> None:
        self._sample[lane, row : row + count] = store.flight[place : place + count]

    def give(self, lane: int, row: int, store: HostLatentStore, frame: int) -> None:
        self._sample[lane, row] = store.read(frame)

    def clear(self, lane: int, row: int, count: int) -> None:
        self._sample[lane, row : row + count] = 0

    def renoise(self, lane: int, row: int, keep: float, share: float, noise: Draw) -> None:
        seen = self._sample[lane, row]
        fresh = np.empty_like(seen)
        noise(fresh)
        _mix(seen, keep, share, fresh, seen)

    def draw(self, lane: int, row: int, noise: Draw) -> None:
        if self._noise is None:
            self._noise = np.zeros_like(self._sample)
        noise(self._noise[lane, row])

    def save(self, lane: int, row: int, store: HostLatentStore, place: int, count: int) -> None:
        store.flight[place : place + count] = self._sample[lane, row : row + count]

    def recall(self, lane: int, row: int, store: HostLatentStore, place: int, count: int) -> None:
        if self._recalled is None:
            self._recalled = np.zeros_like(self._sample)
        self._recalled[lane, row : row + count] = store.flight[place : place + count]

    def keep(self, lane: int, row: int, store: HostLatentStore, place: int, count: int) -> None:
        assert self._kept is not None
        store.flight[place : place + count] = self._kept[lane, row : row + count]

    def input(self, name: str) -> np.ndarray | None:
        return self._inputs.get(name)

    def attach(self, lane: int, rings: Mapping[str, Any]) -> None:
        self._executor.attach(self._variant, lane, rings)

    def run(
        self,
        weights: np.ndarray | None = None,
        scales: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None,
        noise: bool = False,
        history: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None = None,
    ) -> None:
        self._executor.run(self._variant)
        if scales is None:
            return
        given: dict[str, Any] = {"noise": self._noise if noise else None}
        if history is not None:
            if self._kept is None:
                self._kept = np.zeros_like(self._sample)
            recalled, sample, prediction, older = history
            before = {} if self._recalled is None else {"history": self._recalled, "history_scale": older}
            kept = (sample, prediction, np.zeros_like(recalled))
            _C.denoise_step(self._sample, self._prediction, weights, *kept, **before, out=self._kept)
            if self._recalled is not None:
                given |= {"history": self._recalled, "history_scale": recalled}
        _C.denoise_step(self._sample, self._prediction, weights, *scales, **given, out=self._sample)


def _mix(latent: np.ndarray, keep: float, share: float, noise: np.ndarray, out: np.ndarray) -> None:
    """out = keep * latent + share * noise, by the kernel of the sampler's update, which rounds alike on every device."""
    kept, dropped, mixed = (np.full((1, 1), scale, np.float32) for scale in (keep, 0, share))
    one = (1, 1, *latent.shape)
    nothing, no_weight = np.zeros((1, *one), np.float32), np.zeros((1, 1), np.float32)
    _C.denoise_step(
        latent.reshape(one),
        nothing,
        no_weight,
        kept,
        dropped,
        mixed,
        noise=noise.reshape(one),
        out=out.reshape(one),
    )


def check_state(state: Mapping[str, np.ndarray], flight: tuple[int, ...]) -> None:
    """Raises ShapeError where arrays of a snapshot are not those of a store with so many latents in flight."""
    for name in ("latents", "clean_index", "clean"):
        if name not in state:
            raise ShapeError(
                f"[latents] expected a snapshot with '{name}' but it has {', '.join(sorted(state))}"
            )
    latents, index, clean = state["latents"], state["clean_index"], state["clean"]
    for name, array, shape in (
        ("latents", latents, flight),
        ("clean", clean, (len(index) if index.ndim == 1 else 0, *flight[1:])),
    ):
        if array.shape != shape or array.dtype != np.float32:
            raise ShapeError(
                f"[latents] expected '{name}' of the snapshot as float32 {list(shape)}"
                f" but got {array.dtype} {list(array.shape)}"
            )
    if index.ndim != 1 or index.dtype.kind != "i":
        raise ShapeError(
            f"[latents] expected 'clean_index' of the snapshot as integers [frames] but got {index.dtype} {list(index.shape)}"
        )
