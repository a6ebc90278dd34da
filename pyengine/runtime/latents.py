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
        """Fills a place with a latent of noise."""
        ...

    def put(self, place: int, frame: int) -> None:
        """Copies the clean latent of a frame to a place."""
        ...

    def mix(self, place: int, frame: int, keep: float, share: float, noise: Draw) -> None:
        """Writes keep * the clean latent of a frame + share * noise to a place."""
        ...

    def finish(self, place: int, frame: int) -> None:
        """Keeps a copy of what lies at a place, which is clean now, under its frame."""
        ...

    def give(self, frame: int, latent: np.ndarray) -> None:
        """Takes a clean latent from outside, [channels, height, width], under a frame."""
        ...

    def forget(self, pinned: int, oldest: int) -> None:
        """Drops clean latents from `pinned` on that are older than `oldest`."""
        ...

    def window(self, frames: Sequence[int]) -> Any:
        """Copies clean latents into one new array, [frames, channels, height, width], for a codec."""
        ...

    def state(self) -> dict[str, np.ndarray]:
        """Returns copies on the host: `latents` in flight, `clean` ones and their numbers `clean_index`."""
        ...

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Puts back what `state()` returned. Raises ShapeError where it does not fit."""
        ...


class CallBuffers(Protocol):
    """What one denoiser variant reads and writes beside its ring: [lanes, rows] latents, and the numbers of each."""

    lanes: int
    branches: int  # of the prediction: those of guidance, or one where the network guides itself

    def claim(self, store: Any) -> None:
        """Orders what follows after everything that was done with a stream's latents before, by whichever variant."""
        ...

    def load(self, lane: int, row: int, store: Any, place: int, count: int) -> None:
        """Copies `count` neighbouring latents in flight of a stream, from `place` on, to rows of a lane."""
        ...

    def give(self, lane: int, row: int, store: Any, frame: int) -> None:
        """Copies the clean latent of a frame to a row."""
        ...

    def clear(self, lane: int, row: int, count: int) -> None:
        """Zeroes `count` rows, which are absent."""
        ...

    def renoise(self, lane: int, row: int, keep: float, share: float, noise: Draw) -> None:
        """Makes what the network sees of a row keep * latent + share * noise; the stream's own latent stays."""
        ...

    def draw(self, lane: int, row: int, noise: Draw) -> None:
        """Draws the fresh noise that the sampler adds to a row."""
        ...

    def save(self, lane: int, row: int, store: Any, place: int, count: int) -> None:
        """Copies `count` neighbouring rows, updated, back to their places in flight."""
        ...

    def recall(self, lane: int, row: int, store: Any, place: int, count: int) -> None:
        """Copies what was kept of `count` neighbouring rows at their step before, from places in flight of a stream."""
        ...

    def keep(self, lane: int, row: int, store: Any, place: int, count: int) -> None:
        """Copies what the last run kept of `count` neighbouring rows to places in flight."""
        ...

    def input(self, name: str) -> np.ndarray | None:
        """Returns a small or text input as numpy that the next run reads; None where the network has none of that name."""
        ...

    def attach(self, lane: int, rings: Mapping[str, Any]) -> None:
        """Makes a lane read and write these rings from its next run on."""
        ...

    def run(
        self,
        weights: np.ndarray | None = None,
        scales: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None,
        noise: bool = False,
        history: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None = None,
    ) -> None:
        """Runs the network; with weights [branches, lanes] and scales [lanes, rows], updates the latents by what it predicts.

        `history` are the scales, [lanes, rows], of what was recalled, and of latents, prediction and that in what is kept of this step.
        """
        ...
