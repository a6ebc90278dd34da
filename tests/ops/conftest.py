from __future__ import annotations

from collections.abc import Iterator

import cuda_build
import pytest
import torch
from cuda_arrays import CudaOps

from pyengine import _C


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What runs on the emulator is slow: compiling it takes 20 seconds."""
    for item in items:
        if "emulated_ops" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(params=_C.supported_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set that this CPU can run, chosen for the length of one test."""
    _C.set_cpu_isa(request.param)
    yield request.param
    _C.set_cpu_isa("auto")


@pytest.fixture(scope="session")
def emulated_ops(tmp_path_factory: pytest.TempPathFactory) -> CudaOps:
    """The CUDA module on the emulator: the kernels' own source, run by this CPU."""
    made = cuda_build.build(tmp_path_factory.mktemp("cuda_emulated"))
    if isinstance(made, str):
        pytest.skip(f"cannot build the CUDA emulator: {made}")
    return CudaOps(made, "cpu")


@pytest.fixture(params=[pytest.param("emulated", marks=pytest.mark.slow), "gpu"])
def cuda_ops(request: pytest.FixtureRequest) -> CudaOps:
    """The CUDA module on the emulator, and on a GPU where there is one that it was built for."""
    if request.param == "emulated":
        return request.getfixturevalue("emulated_ops")
    module = pytest.importorskip("pyengine._cuda", reason="pyengine was built without CUDA")
    if not torch.cuda.is_available() or not module.device_count():
        pytest.skip("no GPU, or a PyTorch without CUDA")
    return CudaOps(module, "cuda")
