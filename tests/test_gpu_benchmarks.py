"""What runs on machines with a GPU (benchmarks/gpu), as far as it can be run without one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch

from pyengine import plan
from pyengine.backends.typed_graph import typed_graph
from pyengine.bundle import Bundle
from pyengine.plan import Plan
from pyengine.variants import all_variants

GPU = Path(__file__).parents[1] / "benchmarks" / "gpu"
sys.path.insert(0, str(GPU))
import torch_segments  # noqa: E402

SHAPES = Bundle.load("shapes")


@pytest.mark.parametrize("variant", all_variants(SHAPES), ids=str)
def test_segments_by_torch_are_those_of_onnxruntime(variant: plan.Variant) -> None:
    component = SHAPES.component(variant.component)
    choices: list[Any] = ["inline"] if component.cut is None else ["cut", "inline"]
    rng = np.random.default_rng(0)
    for choice in choices:
        specs, target = plan.specs(component, choice), Plan(SHAPES, "torch", "fp32", None, {})
        for step in plan.graph(component, choice).steps:
            if step.kind != "segment":
                continue
            inputs, outputs = ({n: target.port(variant, specs[n]) for n in s} for s in (step.inputs, step.outputs))
            model = typed_graph(SHAPES.path(str(step.file)), variant.symbols, inputs, outputs, "fp32")
            feeds: dict[str, np.ndarray] = {}
            for name, port in inputs.items():
                whole = np.issubdtype(port.array_dtype, np.integer) or port.array_dtype == bool
                feeds[name] = (np.ones(port.shape) if whole else rng.uniform(0, 1, port.shape)).astype(port.array_dtype)
            options = ort.SessionOptions()
            options.log_severity_level = 4
            session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
            exact = dict(zip(outputs, session.run(list(outputs), feeds), strict=True))
            got = torch_segments.Segment(model).run({n: torch.from_numpy(a) for n, a in feeds.items()})
            for name, want in exact.items():
                assert got[name].shape == want.shape
                bound = 1.01 if want.dtype == np.uint8 else 1e-4 * max(1.0, float(np.abs(want).max()))
                difference = np.abs(got[name].numpy().astype(np.float64) - want.astype(np.float64)).max()
                assert difference <= bound, (step.file, name, difference)
