"""The memory of a component on a GPU, and how small things get there.

What the host writes before every call (levels, indices, slots, coefficients) lies in one block: one copy of a
few hundred bytes per run, from page-locked memory that is not touched again before the GPU has read it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from pyengine.backends.base import Port
from pyengine.device.array import DeviceArray, PinnedArray
from pyengine.device.cuda import Event, Stream
from pyengine.errors import PlanError
from pyengine.runtime.host.memory import Memory

ALIGNMENT = 256  # what engines want of an address
CONTROL_BYTES = 1 << 16  # room for what the host writes
SMALL_BYTES = 1 << 11  # inputs up to here are sent with every call
SMALL_AXES = 3  # and no more axes: [branches, streams, frames]
DEPTH = 4  # calls that the host may be ahead of the GPU
DTYPES = {"bf16": "bfloat16"}  # ports have numpy's names but for this one


class Staging:
    """Page-locked slots in turn, for what goes to the GPU while the host goes on."""

    def __init__(self, stream: Stream, nbytes: int) -> None:
        self._stream = stream
        self._slots = [PinnedArray(stream.cuda, nbytes) for _ in range(DEPTH)]
        self._read = [stream.cuda.event() for _ in range(DEPTH)]  # the GPU has read the slot
        self._used = [False] * DEPTH
        self._turn = 0

    def send(self, target: int, nbytes: int, write: Callable[[np.ndarray], object]) -> None:
        """`write` fills the bytes that go to `target`."""
        turn = self._turn
        if self._used[turn]:
            self._read[turn].wait()
        slot = self._slots[turn]
        write(slot.bytes[:nbytes])
        self._stream.cuda.copy(target, slot.pointer, nbytes, self._stream)
        self._read[turn].record(self._stream)
        self._used[turn] = True
        self._turn = (turn + 1) % DEPTH


class Large:
    """A large input and what the host has written of it. Variants that share the input share this too."""

    def __init__(self, array: DeviceArray, stream: Stream) -> None:
        self._array, self._staging = array, Staging(stream, array.nbytes)
        self.shadow = np.zeros(array.shape, array.host_dtype)

    def send(self) -> None:
        flat = self.shadow.reshape(-1).view(np.uint8)
        self._staging.send(self._array.pointer, self._array.nbytes, lambda out: np.copyto(out, flat))


class CudaMemory(Memory):
    """The memory of a component, with arrays on the GPU. Its stream orders all that touches them."""

    def __init__(self, stream: Stream) -> None:
        super().__init__()
        self.stream = stream
        self.arena: DeviceArray | None = None  # activations inside engines, which run one after the other
        self._workspace: DeviceArray | None = None
        self._control = DeviceArray.zeros((CONTROL_BYTES,), "uint8", stream)
        self._shadow = np.zeros(CONTROL_BYTES, np.uint8)  # what the host has written last
        self._used = 0
        self._staging = Staging(stream, CONTROL_BYTES)
        self._large: dict[int, Large] = {}
        self._nbytes += CONTROL_BYTES

    def named(self, name: str, port: Port) -> DeviceArray:
        place = (name, port.shape)
        if place not in self._named:
            # A number per frame, slot or word comes from the host before every call. Latents and planes, which have more axes, are
            # made on the GPU however small they are.
            listed = len(port.shape) <= SMALL_AXES and port.nbytes <= SMALL_BYTES
            self._named[place] = self.control(port) if listed else self.new(port)
        array: DeviceArray = self._named[place]
        return array

    def ring(self, name: str, port: Port, streams: int) -> RingTable:
        own = super().ring(name, port, streams)
        bases = self.control(Port((streams,), "int64"))
        return RingTable(own, bases, self.host(bases))

    def like(self, array: DeviceArray) -> DeviceArray:
        made = DeviceArray.zeros(array.shape, array.dtype, self.stream)
        self._nbytes += made.nbytes
        return made

    def control(self, port: Port) -> DeviceArray:
        """An array that the host writes through `host` and `upload` sends."""
        start = self._used
        if start + port.nbytes > CONTROL_BYTES:
            return self.new(port)
        self._used += -(-port.nbytes // ALIGNMENT) * ALIGNMENT
        return self.view(self._control[start : start + port.nbytes], port)

    def host(self, array: Any) -> Any:
        """numpy that is sent with the next run for a small input, the array itself for a large one."""
        start = array.pointer - self._control.pointer
        if not 0 <= start < CONTROL_BYTES:
            return array
        return self._shadow[start : start + array.nbytes].view(array.host_dtype).reshape(array.shape)

    def large(self, array: DeviceArray) -> Large:
        """An input that `host` gives as it is, with memory of the host from which it is sent."""
        if array.pointer not in self._large:
            self._large[array.pointer] = Large(array, self.stream)
        return self._large[array.pointer]

    def upload(self) -> None:
        """Sends what the host has written."""
        used = self._used
        if used:
            self._staging.send(self._control.pointer, used, lambda out: np.copyto(out, self._shadow[:used]))

    def host_dtype(self, array: Any) -> np.dtype:
        dtype: np.dtype = array.host_dtype
        return dtype

    def view(self, raw: Any, port: Port) -> DeviceArray:
        view: DeviceArray = raw.view(port.shape, DTYPES.get(port.dtype, port.dtype))
        return view

    def new(self, port: Port) -> DeviceArray:
        array = DeviceArray.zeros(port.shape, DTYPES.get(port.dtype, port.dtype), self.stream)
        self._nbytes += array.nbytes
        return array

    def workspace(self, nbytes: int) -> DeviceArray:
        """Bytes that an op may use while it runs; all ops of the component share them."""
        if self._workspace is None or self._workspace.nbytes < nbytes:
            self._workspace = self.new(Port((nbytes,), "uint8"))
        return self._workspace

    def reserve(self, nbytes: int) -> None:
        """Makes the arena at least so large. Before anything is bound to it."""
        if nbytes and (self.arena is None or self.arena.nbytes < nbytes):
            self._nbytes += nbytes - (self.arena.nbytes if self.arena else 0)
            self.arena = DeviceArray.zeros((nbytes,), "uint8", self.stream)


class RingTable(list[DeviceArray]):
    """The rings of the streams of a variant's calls, and `bases`, their addresses where kernels read them: what is put in with
    `table[stream] = ring` is sent with the next run.
    """

    def __init__(self, rings: list[DeviceArray], bases: DeviceArray, host: np.ndarray) -> None:
        super().__init__(rings)
        self.bases, self._host = bases, host
        self.shape, self.dtype = rings[0].shape, rings[0].dtype  # of each ring
        self._host[...] = [ring.pointer for ring in rings]

    def __setitem__(self, stream: Any, ring: Any) -> None:
        super().__setitem__(stream, ring)
        self._host[stream] = ring.pointer


class Pool:
    """Blocks that come back when their last view is gone: nothing is allocated in the steady state."""

    def __init__(self, stream: Stream, dtype: str) -> None:
        self._stream, self._dtype = stream, dtype
        self._free: dict[tuple[int, ...], list[_Block]] = {}

    def take(self, shape: tuple[int, ...]) -> DeviceArray:
        """An array whose `ready` the caller records once it has enqueued what fills it."""
        free = self._free.setdefault(shape, [])
        if free:
            block = free.pop()
            for event in block.read:
                self._stream.wait_for(event)
            block.read.clear()
        else:
            array = DeviceArray.zeros(shape, self._dtype, self._stream)
            block = _Block(array, self._stream.cuda.event(), [])
        lease = Lease(free, block)
        return DeviceArray(block.array.pointer, shape, self._dtype, self._stream, lease, block.ready)


@dataclass
class _Block:
    array: DeviceArray
    ready: Event
    read: list[Event]  # marks of what other streams were still reading when it came back


class Lease:
    """Owner of a pooled array: gives the block back when the views that hold it are gone."""

    def __init__(self, free: list[_Block], block: _Block) -> None:
        self._free, self._block = free, block
        self.readers: set[int] = set()  # streams of other libraries, noted when they took the array
        self.own_readers: set[Stream] = set()

    def __del__(self) -> None:
        cuda = self._block.array.cuda
        for reader in self.readers:
            with suppress(PlanError):  # its library has destroyed that stream
                self._block.read.append(cuda.event().record_on(reader))
        self._block.read += [cuda.event().record(reader) for reader in self.own_readers]
        self._free.append(self._block)
