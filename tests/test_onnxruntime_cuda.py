"""The CUDA provider's backend with the CPU provider in its place, on a simulated GPU in host memory that runs work at once."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import fake_cuda
import numpy as np
import pytest
import toy_family as toy

from pyengine.backends import onnxruntime_cuda
from pyengine.build.builder import build
from pyengine.device import cuda as runtime
from pyengine.errors import ConfigError, PlanError
from pyengine.runtime.executor import Executor
from pyengine.runtime.open import load_program


@pytest.fixture(autouse=True)
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[fake_cuda.FakeCuda]:
    gpu = fake_cuda.install(monkeypatch)
    gpu.eager = True  # the CPU provider runs in its call, not in the order of a stream
    monkeypatch.setattr(onnxruntime_cuda, "PROVIDER", "CPUExecutionProvider")
    monkeypatch.setattr(onnxruntime_cuda, "DEVICE", "cpu")
    onnxruntime_cuda.backend.cache_clear()
    yield gpu
    gc.collect()
    onnxruntime_cuda.backend.cache_clear()
    runtime.runtime.cache_clear()


def run(executor: Executor) -> dict[str, np.ndarray]:
    for name, array in toy.numpy_inputs("denoiser").items():
        if not name.startswith("ring_") or name == "ring_index":
            target = executor.input(toy.DENOISER, name)
            dtype = np.dtype(getattr(target, "host_dtype", target.dtype))
            target[...] = array.astype(dtype)
    executor.input(toy.DENOISER, "append_slot")[...] = [-1, 2, -1, 0]
    for _ in range(3):
        executor.run(toy.DENOISER)
    return executor.state() | {"prediction": executor.output(toy.DENOISER, "prediction").copy()}


@pytest.mark.parametrize("choice", ["cut", "inline"])
def test_float32_equals_the_cpu(tmp_path: Path, choice: str) -> None:
    seen = []
    for device in ("cuda", "cpu"):
        made = build(
            toy.bundle(),
            variants=[toy.DENOISER],
            backend="onnxruntime",
            device=device,
            precision="fp32",
            choice=choice,
            cache_dir=tmp_path,
        )
        assert made.device == device
        executor = load_program(made).executor()
        seen.append(run(executor))
        executor.close()
    assert seen[0].keys() == seen[1].keys()
    for name, array in seen[0].items():
        assert np.allclose(array, seen[1][name], rtol=1e-5, atol=1e-6), name


def test_auto_is_fp16_and_crossing_tensors_are_too(tmp_path: Path) -> None:
    made = build(
        toy.bundle(),
        variants=[toy.DENOISER],
        backend="onnxruntime",
        device="cuda",
        choice="inline",
        cache_dir=tmp_path,
    )
    assert made.precision == "fp16"
    executor = load_program(made).executor()
    ring = executor.rings["ring_key.0"].copy()
    assert ring.dtype == np.float16
    executor.close()


def test_bf16_is_refused_with_where_to_go() -> None:
    with pytest.raises(ConfigError, match="precision fp16 or fp32 but got 'bf16'; bf16 needs tensorrt"):
        onnxruntime_cuda.backend().precision("bf16")


def test_a_session_stays_on_its_stream(tmp_path: Path) -> None:
    made = build(
        toy.bundle(),
        variants=[toy.TEXT_ENCODER],
        backend="onnxruntime",
        device="cuda",
        precision="fp32",
        cache_dir=tmp_path,
    )
    engine = made.engines(toy.TEXT_ENCODER)[0]
    executor = load_program(made).executor()
    assert executor.stream("text_encoder").handle == engine.stream.handle  # type: ignore[attr-defined]
    with pytest.raises(PlanError, match="expected the stream that the session was made for"):
        engine.bind({}, {}, runtime.runtime().stream(), None)  # type: ignore[call-arg]
