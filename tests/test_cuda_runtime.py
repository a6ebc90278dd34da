"""The calls of the CUDA runtime, without a GPU: through cuda-python where it is installed (`.ci/run` installs the oldest and the newest
version that the extras allow), and through a module that behaves as its strictest version does."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import fake_cuda
import pytest

from pyengine.device import cuda, libcudart
from pyengine.errors import BackendUnavailable, PlanError


def test_enums_are_passed_in_their_types() -> None:
    """Versions 12.8, 12.9.4, 13.0 and 13.1 take no plain numbers, and so does the simulated GPU."""
    gpu = fake_cuda.FakeCuda()
    with pytest.raises(AttributeError, match="'int' object has no attribute 'value'"):
        gpu.cudaDeviceGetAttribute(75, 0)
    runtime = cuda.Runtime(gpu)
    assert runtime.capability == "sm90"
    stream, source, target = runtime.stream(), runtime.allocate(64), runtime.allocate(64)
    runtime.zero(source.pointer, 64, stream)
    graph = stream.capture(lambda: runtime.copy(target.pointer, source.pointer, 64, stream))
    graph.launch(stream)
    stream.synchronize()
    assert not fake_cuda.on_host(
        SimpleNamespace(pointer=target.pointer, nbytes=64, shape=(64,), dtype="uint8")
    ).any()


def test_a_library_without_enums_gets_numbers() -> None:
    seen: list[Any] = []

    def attribute(which: int, device: int) -> tuple[int, int]:
        seen.append(which)
        return 0, which - 67

    library = SimpleNamespace(
        cudaGetDeviceCount=lambda: (0, 1),
        cudaSetDevice=lambda device: (0,),
        cudaDeviceGetAttribute=attribute,
        cudaGetDeviceProperties=lambda device: (0, SimpleNamespace(name=b"GPU\0")),
    )
    runtime = cuda.Runtime(library)
    assert (runtime.capability, runtime.name) == ("sm89", "GPU")
    assert seen == [75, 76]
    assert all(type(which) is int for which in seen)


def test_a_binding_that_raises_without_a_driver_is_one_sentence() -> None:
    """12.8 raises RuntimeError from every call where libcuda is not installed."""

    def missing(*arguments: Any) -> Any:
        raise RuntimeError("Failed to dlopen libcuda.so.1")

    bindings = SimpleNamespace(cudaGetDeviceCount=missing, cudaGetErrorString=missing)
    with pytest.raises(
        BackendUnavailable,
        match=r"needs an NVIDIA GPU and its driver, but here .*libcuda\.so\.1; use backend",
    ):
        cuda.Runtime(bindings)


def test_cuda_python_has_all_that_is_called() -> None:
    """Of the version that is installed: each function by name, each enum by number, and one sentence where there is no driver."""
    bindings = pytest.importorskip("cuda.bindings.runtime", reason="cuda-python is not installed")
    names = [*libcudart.FUNCTIONS, "cudaGetErrorString", "cudaStreamEndCapture", "cudaGetDeviceProperties"]
    assert not [name for name in names if not hasattr(bindings, name)]
    for enum, number in (cuda.COPY, cuda.THREAD_LOCAL, *cuda.COMPUTE_CAPABILITY):
        assert getattr(bindings, enum)(number).value == number
    assert hasattr(bindings.cudaDeviceProp, "name")
    try:
        runtime = cuda.Runtime(bindings)
    except BackendUnavailable as error:
        refused = str(error)
    else:
        assert runtime.capability.startswith("sm")
        return
    assert refused.startswith("device cuda needs an NVIDIA GPU")
    # What the module makes of the arguments comes before it looks for a driver.
    runtime = _bare(bindings)
    for function, arguments in _CALLS.items():
        with pytest.raises(PlanError, match=rf"\[cuda\] {function} failed"):
            runtime.call(function, *arguments(runtime))


_CALLS: dict[str, Any] = {
    "cudaDeviceGetAttribute": lambda cuda_: (cuda_._member(cuda.COMPUTE_CAPABILITY[0]), 0),
    "cudaMemcpyAsync": lambda cuda_: (0, 0, 0, cuda_._copy, 0),
    "cudaStreamCreateWithFlags": lambda cuda_: (cuda.NON_BLOCKING,),
    "cudaEventCreateWithFlags": lambda cuda_: (cuda.NO_TIMING,),
    "cudaStreamBeginCapture": lambda cuda_: (0, cuda_._thread_local),
    "cudaMalloc": lambda cuda_: (16,),
    "cudaMallocHost": lambda cuda_: (16,),
    "cudaMemsetAsync": lambda cuda_: (0, 0, 0, 0),
}


def _bare(bindings: Any) -> cuda.Runtime:
    """A runtime that has not looked for a GPU."""
    runtime = cuda.Runtime.__new__(cuda.Runtime)
    runtime._api = bindings
    runtime._copy, runtime._thread_local = runtime._member(cuda.COPY), runtime._member(cuda.THREAD_LOCAL)
    return runtime
