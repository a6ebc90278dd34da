"""The latents of streams on a GPU. A call is: latents moved up there, a little noise sent for those that are born, and one
graph: denoiser, guidance and sampler. Nothing waits for the GPU until someone reads frames.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pyengine.backends.base import Port
from pyengine.bundle.variant import Variant
from pyengine.device.array import DeviceArray
from pyengine.device.cuda import Stream
from pyengine.runtime.cuda.memory import Large, Pool, Staging
from pyengine.runtime.host.latents import check_state
from pyengine.runtime.latents import Draw, kept

if TYPE_CHECKING:
    from pyengine.runtime.cuda.executor import CudaExecutor, Enqueue

__all__ = ["CudaCallBuffers", "CudaLatentStore"]


class CudaLatentStore:
    """`LatentStore` with DeviceArrays. Clean latents are blocks that come back to a pool. Everything is enqueued on `stream`, that of
    the component whose call is under way.
    """

    def __init__(
        self, executor: CudaExecutor, component: str, frame_shape: tuple[int, ...], places: int
    ) -> None:
        self._memory = executor.memory(component)
        self._ops = executor.ops(component)
        self.stream: Stream = self._memory.stream
        self._shape, self._cuda = frame_shape, self.stream.cuda
        self.flight = self._memory.new(Port((places, *frame_shape), "float32"))
        self.clean: dict[int, DeviceArray] = {}
        self._nbytes = self.flight.nbytes // places
        self._staging: dict[Stream, Staging] = {}
        self._pools: dict[Stream, Pool] = {}
        self._mixed: tuple[float, float] | None = None

    def use(self, stream: Stream) -> None:
        """What follows is enqueued on a stream, after what was enqueued before on another."""
        if stream is not self.stream:
            stream.wait_for(self._cuda.event().record(self.stream))
            self.stream = stream

    def draw(self, place: int, noise: Draw) -> None:
        self._send(self.flight[place], noise)

    def put(self, place: int, frame: int) -> None:
        self.copy(self.flight[place], self.read(frame))

    def mix(self, place: int, frame: int, keep: float, share: float, noise: Draw) -> None:
        target = self.flight[place]
        self._send(target, noise)
        self._mix(self.read(frame), keep, share, target)

    def finish(self, place: int, frame: int) -> None:
        block = self._block(self._shape)
        self.copy(block, self.flight[place])
        self._keep(frame, block)

    def give(self, frame: int, latent: np.ndarray) -> None:
        block = self._block(self._shape)
        host = np.ascontiguousarray(latent, np.float32)
        self._cuda.copy(block.pointer, host.ctypes.data, block.nbytes, self.stream)
        self.stream.synchronize()
        self._keep(frame, block)

    def forget(self, pinned: int, oldest: int) -> None:
        for frame in [frame for frame in self.clean if pinned <= frame < oldest]:
            del self.clean[frame]

    def window(self, frames: Sequence[int]) -> DeviceArray:
        block = self._block((len(frames), *self._shape))
        for place, frame in enumerate(frames):
            self.copy(block[place], self.read(frame))
        assert block.ready is not None
        block.ready.record(self.stream)
        return block

    def state(self) -> dict[str, np.ndarray]:
        self.stream.synchronize()
        frames = sorted(self.clean)
        clean = np.zeros((len(frames), *self._shape), np.float32)
        for place, frame in enumerate(frames):
            clean[place] = self.clean[frame].numpy()
        return {"latents": self.flight.numpy(), "clean_index": np.array(frames, np.int64), "clean": clean}

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        check_state(state, self.flight.shape)
        self.flight[...] = state["latents"]
        self.clean.clear()
        for frame, latent in zip(state["clean_index"].tolist(), state["clean"], strict=True):
            self.give(frame, latent)

    def read(self, frame: int) -> DeviceArray:
        """A clean latent for a reader on the stream in use: its block is not written again before that is done."""
        latent = kept(self.clean, frame)
        if latent.stream is not self.stream:
            latent.owner.own_readers.add(self.stream)  # type: ignore[attr-defined]
        return latent

    def copy(self, target: DeviceArray, source: DeviceArray) -> None:
        self._cuda.copy(target.pointer, source.pointer, source.nbytes, self.stream)

    def _keep(self, frame: int, block: DeviceArray) -> None:
        assert block.ready is not None
        block.ready.record(self.stream)
        self.clean[frame] = block

    def _block(self, shape: tuple[int, ...]) -> DeviceArray:
        if self.stream not in self._pools:
            self._pools[self.stream] = Pool(self.stream, "float32")
        return self._pools[self.stream].take(shape)

    def _send(self, target: DeviceArray, noise: Draw) -> None:
        """Noise is drawn on the host, where it is a function of seed and frame on every device alike."""
        if self.stream not in self._staging:
            self._staging[self.stream] = Staging(self.stream, self._nbytes)
        self._staging[self.stream].send(
            target.pointer,
            target.nbytes,
            lambda out: noise(out.view(np.float32).reshape(self._shape)),
        )

    def _mix(self, latent: DeviceArray, keep: float, share: float, out: DeviceArray) -> None:
        """out = keep * latent + share * out: DenoiseStep without a prediction."""
        if self._mixed is None:
            self._scales = [self._memory.new(Port((1, 1), "float32")) for _ in range(4)]
            self._nothing = self._memory.new(Port((1, 1, 1, *self._shape), "float32"))
            self._fresh = self._memory.new(Port((1, 1, *self._shape), "float32"))
        if self._mixed != (keep, share):
            for array, value in zip(self._scales, (keep, 0.0, share), strict=False):
                array[...] = np.full((1, 1), value, np.float32)
            self._mixed = (keep, share)
        one = (1, 1, *self._shape)
        self.copy(self._fresh, out)
        *scales, no_weight = self._scales
        self._ops.on(self.stream).op(
            "denoise_step",
            latent.view(one, "float32"),
            self._nothing,
            no_weight,
            *scales,
            noise=self._fresh,
            out=out.view(one, "float32"),
        )()


class _History(NamedTuple):
    """What a multistep solver kept of the step before, what it keeps of this one, and scales: of the first, of latents, of the
    prediction and of the first in the second, and zeros.
    """

    recalled: DeviceArray
    kept: DeviceArray
    scales: list[DeviceArray]


class CudaCallBuffers:
    """`CallBuffers` with DeviceArrays. The latents lie in the very memory that the network reads."""

    def __init__(self, executor: CudaExecutor, variant: Variant) -> None:
        self._executor, self._variant = executor, variant
        memory = executor.memory(variant.component)
        self._memory, self._stream, self._cuda = memory, memory.stream, memory.stream.cuda
        self._sample = executor.on_gpu(variant, "latents")
        self._prediction = executor.on_gpu(variant, "prediction")
        self.lanes, self._rows, *shape = self._sample.shape
        self.branches = len(self._prediction)
        self._shape = tuple(shape)
        self._port = Port(self._sample.shape, "float32")
        numbers = Port((self.lanes, self._rows), "float32")
        self._weights = memory.control(Port(self._prediction.shape[:2], "float32"))
        self._scales, self._mixes = ([memory.control(numbers) for _ in range(3)] for _ in range(2))
        self._noise: DeviceArray | None = None
        self._fresh: DeviceArray | None = None  # what renoised rows are mixed with
        self._nothing: DeviceArray | None = None
        self._history: _History | None = None
        self._staging = Staging(self._stream, self._sample.nbytes // (self.lanes * self._rows))
        self._changed: dict[str, Large] = {}
        self._renoised = False

    def claim(self, store: CudaLatentStore) -> None:
        store.use(self._stream)

    def load(self, lane: int, row: int, store: CudaLatentStore, place: int, count: int) -> None:
        store.copy(self._sample[lane][row : row + count], store.flight[place : place + count])

    def give(self, lane: int, row: int, store: CudaLatentStore, frame: int) -> None:
        store.copy(self._sample[lane][row], store.read(frame))

    def clear(self, lane: int, row: int, count: int) -> None:
        self._sample[lane][row : row + count][...] = 0

    def renoise(self, lane: int, row: int, keep: float, share: float, noise: Draw) -> None:
        kept, dropped, mixed = (self._memory.host(array) for array in self._mixes)
        if not self._renoised:
            kept[...], dropped[...], mixed[...] = 1, 0, 0
            self._renoised = True
        if self._fresh is None:
            self._fresh, self._nothing = (
                self._memory.new(port) for port in (self._port, Port((1, *self._port.shape), "float32"))
            )
            self._no_weight = self._memory.new(Port((1, self.lanes), "float32"))
        kept[lane, row], mixed[lane, row] = keep, share
        self._send(self._fresh[lane][row], noise)

    def draw(self, lane: int, row: int, noise: Draw) -> None:
        if self._noise is None:
            self._noise = self._memory.new(self._port)
        self._send(self._noise[lane][row], noise)

    def save(self, lane: int, row: int, store: CudaLatentStore, place: int, count: int) -> None:
        store.copy(store.flight[place : place + count], self._sample[lane][row : row + count])

    def recall(self, lane: int, row: int, store: CudaLatentStore, place: int, count: int) -> None:
        store.copy(self._remembers().recalled[lane][row : row + count], store.flight[place : place + count])

    def keep(self, lane: int, row: int, store: CudaLatentStore, place: int, count: int) -> None:
        store.copy(store.flight[place : place + count], self._remembers().kept[lane][row : row + count])

    def input(self, name: str) -> np.ndarray | None:
        given = self._executor.inputs(self._variant).get(name)
        if not isinstance(given, DeviceArray):
            return given
        self._changed[name] = self._memory.large(given)
        return self._changed[name].shadow

    def attach(self, lane: int, rings: Mapping[str, Any]) -> None:
        self._executor.attach(self._variant, lane, rings)

    def run(
        self,
        weights: np.ndarray | None = None,
        scales: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None,
        noise: bool = False,
        history: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None = None,
    ) -> None:
        for large in self._changed.values():
            large.send()
        self._changed.clear()
        if scales is not None:
            self._memory.host(self._weights)[...] = weights
            for array, values in zip(self._scales, scales, strict=True):
                self._memory.host(array)[...] = values
        if history is not None:
            for array, values in zip(self._remembers().scales, history, strict=False):
                self._memory.host(array)[...] = values
        tag = ("renoised " if self._renoised else "") + ("recache" if scales is None else "call")
        tag += "" if history is None else " with history"
        head = [self._renoising()] if self._renoised else []
        self._executor.launch(
            self._variant,
            f"{tag} with noise" if noise else tag,
            lambda: (head, [] if scales is None else self._updating(noise, history is not None)),
        )
        self._renoised = False

    def _renoising(self) -> Enqueue:
        """What the network sees of some rows, mixed with noise."""
        assert self._fresh is not None
        assert self._nothing is not None
        return self._executor.ops(self._variant.component).op(
            "denoise_step",
            self._sample,
            self._nothing,
            self._no_weight,
            *self._mixes,
            noise=self._fresh,
            out=self._sample,
        )

    def _updating(self, noise: bool, history: bool) -> list[Enqueue]:
        """Guidance and the sampler's update, and before it what a multistep solver keeps."""
        ops = self._executor.ops(self._variant.component)
        given = (self._sample, self._prediction, self._weights)
        work: list[Enqueue] = []
        more: dict[str, DeviceArray] = {}
        if history:
            own = self._remembers()
            recalled, sample, prediction, older, nothing = own.scales
            before = {"history": own.recalled, "history_scale": older}
            work.append(ops.op("denoise_step", *given, sample, prediction, nothing, **before, out=own.kept))
            more = {"history": own.recalled, "history_scale": recalled}
        fresh = self._noise if noise else None
        work.append(ops.op("denoise_step", *given, *self._scales, noise=fresh, **more, out=self._sample))
        return work

    def _remembers(self) -> _History:
        if self._history is None:
            numbers = Port((self.lanes, self._rows), "float32")
            scales = [self._memory.control(numbers) for _ in range(4)]
            recalled, kept = (self._memory.new(self._port) for _ in range(2))
            self._history = _History(recalled, kept, [*scales, self._memory.new(numbers)])
        return self._history

    def _send(self, target: DeviceArray, noise: Draw) -> None:
        self._staging.send(
            target.pointer, target.nbytes, lambda out: noise(out.view(np.float32).reshape(self._shape))
        )
