"""DeviceArray: an array on a GPU that every other library reads where it lies.

with engine.stream(prompt, device_frames=True) as stream:
    for frame in stream:                    # DeviceArray uint8 [height, width, 3]
        image = torch.from_dlpack(frame)    # no copy; also cupy, jax, numba
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from pyengine.device import dlpack
from pyengine.errors import ShapeError

if TYPE_CHECKING:
    from pyengine.device.cuda import Event, Runtime, Stream

__all__ = ["DeviceArray", "PinnedArray", "joined"]

# Names of dtypes, and numpy's of the same size for copies on the host: bit patterns where numpy has no such type.
HOST_DTYPES = {
    "float32": "float32",
    "float16": "float16",
    "bfloat16": "uint16",
    "float8_e4m3": "uint8",
    "int64": "int64",
    "int32": "int32",
    "uint8": "uint8",
    "bool": "bool",
}
_NAMES = {host: name for name, host in HOST_DTYPES.items() if name not in ("bfloat16", "float8_e4m3")}


class DeviceArray:
    """C-contiguous memory on a GPU. Views share it, and it is freed when the last of them is gone.

    pointer  address on the GPU
    shape    ints
    dtype    a name out of HOST_DTYPES
    stream   the stream that its contents are made on, and that copies to and from it use
    ready    set where the contents are made by work under way: what a reader on another stream waits for
    """

    def __init__(
        self,
        pointer: int,
        shape: Sequence[int],
        dtype: str,
        stream: Stream,
        owner: object,
        ready: Event | None = None,
    ) -> None:
        self.pointer, self.shape, self.dtype = pointer, tuple(shape), dtype
        self.host_dtype = np.dtype(HOST_DTYPES[dtype])
        self.size = prod(self.shape)
        self.nbytes = self.size * self.host_dtype.itemsize
        self.stream, self.owner, self.ready = stream, owner, ready

    @classmethod
    def zeros(cls, shape: Sequence[int], dtype: str, stream: Stream) -> DeviceArray:
        """New memory, zeroed on the stream."""
        array = cls(0, shape, dtype, stream, None)
        # Never empty: a pointer of its own is what makes an array of no elements bindable.
        array.owner = memory = stream.cuda.allocate(max(array.nbytes, 1))
        array.pointer = memory.pointer
        stream.cuda.zero(array.pointer, array.nbytes, stream)
        return array

    @classmethod
    def of(cls, host: np.ndarray, stream: Stream) -> DeviceArray:
        """A copy of an array on the host; done on return."""
        array = cls.zeros(host.shape, _NAMES[str(host.dtype)], stream)
        array[...] = host
        return array

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[DeviceArray]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int | slice) -> DeviceArray:
        """A part along the first axis, as a view."""
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step != 1:
                raise ShapeError(f"[device_array] expected a slice without a step but got {index}")
            shape: tuple[int, ...] = (max(0, stop - start), *self.shape[1:])
        else:
            start, shape = range(len(self))[index], self.shape[1:]
        row = self.nbytes // max(1, len(self))
        return DeviceArray(self.pointer + start * row, shape, self.dtype, self.stream, self.owner, self.ready)

    def __setitem__(self, index: int | slice | Any, value: Any) -> None:
        """`array[...] = other` and `array[2:4] = other`: from the host (done on return), another array on the GPU
        (enqueued), or 0 (enqueued).
        """
        part = self if index is Ellipsis else self[index]
        if isinstance(value, DeviceArray):
            part._check(value.shape, value.host_dtype)
            part.stream.cuda.copy(part.pointer, value.pointer, part.nbytes, part.stream)
        elif np.isscalar(value) and value == 0:
            part.stream.cuda.zero(part.pointer, part.nbytes, part.stream)
        else:
            host = np.ascontiguousarray(value)
            part._check(host.shape, host.dtype)
            part.stream.cuda.copy(part.pointer, host.ctypes.data, part.nbytes, part.stream)
            part.stream.synchronize()  # the caller may change its array from here on

    def view(self, shape: Sequence[int], dtype: str) -> DeviceArray:
        """The first bytes as another shape and dtype."""
        view = DeviceArray(self.pointer, shape, dtype, self.stream, self.owner, self.ready)
        if view.nbytes > self.nbytes:
            raise ShapeError(
                f"[device_array] expected at most {self.nbytes} bytes but a view has {view.nbytes}"
            )
        return view

    def numpy(self) -> np.ndarray:
        """A copy on the host; waits for it. bfloat16 comes as uint16 bit patterns."""
        host = np.empty(self.shape, self.host_dtype)
        if self.ready is not None:
            self.ready.wait()
        self.stream.cuda.copy(host.ctypes.data, self.pointer, self.nbytes, self.stream)
        self.stream.synchronize()
        return host

    copy = numpy  # what reads a numpy array with .copy() reads this one alike

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("an array on the GPU cannot become numpy without a copy")
        return self.numpy() if dtype is None else self.numpy().astype(dtype)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """Version 3: the reader makes its own stream wait for ours."""
        if self.dtype in ("bfloat16", "float8_e4m3"):
            raise AttributeError(f"{self.dtype} has no type string in the CUDA array interface; use DLPack")
        return {
            "version": 3,
            "shape": self.shape,
            "typestr": self.host_dtype.str,
            "data": (self.pointer, False),
            "strides": None,
            "stream": self.stream.handle,
        }

    def __dlpack_device__(self) -> tuple[int, int]:
        return dlpack.CUDA, 0

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        """A capsule for `from_dlpack`. Work that the reader enqueues on `stream` starts after ours."""
        if copy or (dl_device is not None and dl_device != self.__dlpack_device__()):
            raise BufferError("[device_array] expected a reader on the same GPU that shares the memory")
        if stream != -1:  # -1: the reader synchronises by itself
            reader = stream or 1  # the default stream, where None is given
            self.cuda.wait(reader, self.ready or self.cuda.event().record(self.stream))
            if hasattr(self.owner, "readers"):
                self.owner.readers.add(reader)  # a pooled array is not written again before it is done
        return dlpack.capsule(self.pointer, self.shape, self.dtype, self.__dlpack_device__(), self)

    @property
    def cuda(self) -> Runtime:
        return self.stream.cuda

    def __repr__(self) -> str:
        return f"DeviceArray({list(self.shape)}, {self.dtype}, {self.cuda.name})"

    def _check(self, shape: Sequence[int], dtype: np.dtype) -> None:
        if tuple(shape) != self.shape or dtype != self.host_dtype:
            raise ShapeError(
                f"[device_array] expected {self.host_dtype} {list(self.shape)} but got {dtype} {list(shape)}"
            )


class PinnedArray:
    """Page-locked host memory as numpy arrays, which the GPU reads and writes while the host goes on."""

    def __init__(self, cuda: Runtime, nbytes: int) -> None:
        import ctypes

        self._memory = cuda.allocate(max(nbytes, 1), pinned=True)
        self.pointer = self._memory.pointer
        memory = (ctypes.c_uint8 * nbytes).from_address(self.pointer)
        self.bytes: np.ndarray = np.ctypeslib.as_array(memory)

    def array(self, shape: Sequence[int], dtype: str | np.dtype, offset: int = 0) -> np.ndarray:
        """A view; this object must outlive it."""
        size = prod(shape) * np.dtype(dtype).itemsize
        return self.bytes[offset : offset + size].view(dtype).reshape(shape)


def joined(frames: Sequence[np.ndarray | DeviceArray]) -> np.ndarray | DeviceArray:
    """Frames that lie one behind the other in one array, as one array again; numpy frames are copied."""
    first = frames[0]
    if not isinstance(first, DeviceArray):
        return np.stack([np.asarray(frame) for frame in frames])
    shape = (len(frames), *first.shape)
    return DeviceArray(first.pointer, shape, first.dtype, first.stream, first.owner, first.ready)
