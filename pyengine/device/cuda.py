"""The CUDA runtime as the engine uses it: a dozen checked calls over cuda-python, or over libcudart itself.

    cuda = runtime()                       # BackendUnavailable, in one sentence, where there is no GPU or driver
    stream = cuda.stream()
    graph = stream.capture(enqueue_work)   # recorded once ...
    graph.launch(stream)                   # ... and replayed

cuda-python is used where it is installed. A machine with the CUDA toolkit or PyTorch alone has libcudart, whose
same functions `libcudart.py` calls. Errors of the GPU surface here as PlanError, at the latest when something waits.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from pyengine.errors import BackendUnavailable, PlanError

EXTRA = "pip install 'pyengine-video[cuda]'"
# Numbers of the CUDA runtime's flags and enums; they are part of its ABI.
NON_BLOCKING = 1  # a stream that never waits for the default stream
NO_TIMING = 2  # an event that is only waited for
NOT_READY = 600
# Members of enums, with the type that most versions of cuda-python want them in.
COPY = ("cudaMemcpyKind", 4)  # cudaMemcpyDefault: the direction follows from the pointers
THREAD_LOCAL = ("cudaStreamCaptureMode", 1)  # a capture that other threads' allocations do not break
COMPUTE_CAPABILITY = (("cudaDeviceAttr", 75), ("cudaDeviceAttr", 76))  # major, minor


@cache
def runtime() -> Runtime:
    """The runtime of this process on its first GPU (choose another with CUDA_VISIBLE_DEVICES)."""
    return Runtime(_api())


def _api() -> Any:
    """cuda-python's runtime module, or libcudart behind the same names."""
    try:
        from cuda.bindings import runtime as bindings

        return bindings
    except ImportError:
        from pyengine.device.libcudart import load

        library = load()
    if library is None:
        raise BackendUnavailable(f"device cuda needs the package cuda-python: {EXTRA}")
    return library


class Runtime:
    """Checked calls. Handles are plain integers, so that they go to any other library as they are."""

    def __init__(self, api: Any) -> None:
        self._api = api
        self._copy, self._thread_local = self._member(COPY), self._member(THREAD_LOCAL)
        try:
            (count,) = self.call("cudaGetDeviceCount")
        except PlanError as error:
            raise BackendUnavailable(
                f"device cuda needs an NVIDIA GPU and its driver, but here {error}; use backend openvino, or "
                "install the driver"
            ) from error
        if count == 0:
            raise BackendUnavailable(
                "device cuda needs an NVIDIA GPU but this machine shows none; use backend openvino, or look at "
                "CUDA_VISIBLE_DEVICES"
            )
        self.call("cudaSetDevice", 0)
        major, minor = (
            self.call("cudaDeviceGetAttribute", self._member(which), 0)[0] for which in COMPUTE_CAPABILITY
        )
        self.capability = f"sm{major}{minor}"
        name = self.call("cudaGetDeviceProperties", 0)[0].name
        self.name = name.decode(errors="replace").rstrip("\0") if isinstance(name, bytes) else str(name)

    def call(self, function: str, *arguments: Any) -> tuple[Any, ...]:
        """Calls a function and returns what follows its error code. Raises PlanError for any error."""
        try:
            error, *values = getattr(self._api, function)(*arguments)
        except RuntimeError as missing:  # cuda-python 12.8 where the driver's library is not installed
            raise PlanError(f"[cuda] {function} failed: {missing}") from missing
        if int(error):
            raise PlanError(f"[cuda] {function} failed: {self._describe(error)}")
        return tuple(values)

    def versions(self) -> tuple[int, int]:
        """The versions of driver and runtime, as 13000 for 13.0."""
        return int(self.call("cudaDriverGetVersion")[0]), int(self.call("cudaRuntimeGetVersion")[0])

    def memory(self) -> tuple[int, int]:
        """Free and total bytes of the GPU."""
        free, total = self.call("cudaMemGetInfo")
        return int(free), int(total)

    def stream(self) -> Stream:
        return Stream(self)

    def event(self, *, timing: bool = False) -> Event:
        return Event(self, timing)

    def allocate(self, nbytes: int, *, pinned: bool = False) -> Allocation:
        """Device memory, or page-locked host memory that a GPU reads and writes while the host goes on."""
        return Allocation(self, nbytes, pinned)

    def copy(self, target: int, source: int, nbytes: int, stream: Stream) -> None:
        """Enqueues a copy between any two kinds of memory; host memory should be pinned."""
        self.call("cudaMemcpyAsync", target, source, nbytes, self._copy, stream.handle)

    def wait(self, stream: int, event: Event) -> None:
        """Makes a stream of another library wait for our event."""
        self.call("cudaStreamWaitEvent", stream, event.handle, 0)

    def zero(self, target: int, nbytes: int, stream: Stream) -> None:
        self.call("cudaMemsetAsync", target, 0, nbytes, stream.handle)

    def _member(self, member: tuple[str, int]) -> Any:
        """A member of an enum, of cuda-python's type; libcudart takes numbers."""
        enum, number = member
        return getattr(self._api, enum, int)(number)

    def _describe(self, error: Any) -> str:
        try:
            text = self._api.cudaGetErrorString(error)[1]
            return text.decode() if isinstance(text, bytes) else str(text)
        except Exception:
            return str(error)


class Allocation:
    """Owns a piece of memory: it is freed when the last array that points into it is gone."""

    def __init__(self, cuda: Runtime, nbytes: int, pinned: bool) -> None:
        allocate, free = ("cudaMallocHost", "cudaFreeHost") if pinned else ("cudaMalloc", "cudaFree")
        try:
            self.pointer = int(cuda.call(allocate, nbytes)[0])
        except PlanError as error:
            where = "page-locked host memory" if pinned else f"memory of {cuda.name}"
            raise PlanError(
                f"[cuda] expected {nbytes / 1e6:.0f} MB more {where} but could not get it ({error}); close other "
                "streams, or take a smaller window"
            ) from error
        self.nbytes = nbytes
        weakref.finalize(self, _quietly, cuda, free, self.pointer)


class Event:
    """A mark in a stream that others wait for."""

    def __init__(self, cuda: Runtime, timing: bool) -> None:
        self._cuda = cuda
        (handle,) = cuda.call("cudaEventCreateWithFlags", 0 if timing else NO_TIMING)
        self.handle = int(handle)
        weakref.finalize(self, _quietly, cuda, "cudaEventDestroy", self.handle)

    def record(self, stream: Stream) -> Event:
        self._cuda.call("cudaEventRecord", self.handle, stream.handle)
        return self

    def record_on(self, stream: int) -> Event:
        """The same in a stream of another library."""
        self._cuda.call("cudaEventRecord", self.handle, stream)
        return self

    def wait(self) -> None:
        """Blocks the caller until the work before the mark is done."""
        self._cuda.call("cudaEventSynchronize", self.handle)

    def done(self) -> bool:
        error = int(self._cuda._api.cudaEventQuery(self.handle)[0])
        if error not in (0, NOT_READY):
            raise PlanError(f"[cuda] the work before an event failed with error {error}")
        return error == 0

    def since(self, earlier: Event) -> float:
        """Seconds of the GPU between two marks that were made with timing."""
        return float(self._cuda.call("cudaEventElapsedTime", earlier.handle, self.handle)[0]) / 1e3


class Stream:
    """A queue of work on the GPU."""

    def __init__(self, cuda: Runtime) -> None:
        self.cuda = cuda
        (handle,) = cuda.call("cudaStreamCreateWithFlags", NON_BLOCKING)
        self.handle = int(handle)
        weakref.finalize(self, _quietly, cuda, "cudaStreamDestroy", self.handle)

    def wait_for(self, event: Event) -> None:
        """Lets what is enqueued from here on start after the event."""
        self.cuda.call("cudaStreamWaitEvent", self.handle, event.handle, 0)

    def synchronize(self) -> None:
        self.cuda.call("cudaStreamSynchronize", self.handle)

    def capture(self, enqueue: Callable[[], None]) -> CudaGraph:
        """Records what `enqueue` puts on this stream, without running it."""
        with _CAPTURING, _no_garbage_collection():
            self.cuda.call("cudaStreamBeginCapture", self.handle, self.cuda._thread_local)
            try:
                enqueue()
            except BaseException:
                self.cuda._api.cudaStreamEndCapture(self.handle)  # leaves the stream usable
                raise
            (graph,) = self.cuda.call("cudaStreamEndCapture", self.handle)
        return CudaGraph(self.cuda, graph)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Arrays of a closed stream, freed by chance in the middle of a capture, would break it: cudaFree is not allowed there."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


_CAPTURING = threading.Lock()  # one at a time: libraries allocate lazily on their first enqueue


class CudaGraph:
    """A recorded walk, instantiated once."""

    def __init__(self, cuda: Runtime, graph: Any) -> None:
        self._cuda = cuda
        (self._executable,) = cuda.call("cudaGraphInstantiate", graph, 0)
        cuda.call("cudaGraphDestroy", graph)
        weakref.finalize(self, _quietly, cuda, "cudaGraphExecDestroy", self._executable)

    def launch(self, stream: Stream) -> None:
        self._cuda.call("cudaGraphLaunch", self._executable, stream.handle)


def _quietly(cuda: Runtime, function: str, handle: Any) -> None:
    """Frees something when nobody is left to hear of an error; a driver that shuts down frees all anyway."""
    getattr(cuda._api, function)(handle)
