"""Export: portable, self-contained, reproducible files; and invariant 5 on the toy family."""

from __future__ import annotations

import filecmp
import os
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import toy_family as toy

from pyengine.export.parity import ParityError, Report, Row, parity
from pyengine.export.partition import partition
from pyengine.export.weights import WeightStore


@pytest.mark.slow
def test_cut_inline_portable_and_torch_agree(tmp_path: Path) -> None:
    report = parity(toy.bundle(), toy.modules(), cache_dir=tmp_path)
    runners = {(row.runner, row.precision) for row in report.rows if row.component == "denoiser"}
    assert len(runners) == 5  # portable, cut and inline in two precisions
    report.check()


def test_onnxruntime_backend_agrees(tmp_path: Path) -> None:
    parity(
        toy.bundle(), toy.modules(), backend="onnxruntime", precisions=["fp32"], cache_dir=tmp_path
    ).check()


def test_parity_notices_other_weights(tmp_path: Path) -> None:
    module, inputs = toy.modules()["text_encoder"]
    with torch.no_grad():
        module.key.weight[0, 0] += 0.05
    with pytest.raises(ParityError, match=r"text_encoder\s+text_key"):
        parity(toy.bundle(), {"text_encoder": (module, inputs)}, cache_dir=tmp_path).check()


def test_nan_is_past_tolerance() -> None:
    assert not Report((Row("c", "o", "r", "fp32", np.nan, np.nan, 0.0, 1.0),)).passed


@pytest.mark.slow
def test_a_second_export_is_bit_identical(tmp_path: Path) -> None:
    toy.export(tmp_path)
    names = os.listdir(tmp_path)
    same, different, errors = filecmp.cmpfiles(tmp_path, toy.bundle().folder, names, shallow=False)
    assert (sorted(same), different, errors) == (sorted(names), [], [])
    assert sorted(names) == sorted(os.listdir(toy.bundle().folder))


def test_files_are_valid_and_name_no_machine() -> None:
    folder = toy.bundle().folder
    for path in folder.glob("*.onnx"):
        onnx.checker.check_model(path, full_check=False)
        assert b"/" + str(Path.cwd()).encode().strip(b"/") not in path.read_bytes()
        assert b".py" not in path.read_bytes()


def test_weights_are_stored_once_and_in_half_precision() -> None:
    module = toy.modules()["denoiser"][0]
    numbers = sum(p.numel() for part, _ in toy.modules().values() for p in part.parameters())
    size = (toy.bundle().folder / "weights.bin").stat().st_size
    # Two bytes each, alignment, and the transposed copies an exporter makes of none.
    assert size < 2.6 * numbers
    portable = onnx.load(toy.bundle().path("denoiser.onnx"), load_external_data=False)
    kinds = {tensor.data_type for tensor in portable.graph.initializer if tensor.external_data}
    assert onnx.TensorProto.FLOAT16 in kinds
    assert module.blocks[0].qkv.weight.half().float().equal(module.blocks[0].qkv.weight)


def test_symbols_stay_symbolic_in_the_portable_file() -> None:
    """Other sizes than those of the example run in plain ONNX Runtime."""
    portable = ort.InferenceSession(toy.bundle().path("denoiser.onnx"), providers=["CPUExecutionProvider"])
    arrays = dict(toy.numpy_inputs("denoiser"))
    arrays["latents"] = np.concatenate([arrays["latents"]] * 2, 1)
    arrays["level"] = np.linspace([0] * toy.STREAMS, 1, 2 * toy.FRAMES, dtype=np.float32, axis=1)
    arrays["frame_index"] = np.tile(np.arange(2 * toy.FRAMES) + 2, (toy.STREAMS, 1))
    for name in list(arrays):
        if name.startswith("ring_"):
            arrays[name] = np.take(arrays[name], [0, 1], 1)
    assert portable.run(["prediction"], arrays)[0].shape == (
        toy.BRANCHES,
        toy.STREAMS,
        2 * toy.FRAMES,
        toy.CHANNELS,
        toy.SIDE,
        toy.SIDE,
    )


def test_time_embedding_is_computed_once_and_in_float32() -> None:
    cut = toy.bundle().components["denoiser"].cut
    assert cut is not None
    segments = [step for step in cut.steps if step.kind == "segment"]
    assert [step.precision for step in segments] == ["fp32", None, None, None]
    assert segments[0].inputs == ("level",)
    models = [onnx.load(toy.bundle().path(str(step.file)), load_external_data=False) for step in segments]
    assert [sum(node.op_type in ("Sin", "Cos") for node in model.graph.node) for model in models] == [
        2,
        0,
        0,
        0,
    ]
    # The level that the op compares is the very input, not something a segment has rounded.
    assert {step.inputs[1] for step in cut.steps if step.kind == "op"} == {"level"}


def test_no_node_is_computed_in_two_segments() -> None:
    cut = toy.bundle().components["denoiser"].cut
    assert cut is not None
    names = [
        node.output[0]
        for file in cut.files
        for node in onnx.load(toy.bundle().path(file), load_external_data=False).graph.node
        if node.op_type in ("MatMul", "Gemm", "Softmax", "LayerNormalization")
    ]
    assert len(names) == len(set(names))


def test_an_op_whose_level_is_computed_is_refused(tmp_path: Path) -> None:
    model = onnx.load(toy.bundle().path("denoiser.onnx"), load_external_data=False)
    op = next(node for node in model.graph.node if node.domain == "pyengine")
    op.input[1] = next(node.output[0] for node in model.graph.node if node.op_type == "Softmax")
    with pytest.raises(ValueError, match="expected the level of"):
        partition(model, "x", tmp_path, WeightStore(), {"frames": 4, "ring": 3})
