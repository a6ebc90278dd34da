"""The whole engine on the emulated GPU: the executor's graphs, streams and buffers around the kernels' own source,
called through the real binding. Segments are ONNX Runtime's, in float32 and in float16.
"""

from __future__ import annotations

import gc
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import fake_cuda
import numpy as np
import pytest
from cuda_arrays import CudaOps

import pyengine
from pyengine import _C
from pyengine.backends import onnxruntime_cuda
from pyengine.bundle.bundle import BUNDLED, MANIFEST
from pyengine.device import cuda as runtime
from pyengine.errors import ConfigError

pytestmark = pytest.mark.slow

PROMPT = "a red circle bounces over a blue background"
# The window fills, is full, and its first frames enter the ring.
METHOD = {"steps": 4, "cadence": 2, "context": {"kind": "ring", "sink_frames": 0, "recent_frames": 4}}
FRAMES = 16


class EmulatedKernels(ModuleType):
    """`pyengine._cuda` whose calls wait for their turn in a fake stream."""

    def __init__(self, gpu: fake_cuda.FakeCuda, module: ModuleType) -> None:
        super().__init__("pyengine._cuda")
        self._gpu, self._module = gpu, module
        self.calls: list[str] = []
        self.frame_window_attention_workspace = module.frame_window_attention_workspace

    def _queued(self, name: str) -> Callable[..., None]:
        def call(*arrays: Any, stream: int, **named: Any) -> None:
            self.calls.append(name)
            self._gpu.streams[stream].add(lambda: getattr(self._module, name)(*arrays, **named))

        return call

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name not in _C.SIGNATURES:
            raise AttributeError(name)
        return self._queued(name)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle") / "shapes"
    shutil.copytree(BUNDLED / "shapes", folder)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["method"] |= METHOD
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


@pytest.fixture
def kernels(emulated_ops: CudaOps, monkeypatch: pytest.MonkeyPatch) -> Iterator[EmulatedKernels]:
    gpu = fake_cuda.install(monkeypatch)
    gpu.eager = True  # ONNX Runtime's CPU provider runs in its call, not in the order of a stream
    kernels = EmulatedKernels(gpu, emulated_ops.module)
    monkeypatch.setitem(sys.modules, "pyengine._cuda", kernels)
    monkeypatch.setattr(pyengine, "_cuda", kernels, raising=False)
    monkeypatch.setattr(onnxruntime_cuda, "PROVIDER", "CPUExecutionProvider")
    monkeypatch.setattr(onnxruntime_cuda, "DEVICE", "cpu")
    onnxruntime_cuda.backend.cache_clear()
    yield kernels
    gc.collect()
    onnxruntime_cuda.backend.cache_clear()
    runtime.runtime.cache_clear()


def frames(bundle: Path, cache: Path, **options: Any) -> np.ndarray:
    engine = pyengine.load(bundle, choice="cut", cache_dir=cache, **options)
    with engine.stream(PROMPT, seed=3, frames=FRAMES) as stream:
        made = np.stack([np.asarray(frame) for frame in stream])
    engine.close()
    return made


@pytest.fixture(scope="module")
def exact(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    return frames(bundle, tmp_path_factory.mktemp("cpu"), backend="onnxruntime")


# Mean error in levels of 255. Measured: 0.00002, 0.031, and 0.045 with keys and values of the context in 8 bits.
@pytest.mark.parametrize(
    ("precision", "ring", "levels"), [("fp32", "auto", 0.01), ("fp16", "auto", 0.1), ("fp16", "fp8", 0.15)]
)
def test_streams_through_the_kernels_are_those_of_the_cpu(
    bundle: Path,
    exact: np.ndarray,
    kernels: EmulatedKernels,
    tmp_path: Path,
    precision: str,
    ring: str,
    levels: float,
) -> None:
    got = frames(bundle, tmp_path, backend="onnxruntime", device="cuda", precision=precision, ring=ring)
    assert set(kernels.calls) == {"frame_window_attention", "denoise_step"}
    error = np.abs(got.astype(np.float64) - exact).mean()
    print("error", error)
    assert error < levels


def test_a_ring_of_8_bits_needs_our_kernels_on_device_cuda(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"a ring in fp8 needs device cuda and our kernels .* but got device cpu"
    ):
        pyengine.load(bundle, backend="onnxruntime", ring="fp8", cache_dir=tmp_path)
    with pytest.raises(ConfigError, match=r"\[ring\] expected one of auto, fp8 but got 'int4'"):
        pyengine.load(bundle, backend="onnxruntime", ring="int4", cache_dir=tmp_path)
