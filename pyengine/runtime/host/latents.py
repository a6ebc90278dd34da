"""The latents in flight, where the denoiser reads them: the rows of the last call and of the one under way.

A window says what each row is; these do it, on the host here and on a card in `pyengine.runtime.cuda.latents`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from pyengine import _C
from pyengine.errors import ShapeError
from pyengine.plans.plan import Variant
from pyengine.schedule.samplers import Coefficients

if TYPE_CHECKING:
    from pyengine.runtime.executor import Executor

__all__ = ["HostLatents", "Latents"]

Draw = Callable[[np.ndarray], object]  # fills one frame with noise


class Latents(Protocol):
    """Two sets of rows, float32 [rows, channels, height, width]: a call reads some of the last one's by index and
    leaves its result. One latent by itself is whatever `own` and `take` return: only this class looks inside.
    """

    def begin(self, rows: int) -> None:
        """A call of so many rows; every one is set by the next four."""
        ...

    def clear(self, row: int) -> None: ...

    def draw(self, row: int, noise: Draw) -> None: ...

    def put(self, row: int, latent: Any) -> None: ...

    def move(self, row: int, source: int, count: int) -> None:
        """`count` neighbouring rows of the last call, from `source` on."""
        ...

    def draw_noise(self, row: int, noise: Draw) -> None:
        """The fresh noise that the sampler adds to a row."""
        ...

    def feed(self, variant: Variant, renoised: Sequence[tuple[int, float, Draw]] = ()) -> None:
        """Gives the rows to the denoiser, some of them mixed with noise: (row, level, noise)."""
        ...

    def call(
        self, variant: Variant, weights: np.ndarray | None, scales: Coefficients | None, noise: bool
    ) -> None:
        """Runs the denoiser; with scales, updates the rows by what it predicts."""
        ...

    def take(self, rows: slice) -> Any:
        """A copy of rows that became clean: a sequence of latents."""
        ...

    def own(self, latent: np.ndarray) -> Any:
        """A latent from outside as one of these."""
        ...

    def host(self, latent: Any) -> np.ndarray: ...

    def state(self) -> np.ndarray: ...

    def load_state(self, latents: np.ndarray) -> None: ...


class HostLatents:
    """numpy."""

    def __init__(self, executor: Executor, frame_shape: tuple[int, ...], rows: int) -> None:
        self._executor = executor
        # Two buffers take turns: a call reads rows of one by index and leaves its result in the other.
        self._now, self._next = (np.zeros((rows, *frame_shape), np.float32) for _ in range(2))
        self._noise = np.zeros((rows, *frame_shape), np.float32)
        self._sample = self._next

    def begin(self, rows: int) -> None:
        self._sample = self._next[:rows]

    def clear(self, row: int) -> None:
        self._sample[row] = 0

    def draw(self, row: int, noise: Draw) -> None:
        noise(self._sample[row])

    def put(self, row: int, latent: np.ndarray) -> None:
        self._sample[row] = latent

    def move(self, row: int, source: int, count: int) -> None:
        self._sample[row : row + count] = self._now[source : source + count]

    def draw_noise(self, row: int, noise: Draw) -> None:
        noise(self._noise[row])

    def feed(self, variant: Variant, renoised: Sequence[tuple[int, float, Draw]] = ()) -> None:
        latents = self._executor.input(variant, "latents")
        latents[...] = self._sample
        for row, given, noise in renoised:
            level, fresh = np.float32(given), np.empty_like(latents[row])
            noise(fresh)
            latents[row] = (1 - level) * self._sample[row] + level * fresh

    def call(
        self, variant: Variant, weights: np.ndarray | None, scales: Coefficients | None, noise: bool
    ) -> None:
        self._executor.run(variant)
        if scales is None:
            return
        assert weights is not None
        sample, count = self._sample, len(self._sample)
        velocity = self._executor.output(variant, "velocity")
        fresh: Any = self._noise[:count] if noise else None
        _C.denoise_step(sample, velocity, weights, *scales, noise=fresh, out=self._now[:count])

    def take(self, rows: slice) -> np.ndarray:
        return self._now[rows].copy()

    def own(self, latent: np.ndarray) -> np.ndarray:
        return latent.copy()

    def host(self, latent: np.ndarray) -> np.ndarray:
        return latent

    def state(self) -> np.ndarray:
        return self._now.copy()

    def load_state(self, latents: np.ndarray) -> None:
        if latents.shape != self._now.shape:
            raise ShapeError(
                f"expected a window of {list(self._now.shape)} but the snapshot has {list(latents.shape)}"
            )
        self._now[...] = latents
