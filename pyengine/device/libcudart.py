"""The functions of libcudart that `runtime.py` calls, under the names and return values of cuda-python.

For machines that have the library, of the CUDA toolkit or of PyTorch, but not the package.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import sys
from collections.abc import Iterator
from ctypes import POINTER, byref, c_char_p, c_float, c_int, c_size_t, c_uint, c_ulonglong, c_void_p
from pathlib import Path
from types import SimpleNamespace
from typing import Any

NAMES = ("libcudart.so.13", "libcudart.so.12", "libcudart.so")
PROPERTIES_BYTES = 8192  # more than cudaDeviceProp has in any version; its first 256 bytes are the name
_POINTERS = POINTER(c_void_p)

# function -> (types of its results, which come first and by pointer; types of its arguments)
FUNCTIONS: dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]] = {
    "cudaGetDeviceCount": ((c_int,), ()),
    "cudaSetDevice": ((), (c_int,)),
    "cudaDeviceGetAttribute": ((c_int,), (c_int, c_int)),
    "cudaDriverGetVersion": ((c_int,), ()),
    "cudaRuntimeGetVersion": ((c_int,), ()),
    "cudaMemGetInfo": ((c_size_t, c_size_t), ()),
    "cudaMalloc": ((c_void_p,), (c_size_t,)),
    "cudaMallocHost": ((c_void_p,), (c_size_t,)),
    "cudaFree": ((), (c_void_p,)),
    "cudaFreeHost": ((), (c_void_p,)),
    "cudaMemcpyAsync": ((), (c_void_p, c_void_p, c_size_t, c_int, c_void_p)),
    "cudaMemsetAsync": ((), (c_void_p, c_int, c_size_t, c_void_p)),
    "cudaStreamCreateWithFlags": ((c_void_p,), (c_uint,)),
    "cudaStreamDestroy": ((), (c_void_p,)),
    "cudaStreamSynchronize": ((), (c_void_p,)),
    "cudaStreamWaitEvent": ((), (c_void_p, c_void_p, c_uint)),
    "cudaStreamBeginCapture": ((), (c_void_p, c_int)),
    "cudaEventCreateWithFlags": ((c_void_p,), (c_uint,)),
    "cudaEventDestroy": ((), (c_void_p,)),
    "cudaEventRecord": ((), (c_void_p, c_void_p)),
    "cudaEventQuery": ((), (c_void_p,)),
    "cudaEventSynchronize": ((), (c_void_p,)),
    "cudaEventElapsedTime": ((c_float,), (c_void_p, c_void_p)),
    "cudaGraphInstantiate": ((c_void_p,), (c_void_p, c_ulonglong)),
    "cudaGraphDestroy": ((), (c_void_p,)),
    "cudaGraphExecDestroy": ((), (c_void_p,)),
    "cudaGraphLaunch": ((), (c_void_p, c_void_p)),
}


def load() -> SimpleNamespace | None:
    """The functions, or None where no libcudart is found."""
    for path in _candidates():
        try:
            library = ctypes.CDLL(str(path))
        except OSError:
            continue
        return _bound(library)
    return None


def _candidates() -> Iterator[str | Path]:
    yield from NAMES
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    yield Path(home) / "lib64" / "libcudart.so"
    for folder in map(Path, sys.path):  # wheels that PyTorch brings along
        yield from sorted(folder.glob("nvidia/*/lib/libcudart.so*"), reverse=True)


def _bound(library: ctypes.CDLL) -> SimpleNamespace:
    functions: dict[str, Any] = {
        name: _function(library, name, results, arguments) for name, (results, arguments) in FUNCTIONS.items()
    }
    library.cudaGetErrorString.restype = c_char_p
    library.cudaStreamEndCapture.argtypes = (c_void_p, _POINTERS)

    def end_capture(stream: int) -> tuple[int, int | None]:
        graph = c_void_p()
        return library.cudaStreamEndCapture(stream, byref(graph)), graph.value

    def properties(device: int) -> tuple[int, SimpleNamespace]:
        raw = ctypes.create_string_buffer(PROPERTIES_BYTES)
        error = library.cudaGetDeviceProperties(raw, device)
        return error, SimpleNamespace(name=raw.raw[:256].split(b"\0")[0])

    functions["cudaGetErrorString"] = lambda error: (0, library.cudaGetErrorString(error))
    functions["cudaStreamEndCapture"] = end_capture
    functions["cudaGetDeviceProperties"] = properties
    return SimpleNamespace(**functions)


def _function(library: ctypes.CDLL, name: str, results: tuple[Any, ...], arguments: tuple[Any, ...]) -> Any:
    function = getattr(library, name)
    function.argtypes = (*(POINTER(kind) for kind in results), *arguments)

    def call(*values: Any) -> tuple[Any, ...]:
        made = [kind() for kind in results]
        error = function(*map(byref, made), *values)
        return (error, *(result.value for result in made))

    return call
