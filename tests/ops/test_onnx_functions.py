"""The function bodies, in plain ONNX Runtime, mean what the torch references mean."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from arrays import assert_as_good_as_torch, cast
from onnx import helper

from pyengine.export.ops import DOMAIN, OPS, OpSpec, attach_functions, spec_of
from pyengine.export.ops.denoise_step import denoise_step
from pyengine.export.ops.frame_window_attention import frame_window_attention

ROWS = [(spec, case) for spec in OPS for case in spec.cases]


def model_of(
    spec: OpSpec, inputs: dict[str, torch.Tensor | None], attributes: dict[str, Any], opset: int
) -> onnx.ModelProto:
    """One node with its function; every dimension is symbolic."""
    kinds = {torch.float32: onnx.TensorProto.FLOAT, torch.int64: onnx.TensorProto.INT64}
    given = {k: v for k, v in inputs.items() if v is not None}
    values = [
        helper.make_tensor_value_info(k, kinds[v.dtype], [f"{k}_{i}" for i in range(v.dim())])
        for k, v in given.items()
    ]
    outputs = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in spec.outputs]
    names = [k if v is not None else "" for k, v in inputs.items()]
    node = helper.make_node(spec.name, names, list(spec.outputs), domain=DOMAIN, **attributes)
    model = helper.make_model(
        helper.make_graph([node], spec.name, values, outputs),
        opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, 1)],
        ir_version=10,
    )
    attach_functions(model)
    return model


def run(model: onnx.ModelProto, inputs: dict[str, torch.Tensor | None]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, {k: v.numpy() for k, v in inputs.items() if v is not None})


@pytest.mark.parametrize("opset", [18, 20])
@pytest.mark.parametrize(("spec", "case"), ROWS, ids=lambda x: getattr(x, "name", ""))
def test_body_matches_reference(spec: OpSpec, case: Any, opset: int) -> None:
    attributes = getattr(case, "attributes", {})
    exact = spec.reference(**case.make_inputs(), **attributes)
    inputs = cast(case.make_inputs(), torch.float32)
    torch_got = spec.reference(**inputs, **attributes)
    got = run(model_of(spec, inputs, attributes, opset), inputs)
    for ours, theirs, wanted in zip(got, torch_got, exact, strict=True):
        assert_as_good_as_torch(ours, theirs, wanted, "float32")


def test_masked_rows_are_exactly_zero() -> None:
    spec = spec_of("FrameWindowAttention")
    case = next(c for c in spec.cases if c.name == "absent_and_empty")
    inputs = cast(case.make_inputs(), torch.float32)
    out = run(model_of(spec, inputs, case.attributes, 18), inputs)[0]
    assert (out[:, list(case.absent)] == 0).all()
    assert (out[:, 1:6] != 0).any(-1).all()


class TwoAttentionsAndAStep(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = torch.nn.Parameter(torch.full((8,), 1.5))

    def forward(
        self,
        qkv: torch.Tensor,
        level: torch.Tensor,
        frame_index: torch.Tensor,
        ring_key: torch.Tensor,
        ring_value: torch.Tensor,
        ring_index: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        window = (qkv, level, frame_index, ring_key, ring_value, ring_index)
        time, key, value = frame_window_attention(*window, self.gain, self.gain, rotary_dim=8)
        space, _, _ = frame_window_attention(*window, scope="frame", mask="bidirectional")
        one = torch.ones_like(level)
        streams = level.shape[0]
        step = denoise_step(
            time[:streams], time[None, :streams], one[:1, :1].expand(1, streams), one, one, 0 * one
        )
        return time + space, key, value, step


@pytest.mark.slow
def test_torch_export_leaves_opaque_nodes_that_any_runtime_can_run() -> None:
    def window(streams: int, frames: int, ring: int) -> tuple[torch.Tensor, ...]:
        batch = 2 * streams
        qkv, kept = torch.randn(batch, frames, 3, 3, 2, 8), torch.randn(2, batch, ring, 3, 2, 8)
        index = torch.arange(ring + frames) + 5 * torch.arange(streams)[:, None]
        return qkv, torch.rand(streams, frames), index[:, ring:], kept[0], kept[1], index[:, :ring]

    module = TwoAttentionsAndAStep().eval()
    streams, frames, ring = (torch.export.Dim(name, min=1) for name in ("streams", "frames", "ring"))
    kept = {0: 2 * streams, 1: ring}
    shapes = ({0: 2 * streams, 1: frames}, {0: streams, 1: frames}, {0: streams, 1: frames}, kept, kept,
              {0: streams, 1: ring})  # fmt: skip
    with torch.no_grad():
        program = torch.onnx.export(
            module, window(3, 5, 4), dynamo=True, dynamic_shapes=shapes, verbose=False
        )
    assert program is not None
    model = program.model_proto
    nodes = [node.op_type for node in model.graph.node if node.domain == DOMAIN]
    assert nodes == ["FrameWindowAttention", "FrameWindowAttention", "DenoiseStep"]
    attach_functions(model)
    assert len({(f.name, f.overload) for f in model.functions}) == 3
    onnx.checker.check_model(model)
    names = [value.name for value in model.graph.input]
    for sizes in ((1, 7, 3), (2, 4, 6)):
        inputs = window(*sizes)
        got = run(model, dict(zip(names, inputs, strict=True)))
        for ours, theirs in zip(got, module(*inputs), strict=True):
            np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("scope", ["temporal", "frame"])
def test_a_stream_in_a_batch_means_what_it_means_alone(scope: str) -> None:
    spec = spec_of("FrameWindowAttention")
    case = next(c for c in spec.cases if c.name == "streams_3_ranged")
    inputs = case.make_inputs()
    attributes = {**case.attributes, "scope": scope}
    whole = spec.reference(**inputs, **attributes)
    for stream in range(case.streams):
        alone = {
            k: v if v is None or v.dim() == 1 else v[stream :: case.streams].contiguous()
            for k, v in inputs.items()
        }
        for got, wanted in zip(spec.reference(**alone, **attributes), whole, strict=True):
            torch.testing.assert_close(got, wanted[stream :: case.streams], rtol=0, atol=1e-12)


def test_reference_has_gradients_where_rows_are_masked() -> None:
    spec = spec_of("FrameWindowAttention")
    case = next(c for c in spec.cases if c.name == "nothing_there")
    inputs = case.make_inputs()
    inputs["qkv"].requires_grad_()
    sum(x.sum() for x in spec.reference(**inputs, **case.attributes)).backward()
    assert inputs["qkv"].grad.isfinite().all()


def test_unknown_attributes_are_refused() -> None:
    node = helper.make_node("FrameWindowAttention", ["x"], ["y"], domain=DOMAIN, colour=1)
    with pytest.raises(ValueError, match=r"attributes among .* but got 'colour'"):
        spec_of("FrameWindowAttention").node_attributes(node)
    with pytest.raises(ValueError, match="expected an op among"):
        spec_of("Softmax")
