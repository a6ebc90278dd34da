"""Networks on a GPU (benchmarks/gpu/network.py) and segments run by PyTorch there, as far as they can be run without one."""

from __future__ import annotations

import copy
import dataclasses
import gc
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_cuda
import numpy as np
import onnxruntime as ort
import pytest
import torch

from pyengine.backends.typed_graph import typed_graph
from pyengine.build.variants import all_variants
from pyengine.bundle.bundle import Bundle
from pyengine.device import cuda as runtime
from pyengine.plans import plan
from pyengine.plans.plan import Plan

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "gpu"))
import network
import opensora
import opensora_case
import torch_segments
import wide
import wide_case

pytestmark = pytest.mark.slow

SHAPES = Bundle.load("shapes")
ROOF = {"matrix_bf16_per_second": 1e12, "copy_bytes_per_second": 1e11}


@pytest.mark.parametrize("variant", all_variants(SHAPES), ids=str)
def test_segments_by_torch_are_those_of_onnxruntime(variant: plan.Variant) -> None:
    compare_segments(SHAPES, variant)


def compare_segments(bundle: Bundle, variant: plan.Variant) -> None:
    component = bundle.component(variant.component)
    choices: list[Any] = ["inline"] if component.cut is None else ["cut", "inline"]
    rng = np.random.default_rng(0)
    for choice in choices:
        specs, target = plan.specs(component, choice), Plan(bundle, "torch", "fp32", None, {})
        for step in plan.graph(component, choice).steps:
            if step.kind != "segment":
                continue
            inputs, outputs = (
                {n: target.port(variant, specs[n]) for n in s} for s in (step.inputs, step.outputs)
            )
            model = typed_graph(bundle.path(str(step.file)), variant.symbols, inputs, outputs, "fp32")
            feeds: dict[str, np.ndarray] = {}
            for name, port in inputs.items():
                whole = port.array_dtype.kind in "iub"
                feeds[name] = (np.ones(port.shape) if whole else rng.uniform(0, 1, port.shape)).astype(
                    port.array_dtype
                )
            options = ort.SessionOptions()
            options.log_severity_level = 4
            session = ort.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
            exact = dict(zip(outputs, session.run(list(outputs), feeds), strict=True))
            got = torch_segments.Segment(model).run({n: torch.from_numpy(a) for n, a in feeds.items()})
            for name, want in exact.items():
                assert got[name].shape == want.shape
                bound = 1.01 if want.dtype == np.uint8 else 1e-4 * max(1.0, float(np.abs(want).max()))
                difference = np.abs(got[name].numpy().astype(np.float64) - want.astype(np.float64)).max()
                assert difference <= bound, (step.file, name, difference)


@pytest.fixture(scope="module")
def gpu() -> Iterator[None]:
    """Made of host memory."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        fake_cuda.install(monkeypatch)
        yield
        gc.collect()
    runtime.runtime.cache_clear()


@pytest.fixture
def once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WARM", "ROUNDS", "REPLAYS"):
        monkeypatch.setattr(network, name, 1)


@pytest.mark.usefixtures("gpu", "once")
def test_the_wide_model_on_a_gpu(tmp_path: Path) -> None:
    case = wide_case.Case.random(dataclasses.replace(wide_case.WideConfig(), width=64, depth=1), 3)
    with torch.no_grad():
        found = network.bench("tensorrt", wide.Wide(case), tmp_path, str(tmp_path / "plans"), ROOF, "cpu")
        eager = network.bench("torch_eager", wide.Wide(case), tmp_path, None, None, "cpu")
    assert found["good"]
    assert found["error"] < 1e-4  # the simulated GPU computes in float32
    assert 1e-4 < eager["error"] <= eager["allowed"]
    assert any(name.startswith("denoiser.branches2.frames3.ring5.streams1") for name in found["graphs"])
    assert found["of_roof"] == pytest.approx(found["bound_ms"] / found["ms"])
    assert found["of_matrix_rate"] == pytest.approx(found["operations"] / 1e9 / found["ms"])
    weights = sum(parameter.numel() for parameter in case.module.parameters())
    assert found["bytes"] == 2 * (weights + 2 * 1 * 2 * 5 * 105 * 64)
    assert (
        0.9
        < found["operations"] / flops(wide_case.TorchRunner(copy.deepcopy(case), None, dtype=torch.float32))
        < 1.1
    )
    assert not list(tmp_path.glob("tmp*"))  # nothing half written
    # Backends without bf16 are compared with PyTorch in fp16.
    with torch.no_grad():
        exact, half = (
            wide_case.TorchRunner(copy.deepcopy(case), None, dtype=dtype).velocity()
            for dtype in (torch.float32, torch.float16)
        )
    assert 1e-5 < wide_case.relative_error(half, exact) < 1e-2


@pytest.mark.usefixtures("gpu", "once")
def test_opensora_on_a_gpu(tmp_path: Path) -> None:
    model = opensora_case.random_model(1, hidden_size=64, num_heads=2)
    case = opensora_case.Case(model, (32, 48), words=5)
    with torch.no_grad():
        found = network.bench(
            "tensorrt", opensora.OpenSora(case), tmp_path, str(tmp_path / "plans"), ROOF, "cpu"
        )
        eager = network.bench("torch_eager", opensora.OpenSora(case), tmp_path, None, ROOF, "cpu")
    assert found["good"]
    assert found["error"] < 3e-4  # keys and values of the text were rounded to bf16
    assert 1e-4 < eager["error"] <= eager["allowed"]
    assert found["graphs"]
    assert (found["size"], found["depth"]) == ([32, 48], 1)
    assert 0.5 < found["operations"] / eager["operations"] < 1
    assert 0.7 < eager["operations"] / flops(opensora_case.TorchRunner(case, None)) < 1
    variant = plan.Variant.of("denoiser", branches=2, streams=1, frames=35)
    compare_segments(Bundle.load(tmp_path / "stdit3-32x48-1"), variant)


def flops(runner: wide_case.TorchRunner | opensora_case.TorchRunner) -> float:
    """Of the peer's products, counted by PyTorch; its attention over time computes what is masked as well."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    as_products = sdpa_kernel(SDPBackend.MATH)  # the fused form on a CPU is not counted
    with torch.no_grad(), as_products, FlopCounterMode(display=False) as counter:
        runner()
    return float(counter.get_total_flops())
