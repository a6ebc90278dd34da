"""Building TensorRT plans without a GPU: complete, typed as asked, found again. Nothing here runs an engine."""

from __future__ import annotations

import gc
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_cuda
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import toy_family as toy
from onnx import TensorProto

import pyengine
from pyengine.backends import base as backends
from pyengine.backends.tensorrt import TensorRT, library
from pyengine.backends.typed_graph import typed_graph
from pyengine.build.builder import build
from pyengine.build.variants import all_variants
from pyengine.bundle.bundle import Bundle, Step, write_manifest
from pyengine.bundle.variant import Variant
from pyengine.cli import main
from pyengine.device import cuda as runtime
from pyengine.errors import BackendUnavailable, ConfigError, PlanError
from pyengine.export.families.shapes.denoiser import Denoiser, DenoiserConfig
from pyengine.export.families.shapes.text_encoder import TextFeatures
from pyengine.export.graph import export_component, round_weights
from pyengine.export.weights import WeightStore
from pyengine.plans import cache, plan
from pyengine.plans.plan import Plan
from pyengine.runtime.codec import encoder_variants

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason="tensorrt_rtx is not installed: pip install 'pyengine-video[tensorrt]'",
)
SYMBOLS = {"frames": 4, "ring": 3, "chunk": 2}


def segments(bundle: Bundle, component: str, choice: Any) -> Iterator[Step]:
    steps = plan.graph(bundle.component(component), choice).steps
    yield from (step for step in steps if step.kind == "segment")


def ports(bundle: Bundle, variant: Variant, choice: Any, step: Step, precision: Any) -> tuple[Any, Any]:
    known = plan.specs(bundle.component(variant.component), choice)
    target = Plan(bundle, "tensorrt", precision, None, {})
    inputs, outputs = (
        {n: target.port(variant, known[n]) for n in names} for names in (step.inputs, step.outputs)
    )
    return inputs, outputs


CASES = [
    (toy.DENOISER, "cut"),
    (toy.DENOISER, "inline"),
    (toy.DECODER, "inline"),
    (toy.TEXT_ENCODER, "inline"),
]


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize(("variant", "choice"), CASES, ids=lambda value: str(value))
def test_typed_graphs_are_what_the_ports_say(variant: Variant, choice: str, precision: str) -> None:
    bundle = toy.bundle()
    for step in segments(bundle, variant.component, choice):
        inputs, outputs = ports(bundle, variant, choice, step, precision)
        own = plan.step_precision(step, precision)  # type: ignore[arg-type]
        model = typed_graph(bundle.path(str(step.file)), variant.symbols, inputs, outputs, own)
        onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
        kinds = {
            "bf16": TensorProto.BFLOAT16,
            "float16": TensorProto.FLOAT16,
            "float32": TensorProto.FLOAT,
            "int64": TensorProto.INT64,
            "uint8": TensorProto.UINT8,
            "bool": TensorProto.BOOL,
        }
        for values, wanted in ((model.graph.input, inputs), (model.graph.output, outputs)):
            assert {value.name for value in values} == set(wanted)
            for value in values:
                tensor = value.type.tensor_type
                assert tensor.elem_type == kinds[wanted[value.name].dtype]
                assert tuple(dim.dim_value for dim in tensor.shape.dim) == wanted[value.name].shape
        if own != "fp32":
            products = [node for node in model.graph.node if node.op_type in ("MatMul", "Gemm", "Conv")]
            read = {tensor for node in products for tensor in node.input}
            kinds_read = {tensor.data_type for tensor in model.graph.initializer if tensor.name in read}
            assert kinds_read <= {kinds["bf16" if own == "bf16" else "float16"]}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize(("variant", "choice"), CASES, ids=lambda value: str(value))
def test_typed_graphs_compute_what_the_segments_do(variant: Variant, choice: str, precision: str) -> None:
    """In ONNX Runtime, on the same numbers; fp16 within what fp16 allows."""
    bundle, rng = toy.bundle(), np.random.default_rng(0)
    for step in segments(bundle, variant.component, choice):
        inputs, outputs = ports(bundle, variant, choice, step, precision)
        own = plan.step_precision(step, precision)  # type: ignore[arg-type]
        path = bundle.path(str(step.file))
        typed = typed_graph(path, variant.symbols, inputs, outputs, own)
        feeds: dict[str, np.ndarray] = {}
        for name, port in inputs.items():
            if port.dtype in ("int64", "bool", "uint8"):
                feeds[name] = np.ones(port.shape, port.dtype)
            else:
                feeds[name] = rng.uniform(0, 1, port.shape).astype(port.array_dtype)
        exact = _run(
            str(path), {n: a.astype(np.float32) if a.dtype == np.float16 else a for n, a in feeds.items()}
        )
        got = _run(typed.SerializeToString(), feeds)
        for name, want in exact.items():
            # Levels of 255 may round either way; values within twice the spacing of the type, over a few sums.
            bound = (
                1.01
                if want.dtype == np.uint8
                else (2e-2 if own == "fp16" else 2e-3 if precision == "fp16" else 1e-5)
            )
            scale = 1.0 if want.dtype == np.uint8 else max(1.0, float(np.abs(want).max()))
            error = np.abs(got[name].astype(np.float64) - want.astype(np.float64)).max() / scale
            assert error <= bound, (step.file, name, error)


def _run(model: str | bytes, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    for name, size in SYMBOLS.items():
        options.add_free_dimension_override_by_name(name, size)
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [port.name for port in session.get_outputs()]
    given = {port.name: feeds[port.name] for port in session.get_inputs()}
    return dict(zip(names, session.run(names, given), strict=True))


def test_masks_beyond_fp16_stay_finite(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 21]> g (float[2] x) => (float[2] y) <float[2] m = {-1e9, 0.0}> { y = Add(x, m) }'
    )
    onnx.save(model, tmp_path / "m.onnx")
    port = {"x": backends.Port((2,), "float16")}
    typed = typed_graph(tmp_path / "m.onnx", {}, port, {"y": backends.Port((2,), "float32")}, "fp16")
    assert np.isfinite(_run(typed.SerializeToString(), {"x": np.zeros(2, np.float16)})["y"]).all()


def test_factors_of_a_resize_stay_float32(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 21]> g (float[1, 1, 2, 2] x) => (float[1, 1, 4, 4] y)'
        '<float[4] factors = {1.0, 1.0, 2.0, 2.0}> { y = Resize<mode = "nearest">(x, , factors) }'
    )
    onnx.save(model, tmp_path / "m.onnx")
    ports = {"x": backends.Port((1, 1, 2, 2), "float16")}, {"y": backends.Port((1, 1, 4, 4), "float16")}
    typed = typed_graph(tmp_path / "m.onnx", {}, *ports, "fp16")
    kinds = {tensor.name: tensor.data_type for tensor in typed.graph.initializer}
    assert kinds["factors"] == TensorProto.FLOAT
    x = np.arange(4, dtype=np.float16).reshape(1, 1, 2, 2)
    assert _run(typed.SerializeToString(), {"x": x})["y"].shape == (1, 1, 4, 4)


@needs_rtx
def test_a_complete_plan_of_shapes_without_a_gpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`pyengine build shapes --backend tensorrt --target ...`: every part, and every engine typed as its ports."""
    command = [
        "build",
        "shapes",
        "--backend",
        "tensorrt",
        "--target",
        "sm89",
        "--json",
        "--cache",
        str(tmp_path),
    ]
    assert main(command) == 0
    made = json.loads(capsys.readouterr().out)
    bundle = Bundle.load("shapes")
    assert [part["variant"] for part in made["parts"]] == [str(variant) for variant in all_variants(bundle)]
    for variant, entry in zip(all_variants(bundle), made["parts"], strict=True):
        part = cache.read(bundle, variant, Path(entry["folder"]))
        assert part.choice == ("cut" if variant.component == "denoiser" else "inline")
        assert entry["device"] == "sm89"
        _check_engines(bundle, variant, part.choice, part)
    # Found again, without a compilation.
    said: list[str] = []
    again = build(
        bundle,
        variants=all_variants(bundle),
        backend="tensorrt",
        target="sm89",
        cache_dir=tmp_path,
        progress=lambda done, total, what: said.append(what),
    )
    assert not said
    folders = {entry["folder"] for entry in made["parts"]}
    assert {str(part.folder) for part in again.parts.values()} == folders
    _loads_on_such_a_gpu(tmp_path, folders, monkeypatch)


def _loads_on_such_a_gpu(cache: Path, folders: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine beside a GPU of that kind asks for its networks stream by stream, and finds every part."""
    gpu = fake_cuda.FakeCuda()
    gpu.capability = (8, 9)
    monkeypatch.setattr(runtime, "_api", lambda: gpu)
    # Without them a cut plan could not run.
    monkeypatch.setattr("pyengine.build.builder._has_kernels", lambda: True)
    runtime.runtime.cache_clear()
    try:
        monkeypatch.setattr(TensorRT, "_build", lambda *_: pytest.fail("compiled again"))
        engine = pyengine.load("shapes", backend="tensorrt", cache_dir=cache)
        chunk_frames = engine.bundle.method["chunk_frames"]
        engine._program(encoder_variants(engine.bundle, chunk_frames))  # as a stream with start frames does
        found = {str(part.folder) for plan in engine.plans for part in plan.parts.values()}
        assert found == folders
        engine.close()
        gc.collect()
    finally:
        runtime.runtime.cache_clear()


@needs_rtx
def test_a_block_of_a_wide_model_for_two_gpus(tmp_path: Path) -> None:
    """One block, 1152 wide with 16 heads of 72, as large video models have."""
    config = DenoiserConfig(width=1152, depth=1, heads=16, mlp_ratio=4)
    torch.manual_seed(0)
    module = round_weights(Denoiser(config)).eval()
    frames, ring, words = 4, 2, 8
    shape = (1, 2, 1, config.heads, words, config.head_size)
    slots = (2, ring, config.tokens_per_frame, config.heads, config.head_size)
    inputs = {
        "latents": torch.randn(1, frames, 8, 8, 8),
        "level": torch.linspace(0, 1, frames)[None],
        "frame_index": torch.arange(frames)[None],
        "ring_index": torch.full((1, ring), -1),
        "ring_key": [torch.zeros(slots)],
        "ring_value": [torch.zeros(slots)],
        **{
            f"text_{name}": value
            for name, value in TextFeatures(
                torch.randn(shape),
                torch.randn(shape),
                torch.zeros(2, 1, words),
                torch.randn(2, 1, config.width),
            )
            ._asdict()
            .items()
        },
    }
    folder, store = tmp_path / "wide", WeightStore()
    folder.mkdir()
    component = export_component(
        module,
        inputs,
        folder=folder,
        name="denoiser",
        store=store,
        outputs=["prediction", "key.0", "value.0"],
        dynamic={name: {1: "frames"} for name in ("latents", "level", "frame_index")},
        ring={"ring_key.0": "key.0", "ring_value.0": "value.0"},
        working=["text_key", "text_value", "text_vector"],
    )
    store.write(folder)
    bundle = write_manifest(
        folder, name="wide", family="shapes", version="1", components={"denoiser": component}
    )
    variant = Variant.of("denoiser", streams=1, frames=frames)
    for target in ("sm89", "sm120"):
        made = build(
            bundle, variants=[variant], backend="tensorrt", target=target, cache_dir=tmp_path / "plans"
        )
        part = made.part(variant)
        _check_engines(bundle, variant, "cut", part)
        assert part.seconds == {"cut": None}  # nothing could be timed
        weights = sum((part.folder / str(name)).stat().st_size for name in part.engines)
        assert weights > 2 * 12 * 1152**2  # bf16 weights of a block, so nothing was left out


def _check_engines(bundle: Bundle, variant: Variant, choice: Any, part: plan.Part) -> None:
    steps = list(segments(bundle, variant.component, choice))
    assert len(part.engines) == len(steps)
    for step, file in zip(steps, part.engines, strict=True):
        assert file is not None
        inputs, outputs = ports(bundle, variant, choice, step, "bf16")
        facts = json.loads((part.folder / file).with_suffix(".json").read_text())
        for side, wanted in (("inputs", inputs), ("outputs", outputs)):
            assert facts[side] == {name: [list(port.shape), port.dtype] for name, port in wanted.items()}
        assert (part.folder / file).stat().st_size > 1000


@needs_rtx
def test_what_the_parser_sees_is_what_is_recorded(tmp_path: Path) -> None:
    """The network that TensorRT parsed has the inputs, outputs and types of the ports: nothing was widened."""
    import tensorrt_rtx as trt

    bundle = Bundle.load("shapes")
    variant = all_variants(bundle)[1]
    names = {"bf16": "BF16", "float32": "FLOAT", "int64": "INT64", "uint8": "UINT8", "bool": "BOOL"}
    for step in segments(bundle, "denoiser", "cut"):
        inputs, outputs = ports(bundle, variant, "cut", step, "bf16")
        own = plan.step_precision(step, "bf16")
        model = typed_graph(bundle.path(str(step.file)), variant.symbols, inputs, outputs, own)
        logger = trt.Logger(trt.Logger.ERROR)
        builder = trt.Builder(logger)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, logger)
        assert parser.parse(model.SerializeToString())
        seen_in = [network.get_input(i) for i in range(network.num_inputs)]
        seen_out = [network.get_output(i) for i in range(network.num_outputs)]
        for seen, wanted in ((seen_in, inputs), (seen_out, outputs)):
            assert {tensor.name: (tuple(tensor.shape), tensor.dtype.name) for tensor in seen} == {
                name: (port.shape, names[port.dtype]) for name, port in wanted.items()
            }


@needs_rtx
def test_engines_of_another_version_or_gpu_are_refused(tmp_path: Path) -> None:
    made = build(
        toy.bundle(), variants=[toy.TEXT_ENCODER], backend="tensorrt", target="sm89", cache_dir=tmp_path
    )
    part = made.part(toy.TEXT_ENCODER)
    other = backends.get("tensorrt", target="sm120")
    path = part.folder / str(part.engines[0])
    with pytest.raises(
        PlanError, match=r"is for tensorrt_rtx .* on sm89 but here is .* on sm120; build the plan again"
    ):
        other.load(path, "bf16", None)
    path.with_suffix(".json").write_text("{")
    with pytest.raises(PlanError, match=r"is corrupt .*; build the plan again"):
        other.load(path, "bf16", None)


@needs_rtx
def test_equal_segments_are_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan that is gone is put together again from engines that are still known."""
    options: dict[str, Any] = {"variants": [toy.TEXT_ENCODER], "backend": "tensorrt", "target": "sm89"}
    first = build(toy.bundle(), cache_dir=tmp_path, **options).part(toy.TEXT_ENCODER)
    data = (first.folder / str(first.engines[0])).read_bytes()
    cache.discard(first.folder)
    monkeypatch.setattr(TensorRT, "_build", lambda *_: pytest.fail("compiled again"))
    again = build(toy.bundle(), cache_dir=tmp_path, **options).part(toy.TEXT_ENCODER)
    assert (again.folder / str(again.engines[0])).read_bytes() == data


@needs_rtx
def test_progress_is_told_inside_a_compilation(tmp_path: Path) -> None:
    said: list[str] = []
    build(
        toy.bundle(),
        variants=[toy.TEXT_ENCODER],
        backend="tensorrt",
        target="sm120",
        cache_dir=tmp_path,
        progress=lambda done, total, what: said.append(what),
    )
    assert any("text_encoder.inline.onnx: " in what for what in said)


@needs_rtx
def test_bad_targets_and_options_get_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"builds for sm75, .* but got target 'sm42'"):
        backends.get("tensorrt", target="sm42")
    with pytest.raises(ConfigError, match="can only be built beside their GPU"):
        backends.get("tensorrt", target="sm89", refit=True)
    with pytest.raises(ConfigError, match="target needs backend tensorrt but got openvino"):
        backends.get("openvino", target="sm89")
    with pytest.raises(
        ConfigError, match=r"runs on device cpu but got 'cuda'; take backend onnxruntime or tensorrt"
    ):
        backends.get("openvino", "cuda")
    assert main(["build", "shapes", "--target", "sm89", "--cache", str(tmp_path)]) == 2
    assert "a build for other GPUs needs backend tensorrt but got openvino" in capsys.readouterr().err


def test_which_tensorrt_may_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYENGINE_TENSORRT", "trtexec")
    library.cache_clear()
    with pytest.raises(
        ConfigError, match="PYENGINE_TENSORRT to be one of tensorrt, tensorrt_rtx but got 'trtexec'"
    ):
        library()


@needs_rtx
def test_without_a_gpu_loading_says_so() -> None:
    try:
        backends.get("tensorrt")
        pytest.skip("this machine has a GPU")
    except BackendUnavailable as error:
        message = str(error)
    assert message.startswith("device cuda needs an NVIDIA GPU")


def test_onnxruntime_without_its_cuda_provider_says_so() -> None:
    if "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("this onnxruntime has the CUDA provider")
    with pytest.raises(
        BackendUnavailable, match=r"needs CUDAExecutionProvider, .* pip install 'pyengine-video\[cuda\]'"
    ):
        backends.get("onnxruntime", "cuda")
