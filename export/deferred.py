"""Weights that stay on disk while a module is exported, so that export needs the memory of one tensor, not of the model.

    deferred = Deferred.of(module, read)        # module may be on the meta device; read("blocks.0.weight") -> array
    export_component(Wrapper(module), ..., deferred=deferred)

Parameters become stand-ins without memory. In the exported graph they are inputs while it is simplified, so nothing tries to compute with
them, and external initialisers afterwards; each is read, transposed where the graph wants it so, and written to the store.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx import TensorProto, helper
from onnxscript import optimizer
from torch import nn

from .weights import WeightStore, stored_initializer

Read = Callable[[str], np.ndarray]


@dataclass(frozen=True)
class Deferred:
    """Which stand-in stands for which name of the file, and how to read that. float32 arrays."""

    names: Mapping[int, str]
    read: Read
    bfloat16: bool = False  # store weights rounded to bf16

    @classmethod
    def of(cls, module: nn.Module, read: Read, *, bfloat16: bool = False) -> Deferred:
        """Replaces every parameter of the module. Small buffers are read at once, since graphs compute with them."""
        names: dict[int, str] = {}
        for prefix, part in module.named_modules():
            for name, parameter in list(part._parameters.items()):
                if parameter is None:
                    continue
                path = f"{prefix}.{name}" if prefix else name
                one = torch.zeros([1] * parameter.ndim)
                part._parameters[name] = nn.Parameter(one.expand(parameter.shape), requires_grad=False)
                names[id(part._parameters[name])] = path
            for name, buffer in list(part._buffers.items()):
                if buffer is not None and buffer.is_meta:
                    part._buffers[name] = torch.from_numpy(read(f"{prefix}.{name}" if prefix else name))
        return cls(names, read, bfloat16)

    def sources(self, module: nn.Module) -> dict[str, str]:
        """Name in the file of each parameter of an exported module, which may wrap the deferred one."""
        found = {
            name: self.names.get(id(value)) for name, value in module.named_parameters(remove_duplicate=False)
        }
        return {name: source for name, source in found.items() if source is not None}


def simplify(model: ir.Model, sources: Mapping[str, str]) -> dict[str, tuple[str, tuple[int, ...] | None]]:
    """Optimises a graph around its deferred weights, which become inputs of it.

    Returns for each such input its name in the file and the permutation of axes in which the graph reads it, None = as it is.
    """
    graph = model.graph
    for name in sources:
        value = graph.initializers.pop(name, None)
        if value is not None:
            value.const_value = None
            graph.inputs.append(value)
    optimizer.optimize_ir(model)
    found: dict[str, tuple[str, tuple[int, ...] | None]] = {}
    for value in graph.inputs:
        if value.name is not None and value.name in sources:
            found[value.name] = (sources[value.name], _transposed(value, graph))
    return found


def restore(
    model: onnx.ModelProto,
    found: Mapping[str, tuple[str, tuple[int, ...] | None]],
    deferred: Deferred,
    store: WeightStore,
) -> None:
    """Makes initialisers of the inputs that stand for deferred weights, their values written to the store."""
    graph = model.graph
    kept = [value for value in graph.input if value.name not in found]
    casts = []
    read = {tensor for node in graph.node for tensor in node.input}
    for value in graph.input:
        if value.name not in found or value.name not in read:
            continue
        source, order = found[value.name]
        array = deferred.read(source)
        array = np.ascontiguousarray(array if order is None else array.transpose(order))
        tensor, cast = stored_initializer(value.name, array, store, bfloat16=deferred.bfloat16)
        graph.initializer.append(tensor)
        if cast:
            casts.append(
                helper.make_node(
                    "Cast", [tensor.name], [value.name], f"cast.{value.name}", to=TensorProto.FLOAT
                )
            )
    nodes = [*casts, *graph.node]
    del graph.input[:], graph.node[:]
    graph.input.extend(kept)
    graph.node.extend(nodes)


def _transposed(value: ir.Value, graph: ir.Graph) -> tuple[int, ...] | None:
    """Where every reader of a weight transposes it alike, the weight takes that form and the transpositions go."""
    readers = [node for node, _ in value.uses()]
    orders = {
        tuple(node.attributes["perm"].as_ints()) if "perm" in node.attributes else None for node in readers
    }
    if not readers or any(node.op_type != "Transpose" for node in readers) or len(orders) != 1:
        return None
    (order,) = orders
    if order is None:
        order = tuple(reversed(range(len(value.shape or ()))))
    for node in readers:
        output = node.outputs[0]
        if output.is_graph_output():
            return None
    for node in readers:
        node.outputs[0].replace_all_uses_with(value)
        graph.remove(node, safe=True)
    assert value.shape is not None
    value.shape = ir.Shape([value.shape[axis] for axis in order])
    return order
