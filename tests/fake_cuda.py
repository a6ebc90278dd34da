"""A simulated GPU in host memory, to run the CUDA executor where there is none.

    FakeCuda          the functions of the CUDA runtime that the engine calls. Streams are queues whose work runs as late
                      as the rules of CUDA allow: when something waits for it. What reads memory too early, or writes
                      memory that enqueued work still needs, gives other frames than the CPU plan
    FakeKernels       `pyengine._cuda`: the CPU ops on the memory behind device pointers, enqueued
    FakeBackend       a backend whose engines are ONNX Runtime's CPU sessions on that memory, enqueued

It does not tell how a real GPU orders what is unordered: two streams without an event between them run here in one
of the possible orders, the laziest.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
from collections import deque
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from pyengine import _C
from pyengine.backends import onnxruntime
from pyengine.device.array import HOST_DTYPES, DeviceArray
from pyengine.runtime.cuda.memory import RingTable

OK, INVALID, CAPTURE_ERROR, NOT_READY = 0, 1, 900, 600
Work = Callable[[], object]


class MemcpyKind(Enum):
    cudaMemcpyDefault = 4


class DeviceAttr(Enum):
    cudaDevAttrComputeCapabilityMajor = 75
    cudaDevAttrComputeCapabilityMinor = 76


class CaptureMode(Enum):
    cudaStreamCaptureModeThreadLocal = 1


class _Event:
    """What must run before a mark: the stream and how many pieces of work it had been given."""

    def __init__(self) -> None:
        self.stream: _Stream | None = None
        self.position = 0


class _Stream:
    def __init__(self, gpu: FakeCuda) -> None:
        self._gpu = gpu
        self.queue: deque[Work] = deque()
        self.enqueued = self.done = 0
        self.recording: list[Work] | None = None
        self.broken = False  # the recording

    def add(self, work: Work) -> None:
        if self.recording is not None:
            self.recording.append(work)
            return
        self.queue.append(work)
        self.enqueued += 1
        if self._gpu.eager:
            self.run_to(self.enqueued)

    def run_to(self, position: int) -> None:
        while self.done < position:
            self.done += 1
            self.queue.popleft()()


class FakeCuda:
    """cuda-python's runtime module: every function returns (error, results...). Safe to call from several threads.

    As in 12.8, 12.9.4, 13.0 and 13.1, a number in the place of an enum is an AttributeError.
    """

    cudaMemcpyKind, cudaDeviceAttr, cudaStreamCaptureMode = MemcpyKind, DeviceAttr, CaptureMode

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._handles = itertools.count(0x1000)
        self._memory: dict[int, np.ndarray] = {}
        self.pinned: dict[int, int] = {}
        self.eager = False  # as late as possible, else at once
        self.streams: dict[int, _Stream] = {1: _Stream(self)}  # 1: the default stream, of other libraries
        self._events: dict[int, _Event] = {}
        self._graphs: dict[int, list[Work]] = {}
        self.allocations = self.launches = self.graphs_made = 0
        # Bytes that left the GPU, and that the host waited for on their way there.
        self.to_host = self.from_pageable = 0
        self.capability = (9, 0)

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if not name.startswith("cuda") or isinstance(found, type):
            return found

        def locked(*arguments: Any) -> Any:
            with self.lock:
                return found(*arguments)

        return locked

    # Device
    def cudaGetDeviceCount(self) -> tuple[int, int]:
        return OK, 1

    def cudaSetDevice(self, device: int) -> tuple[int]:
        return (OK,)

    def cudaDeviceGetAttribute(self, which: DeviceAttr, device: int) -> tuple[int, int]:
        return OK, self.capability[which.value - 75]

    def cudaGetDeviceProperties(self, device: int) -> tuple[int, SimpleNamespace]:
        return OK, SimpleNamespace(name=b"Simulated GPU")

    def cudaGetErrorString(self, error: int) -> tuple[int, bytes]:
        return OK, f"fake error {error}".encode()

    def cudaDriverGetVersion(self) -> tuple[int, int]:
        return OK, 13000

    cudaRuntimeGetVersion = cudaDriverGetVersion

    def cudaMemGetInfo(self) -> tuple[int, int, int]:
        return OK, 1 << 30, 1 << 32

    # Memory, poisoned when new and when freed
    def cudaMalloc(self, nbytes: int) -> tuple[int, int]:
        if any(stream.recording is not None for stream in self.streams.values()):
            return CAPTURE_ERROR, 0
        raw = np.full(nbytes + 256, 0xA5, np.uint8)
        pointer = raw.ctypes.data + -raw.ctypes.data % 256
        self._memory[pointer] = raw
        self.allocations += 1
        return OK, pointer

    def cudaMallocHost(self, nbytes: int) -> tuple[int, int]:
        error, pointer = self.cudaMalloc(nbytes)
        self.pinned[pointer] = nbytes
        return error, pointer

    def cudaFree(self, pointer: int) -> tuple[int]:
        for stream in self.streams.values():
            if stream.recording is not None:
                stream.broken = True  # as the real one, which also refuses
                return (CAPTURE_ERROR,)
            stream.run_to(stream.enqueued)  # as the real one, it waits for the GPU
        self._memory.pop(pointer)[:] = 0x5A
        self.pinned.pop(pointer, None)
        return (OK,)

    cudaFreeHost = cudaFree

    def cudaMemcpyAsync(
        self, target: int, source: int, nbytes: int, kind: MemcpyKind, stream: int
    ) -> tuple[int]:
        assert kind.value == 4, "a direction that is not cudaMemcpyDefault"
        queue = self.streams[stream]
        pinned = any(start <= target < start + size for start, size in self.pinned.items())
        if pinned or not self._owned(target):
            self.to_host += nbytes
        if self._owned(source):
            queue.add(lambda: ctypes.memmove(target, source, nbytes))
        else:  # pageable: CUDA takes the bytes before it returns, and cannot do so in a capture
            if queue.recording is not None:
                return (CAPTURE_ERROR,)
            self.from_pageable += nbytes
            data = ctypes.string_at(source, nbytes)
            queue.add(lambda: ctypes.memmove(target, data, nbytes))
        return (OK,)

    def cudaMemsetAsync(self, target: int, value: int, nbytes: int, stream: int) -> tuple[int]:
        self.streams[stream].add(lambda: ctypes.memset(target, value, nbytes))
        return (OK,)

    # Streams and events
    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[int, int]:
        handle = next(self._handles)
        self.streams[handle] = _Stream(self)
        return OK, handle

    def cudaStreamDestroy(self, stream: int) -> tuple[int]:
        queue = self.streams.pop(stream)
        queue.run_to(queue.enqueued)
        return (OK,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[int]:
        queue = self.streams[stream]
        if queue.recording is not None:
            return (CAPTURE_ERROR,)
        queue.run_to(queue.enqueued)
        return (OK,)

    def cudaStreamWaitEvent(self, stream: int, event: int, flags: int) -> tuple[int]:
        mark, position = self._events[event].stream, self._events[event].position
        if mark is not None:
            self.streams[stream].add(lambda: mark.run_to(position))
        return (OK,)

    def cudaEventCreateWithFlags(self, flags: int) -> tuple[int, int]:
        handle = next(self._handles)
        self._events[handle] = _Event()
        return OK, handle

    def cudaEventDestroy(self, event: int) -> tuple[int]:
        del self._events[event]
        return (OK,)

    def cudaEventRecord(self, event: int, stream: int) -> tuple[int]:
        if stream not in self.streams:
            return (INVALID,)
        mark, queue = self._events[event], self.streams[stream]
        mark.stream, mark.position = queue, queue.enqueued
        return (OK,)

    def cudaEventQuery(self, event: int) -> tuple[int]:
        mark = self._events[event]
        return (OK if mark.stream is None or mark.stream.done >= mark.position else NOT_READY,)

    def cudaEventSynchronize(self, event: int) -> tuple[int]:
        mark = self._events[event]
        if mark.stream is not None:
            mark.stream.run_to(mark.position)
        return (OK,)

    def cudaEventElapsedTime(self, start: int, end: int) -> tuple[int, float]:
        return OK, 1.0

    # Graphs
    def cudaStreamBeginCapture(self, stream: int, mode: CaptureMode) -> tuple[int]:
        assert mode.value == 1, "a capture that another thread's allocation breaks"
        self.streams[stream].recording = []
        return (OK,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[int, int]:
        queue = self.streams[stream]
        assert queue.recording is not None
        if queue.broken:
            queue.recording, queue.broken = None, False
            return CAPTURE_ERROR, 0
        handle = next(self._handles)
        self._graphs[handle], queue.recording = queue.recording, None
        return OK, handle

    def cudaGraphInstantiate(self, graph: int, flags: int) -> tuple[int, int]:
        handle = next(self._handles)
        self._graphs[handle] = list(self._graphs[graph])
        self.graphs_made += 1
        return OK, handle

    def cudaGraphDestroy(self, graph: int) -> tuple[int]:
        del self._graphs[graph]
        return (OK,)

    cudaGraphExecDestroy = cudaGraphDestroy

    def cudaGraphLaunch(self, graph: int, stream: int) -> tuple[int]:
        works = self._graphs[graph]
        self.streams[stream].add(lambda: [work() for work in works])
        self.launches += 1
        return (OK,)

    def _owned(self, pointer: int) -> bool:
        return any(start <= pointer < start + len(raw) for start, raw in self._memory.items())


def on_host(array: Any) -> np.ndarray:
    """The memory behind a fake device array, as numpy."""
    raw = (ctypes.c_uint8 * array.nbytes).from_address(array.pointer)
    return np.frombuffer(raw, np.uint8).view(HOST_DTYPES[array.dtype]).reshape(array.shape)


class FakeKernels(ModuleType):
    """`pyengine._cuda` on the CPU."""

    def __init__(self, cuda: FakeCuda) -> None:
        super().__init__("pyengine._cuda")
        self._cuda = cuda

    def device_count(self) -> int:
        return 1

    def frame_window_attention_workspace(self, **arrays: Any) -> int:
        return 128

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name not in _C.SIGNATURES:
            raise AttributeError(name)
        return lambda *inputs, stream, **named: self._enqueue(name, stream, inputs, named)

    def _enqueue(self, name: str, stream: int, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Scratch and scales of 8-bit rings are a device's alone. A table of rings is read when its turn comes."""
        named.pop("workspace", None)

        def work() -> None:
            run(*map(host, inputs), **{key: host(value) for key, value in named.items()})

        run = getattr(_C, name)
        with self._cuda.lock:
            self._cuda.streams[stream].add(work)


def host(value: Any) -> Any:
    """What an op of `_C` takes for what one of `_cuda` is given."""
    if isinstance(value, RingTable):
        return [on_host(SimpleNamespace(pointer=int(base), shape=value.shape, dtype=value.dtype, nbytes=value[0].nbytes))
                for base in on_host(value.bases)]  # fmt: skip
    return on_host(value) if isinstance(value, DeviceArray) else value


class FakeEngine:
    """An ONNX Runtime session that runs on the memory behind device arrays when its turn comes."""

    arena_bytes = 512
    stream = None
    capturable = True

    def __init__(self, cuda: FakeCuda, inner: onnxruntime.ONNXRuntimeEngine) -> None:
        self._cuda, self._inner = cuda, inner
        self._runs = 0

    def bind(self, inputs: Any, outputs: Any, stream: Any, arena: DeviceArray) -> Callable[[], None]:
        assert arena.nbytes >= self.arena_bytes
        run = self._inner.bind(
            *({name: on_host(v) for name, v in ports.items()} for ports in (inputs, outputs))
        )
        scratch = on_host(arena)

        def work() -> None:
            scratch[:] = 0xEE  # engines of one component share it, so nothing may live there between them
            run()

        def call() -> None:
            queue = self._cuda.streams[stream.handle]
            if queue.recording is not None and not self._runs:
                raise AssertionError("an engine must have run once before it is captured")
            self._runs += 1
            with self._cuda.lock:
                queue.add(work)

        return call


class FakeBackend:
    """Builds like ONNX Runtime on the CPU, in float32, for a GPU."""

    name, version, kind = "tensorrt", "fake", "cuda"
    device = "sm90"
    remote = False

    def __init__(self, cuda: FakeCuda) -> None:
        self._cuda = cuda
        self._inner = onnxruntime.backend()

    def precision(self, wanted: str) -> str:
        return "fp32"

    def prepare(self, cache: Path, report: Any) -> None:
        pass

    def facts(self) -> dict[str, Any]:
        return {}

    def compile(self, *arguments: Any) -> FakeEngine:
        return FakeEngine(self._cuda, self._inner.compile(*arguments))

    def save(self, engine: FakeEngine, path: Path) -> bool:
        return False

    def load(self, path: Path, precision: Any, threads: Any) -> FakeEngine:
        raise NotImplementedError


def install(monkeypatch: Any) -> FakeCuda:
    """Makes this process believe in a GPU: runtime, kernels, and the backend `tensorrt`."""
    import sys

    import pyengine
    from pyengine.device import cuda as runtime

    cuda = FakeCuda()
    monkeypatch.setattr(runtime, "_api", lambda: cuda)
    runtime.runtime.cache_clear()
    kernels = FakeKernels(cuda)
    monkeypatch.setitem(sys.modules, "pyengine._cuda", kernels)
    monkeypatch.setattr(pyengine, "_cuda", kernels, raising=False)
    backend = SimpleNamespace(backend=lambda **options: FakeBackend(cuda))
    monkeypatch.setitem(sys.modules, "pyengine.backends.tensorrt", backend)
    return cuda
