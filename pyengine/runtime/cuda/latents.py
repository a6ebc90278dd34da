"""The latents in flight on a card. A call is: rows moved up there, a little noise sent for those that are born, and
one graph: denoiser, guidance and sampler.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pyengine.backends.base import Port
from pyengine.device.array import DeviceArray
from pyengine.errors import ShapeError
from pyengine.plans.plan import Variant
from pyengine.runtime.cuda.memory import Pool, Staging
from pyengine.runtime.host.latents import Draw
from pyengine.schedule.samplers import Coefficients

if TYPE_CHECKING:
    from pyengine.runtime.cuda.executor import CudaExecutor, Enqueue

COMPONENT = "denoiser"


class CudaLatents:
    """`host.latents.Latents` with DeviceArrays. Single latents are views of blocks that come back to a pool."""

    def __init__(self, executor: CudaExecutor, frame_shape: tuple[int, ...], rows: int) -> None:
        self._executor, self._frame_shape = executor, frame_shape
        memory = executor.memory(COMPONENT)
        self._memory, self._stream, self._cuda = memory, memory.stream, memory.stream.cuda
        port = Port((rows, *frame_shape), "float32")
        self._now, self._next, self._noise = (memory.new(port) for _ in range(3))
        # Mixes noise into rows: DenoiseStep without a prediction.
        self._nothing = memory.new(Port((1, rows, *frame_shape), "float32"))
        self._no_weight = memory.control(Port((1,), "float32"))
        self._mix, self._scales = (
            [memory.control(Port((rows,), "float32")) for _ in range(3)] for _ in range(2)
        )
        self._weights: DeviceArray | None = None
        self._staging = Staging(self._stream, port.nbytes // rows)
        self._pool = Pool(self._stream, "float32")
        self._rows, self._renoised = 0, False

    def begin(self, rows: int) -> None:
        self._rows = rows

    def clear(self, row: int) -> None:
        self._next[row : row + 1][...] = 0

    def draw(self, row: int, noise: Draw) -> None:
        self._send(self._next[row], noise)

    def put(self, row: int, latent: DeviceArray) -> None:
        self._next[row] = latent

    def move(self, row: int, source: int, count: int) -> None:
        self._next[row : row + count] = self._now[source : source + count]

    def draw_noise(self, row: int, noise: Draw) -> None:
        self._send(self._noise[row], noise)

    def feed(self, variant: Variant, renoised: Sequence[tuple[int, float, Draw]] = ()) -> None:
        self._renoised = bool(renoised)
        if not renoised:
            return  # the graph begins with the copy
        keep, drop, mix = (self._memory.host(array)[: self._rows] for array in self._mix)
        keep[...], drop[...], mix[...] = 1, 0, 0
        for row, level, noise in renoised:
            self._send(self._noise[row], noise)
            keep[row], mix[row] = 1 - np.float32(level), level

    def call(
        self, variant: Variant, weights: np.ndarray | None, scales: Coefficients | None, noise: bool
    ) -> None:
        if self._renoised and noise:
            raise ShapeError("[latents] expected noise either before a call or by its sampler but got both")
        tag = ("renoised " if self._renoised else "") + ("recache" if scales is None else "call")
        if scales is not None and weights is not None:
            if self._weights is None:
                self._weights = self._memory.control(Port(weights.shape, "float32"))
            self._memory.host(self._weights)[...] = weights
            for array, values in zip(self._scales, scales, strict=True):
                self._memory.host(array)[: self._rows] = values
        self._executor.launch(
            variant,
            f"{tag} with noise" if noise else tag,
            lambda: ([self._head(variant)], [] if scales is None else [self._tail(variant, noise)]),
        )

    def _head(self, variant: Variant) -> Enqueue:
        """What the denoiser reads: the rows, some of them mixed with noise."""
        ops, count = self._executor.ops(COMPONENT), self._rows
        latents, sample = self._executor.on_card(variant, "latents"), self._next[:count]
        if not self._renoised:
            return ops.copy(latents, sample)
        nothing = self._nothing.view((1, count, *self._frame_shape), "float32")
        mix = (array[:count] for array in self._mix)
        return ops.denoise_step(
            sample, nothing, self._no_weight, *mix, noise=self._noise[:count], out=latents
        )

    def _tail(self, variant: Variant, noise: bool) -> Enqueue:
        """Guidance and the sampler's update."""
        count = self._rows
        assert self._weights is not None
        return self._executor.ops(COMPONENT).denoise_step(
            self._next[:count],
            self._executor.on_card(variant, "velocity"),
            self._weights,
            *(array[:count] for array in self._scales),
            noise=self._noise[:count] if noise else None,
            out=self._now[:count],
        )

    def take(self, rows: slice) -> DeviceArray:
        source = self._now[rows]
        block = self._pool.take(source.shape)
        block[...] = source
        assert block.ready is not None
        block.ready.record(self._stream)
        return block

    def own(self, latent: np.ndarray) -> DeviceArray:
        block = self._pool.take(latent.shape)
        block[...] = latent.astype(np.float32, copy=False)
        assert block.ready is not None
        block.ready.record(self._stream)
        return block

    def host(self, latent: Any) -> np.ndarray:
        copy: np.ndarray = latent.numpy()
        return copy

    def state(self) -> np.ndarray:
        return self._now.numpy()

    def load_state(self, latents: np.ndarray) -> None:
        if latents.shape != self._now.shape:
            raise ShapeError(
                f"expected a window of {list(self._now.shape)} but the snapshot has {list(latents.shape)}"
            )
        self._now[...] = latents

    def _send(self, target: DeviceArray, noise: Draw) -> None:
        """Noise is drawn on the host, where it is a function of seed and frame on every device alike."""
        self._staging.send(
            target.pointer,
            target.nbytes,
            lambda out: noise(out.view(np.float32).reshape(self._frame_shape)),
        )
