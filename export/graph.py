"""A torch module becomes one component of a bundle: portable ONNX, the same with our ops inlined, and the cut
segments.

    store = WeightStore()
    component = export_component(
        module, inputs, folder=folder, name="denoiser", store=store, outputs=["prediction", "key.0", ...],
        dynamic={"latents": {0: "streams", 1: "frames"}}, ring={"ring_key.0": "key.0"})
    store.write(folder)
    write_manifest(folder, name="shapes", ..., components={"denoiser": component})

Round the weights of the module to fp16 first (`round_weights`): then the bundle stores them in half the bytes
and loses nothing. The same module gives the same bytes every time.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path

import onnx
import onnx.inliner
import torch
from torch import Tensor, nn

from pyengine.bundle.bundle import Component, Step, TensorSpec

from .deferred import Deferred, restore
from .deferred import simplify as simplify_deferred
from .ops import DOMAIN, attach_functions
from .partition import partition
from .precision import tensor_spec
from .reshapes import localise_reshapes
from .simplify import merge_equal_nodes
from .weights import WeightStore, store_weights

# 23 would turn attention into one node that fewer runtimes know.
OPSET = 21
Inputs = Mapping[str, Tensor | Sequence[Tensor]]


def round_weights(module: nn.Module) -> nn.Module:
    """Rounds every float parameter and buffer to fp16 in place, so that torch and the bundle hold equal
    numbers.
    """
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(tensor.half())
    return module


def export_component(
    module: nn.Module,
    inputs: Inputs,
    *,
    folder: Path,
    name: str,
    store: WeightStore,
    outputs: Sequence[str],
    dynamic: Mapping[str, Mapping[int, str]] | None = None,
    state: Mapping[str, str] | None = None,
    ring: Mapping[str, str] | None = None,
    working: Iterable[str] = (),
    deferred: Deferred | None = None,
) -> Component:
    """Writes `<name>*.onnx` into `folder` and returns the manifest entry.

    `inputs` are example keyword arguments; a list of tensors becomes `name.0`, `name.1`, ... `dynamic` names
    the axes that a build chooses later, by a symbol or by a product of symbols for an axis that our ops alone
    read (examples must have at least 2 there; a build may choose 1). `state` and `ring` pair inputs
    with outputs (see `bundle.Component`). `working` names further inputs and outputs (fnmatch patterns) that
    may be bf16 in a bf16 plan; those of the ring always may. `deferred` reads weights from disk one by one.
    """
    model = to_onnx(module, inputs, outputs=outputs, dynamic=dynamic or {}, deferred=deferred, store=store)
    store_weights(model, store)
    state, ring = dict(state or {}), dict(ring or {})
    patterns = (*working, *ring, *ring.values())
    component_inputs = {value.name: tensor_spec(value, patterns) for value in model.graph.input}
    component_outputs = {value.name: tensor_spec(value, patterns) for value in model.graph.output}
    symbols = _symbol_values(inputs, component_inputs)
    cut = None
    portable = f"{name}.onnx"
    if any(node.domain == DOMAIN for node in model.graph.node):
        cut = partition(model, f"{name}.cut", folder, store, symbols)
        attach_functions(model)
    save(model, folder / portable)
    inlined = onnx.inliner.inline_local_functions(model) if cut else model
    merge_equal_nodes(inlined.graph)
    inline = partition(inlined, f"{name}.inline", folder, store, symbols)
    appends = _appends(model, ring)
    return Component(
        name=name,
        inputs=component_inputs,
        outputs=component_outputs,
        symbols=symbols,
        state=state,
        ring=ring,
        portable=portable,
        inline=replace(inline, steps=(*inline.steps, *appends)),
        cut=cut,
    )


def to_onnx(
    module: nn.Module,
    inputs: Inputs,
    *,
    outputs: Sequence[str],
    dynamic: Mapping[str, Mapping[int, str]],
    deferred: Deferred | None = None,
    store: WeightStore | None = None,
) -> onnx.ModelProto:
    """The plain exported model: our ops opaque, named inputs and outputs, symbolic dims, no trace of this
    machine. Deferred weights go to the store.
    """
    symbols = sorted({symbol for axes in dynamic.values() for symbol in axes.values()})
    # A product is a size of its own to the exporter: it is opaque to what it sees of our ops.
    dims = {symbol: torch.export.Dim(symbol.replace("*", "_by_"), min=2, max=1 << 16) for symbol in symbols}
    shapes: dict[str, object] = {}
    input_names: list[str] = []
    for key, value in inputs.items():
        axes = {axis: dims[symbol] for axis, symbol in dynamic.get(key, {}).items()} or None
        listed = not isinstance(value, Tensor)
        shapes[key] = [axes] * len(value) if listed else axes
        input_names += [f"{key}.{i}" for i in range(len(value))] if listed else [key]
    with warnings.catch_warnings(), redirect_stdout(StringIO()), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter warns of its own internals
        program = torch.onnx.export(
            module.eval(),
            (),
            kwargs=dict(inputs),
            dynamo=True,
            opset_version=OPSET,
            input_names=input_names,
            output_names=list(outputs),
            dynamic_shapes=shapes if symbols else None,
            optimize=deferred is None,
            verbose=False,
        )
    assert program is not None
    if deferred is None:
        return _cleaned(program.model_proto, input_names, dynamic)
    assert store is not None
    found = simplify_deferred(program.model, deferred.sources(module))
    model = program.model_proto
    restore(model, found, deferred, store)
    return _cleaned(model, input_names, dynamic)


def save(model: onnx.ModelProto, path: Path) -> None:
    """Writes the graph only: its weights are already in the store. Types between nodes are left to the runtimes, which infer them."""
    lean = onnx.ModelProto()
    lean.CopyFrom(model)
    del lean.graph.value_info[:]
    path.write_bytes(lean.SerializeToString(deterministic=True))


def _cleaned(
    model: onnx.ModelProto, input_names: Sequence[str], dynamic: Mapping[str, Mapping[int, str]]
) -> onnx.ModelProto:
    """Drops what the exporter notes about source files, and names symbols as `dynamic` does where the exporter
    kept its own.
    """
    graph = model.graph
    got = [value.name for value in graph.input]
    if got != list(input_names):
        raise ValueError(
            f"[export] expected the graph inputs {list(input_names)} but got {got}: is one of them unused "
            "by the module?"
        )
    model.producer_name, model.producer_version, model.doc_string = "pyengine", "", ""
    del model.metadata_props[:], graph.metadata_props[:]
    graph.ClearField("doc_string")
    for entry in (*graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        entry.ClearField("doc_string")
        del entry.metadata_props[:]
    names = {
        value.type.tensor_type.shape.dim[axis].dim_param: symbol
        for value in graph.input
        for axis, symbol in dynamic.get(value.name.split(".")[0], {}).items()
    }
    for value in (*graph.value_info, *graph.input, *graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                plain = dim.dim_param.replace(" ", "")
                named = re.sub(r"\w+", lambda found: names.get(found[0], found[0]), plain)
                # Factors in one order, so that equal sizes have equal names.
                terms = ("*".join(sorted(term.split("*"))) for term in named.split("+"))
                dim.dim_param = "+".join(terms)
    localise_reshapes(model)
    return model


def _symbol_values(inputs: Inputs, specs: Mapping[str, TensorSpec]) -> dict[str, int]:
    """The sizes that the examples give to the symbols."""
    flat: list[Tensor] = []
    for value in inputs.values():
        flat += [value] if isinstance(value, Tensor) else value
    pairs = (
        (dim, size)
        for tensor, spec in zip(flat, specs.values(), strict=True)
        for dim, size in zip(spec.shape, tensor.shape, strict=True)
    )
    return {dim: int(size) for dim, size in pairs if isinstance(dim, str) and dim.isidentifier()}


def _appends(model: onnx.ModelProto, ring: Mapping[str, str]) -> list[Step]:
    """What writes new keys and values to the rings after an inlined graph, which cannot do it in place."""
    ops = [
        node for node in model.graph.node if node.op_type == "FrameWindowAttention" and node.input[3] in ring
    ]
    return [
        Step("append", (ring[op.input[3]], ring[op.input[4]], op.input[3], op.input[4]), ()) for op in ops
    ]
