"""Where latents live, as the driver sees it: one store per stream, and the buffers of one denoiser variant that lanes of
several streams share. The host's are in `pyengine.runtime.host.latents`, a GPU's in `pyengine.runtime.cuda.latents`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np

from pyengine.errors import PlanError

__all__ = ["CallBuffers", "Draw", "LatentStore", "kept"]

Draw = Callable[[np.ndarray], object]  # fills one latent with noise
Latent = TypeVar("Latent")


def kept(clean: Mapping[int, Latent], frame: int) -> Latent:
    """A clean latent of a store. Raises PlanError where it has gone."""
    if frame not in clean:
        raise PlanError(
            f"expected the clean latent of frame {frame} to be kept but there are only {sorted(clean)[-8:]}; if the stream was resumed, "
            "make its snapshot again"
        )
    return clean[frame]


class LatentStore(Protocol):
    """The latents of one stream, float32 [channels, height, width] each: those in flight by place, clean ones by frame."""

    def draw(self, place: int, noise: Draw) -> None:
        """A latent of noise."""
        ...

    def put(self, place: int, frame: int) -> None:
        """A copy of a clean latent."""
        ...

    def mix(self, place: int, frame: int, keep: float, share: float, noise: Draw) -> None:
        """keep * the clean latent + share * noise."""
        ...

    def finish(self, place: int, frame: int) -> None:
        """What lies at a place is clean: kept under its frame."""
        ...

    def give(self, frame: int, latent: np.ndarray) -> None:
        """A clean latent from outside."""
        ...

    def forget(self, pinned: int, oldest: int) -> None:
        """Drops clean latents from `pinned` on that are older than `oldest`."""
        ...

    def window(self, frames: Sequence[int]) -> Any:
        """Clean latents as one array of its own, [frames, channels, height, width], for a codec."""
        ...

    def state(self) -> dict[str, np.ndarray]:
        """Copies on the host: `latents` in flight, `clean` ones and their numbers `clean_index`."""
        ...

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Puts back what `state()` returned. Raises ShapeError where it does not fit."""
        ...


class CallBuffers(Protocol):
    """What one denoiser variant reads and writes beside its ring: [lanes, rows] latents, and the numbers of each."""

    lanes: int

    def claim(self, store: Any) -> None:
        """What is done with a stream's latents from now on comes after what was done before, whoever did it."""
        ...

    def load(self, lane: int, row: int, store: Any, place: int, count: int) -> None:
        """`count` neighbouring latents in flight of a stream, from `place` on."""
        ...

    def give(self, lane: int, row: int, store: Any, frame: int) -> None:
        """A clean latent of a stream."""
        ...

    def clear(self, lane: int, row: int, count: int) -> None: ...

    def renoise(self, lane: int, row: int, keep: float, share: float, noise: Draw) -> None:
        """What the network sees of a row becomes keep * latent + share * noise."""
        ...

    def draw(self, lane: int, row: int, noise: Draw) -> None:
        """The fresh noise that the sampler adds to a row."""
        ...

    def save(self, lane: int, row: int, store: Any, place: int, count: int) -> None:
        """Neighbouring updated rows back to where they lie in flight."""
        ...

    def input(self, name: str) -> np.ndarray | None:
        """A small or text input as numpy that the next run reads; None where the network has none of that name."""
        ...

    def attach(self, lane: int, rings: Mapping[str, Any]) -> None:
        """From now on a lane reads and writes these rings."""
        ...

    def run(
        self,
        weights: np.ndarray | None = None,
        scales: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None,
        noise: bool = False,
    ) -> None:
        """Runs the network; with weights [branches, lanes] and scales [lanes, rows], updates the latents by what it predicts."""
        ...
