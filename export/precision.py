"""What stays float32 in a bf16 plan: the arithmetic that turns numbers into phases and orders, and what
leaves the graph.

A sine of 1000 * level, or a comparison of two levels, is wrong once its argument is rounded to 8 bits. Such
nodes, with all that leads to them from the inputs, go into a segment of their own that every plan compiles as
float32; it is a few microseconds long. Activations that cross between segments, and the ring, are `working`;
other inputs and outputs keep their dtype.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

import onnx
from onnx import NodeProto, TensorProto

from pyengine.bundle.bundle import TensorSpec

_PHASES = frozenset({"Sin", "Cos"})
_ORDERS = frozenset({"Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Equal"})
_HEAVY = frozenset({"MatMul", "Gemm", "Conv", "ConvTranspose", "Softmax", "LayerNormalization"})
_DTYPES = {
    TensorProto.FLOAT: "float32",
    TensorProto.INT64: "int64",
    TensorProto.UINT8: "uint8",
    TensorProto.BOOL: "bool",
}


def precise_nodes(
    nodes: Sequence[NodeProto],
    constant: Collection[str],
    inputs: Collection[str],
    values: Mapping[str, onnx.ValueInfoProto],
) -> set[int]:
    """Indices of the nodes that must not be rounded. One behind a matrix product is left alone: its input is
    rounded already.
    """
    producer = {output: index for index, node in enumerate(nodes) for output in node.output}
    precise: set[int] = set()
    for root, node in enumerate(nodes):
        value = values.get(node.input[0]) if node.input else None
        whole = value is not None and value.type.tensor_type.elem_type != TensorProto.FLOAT
        sensitive = node.op_type in _PHASES or (node.op_type in _ORDERS and not whole)
        if not sensitive or node.output[0] in constant:
            continue
        found, pending, cheap = set[int](), [root], True
        while pending and cheap:
            index = pending.pop()
            cheap = nodes[index].op_type not in _HEAVY and not nodes[index].domain
            if cheap and index not in found:
                found.add(index)
                sources = [
                    tensor
                    for tensor in nodes[index].input
                    if tensor and tensor not in constant and tensor not in inputs
                ]
                pending += [producer[tensor] for tensor in sources]
        if cheap:
            precise |= found
    return precise


def tensor_spec(value: onnx.ValueInfoProto, working: Iterable[str] = ()) -> TensorSpec:
    """Shape and dtype of a graph value; float32 becomes `working` where a pattern matches its name."""
    kind = value.type.tensor_type
    if kind.elem_type not in _DTYPES:
        name = TensorProto.DataType.Name(kind.elem_type)
        raise ValueError(f"[export] expected {value.name} to be float32, int64, uint8 or bool but got {name}")
    shape = tuple(dim.dim_param or dim.dim_value for dim in kind.shape.dim)
    if any(dim == 0 for dim in shape) or not kind.HasField("shape"):
        raise ValueError(
            f"[export] the shape of {value.name} is unknown after export: write the module with explicit "
            "reshapes"
        )
    dtype = _DTYPES[kind.elem_type]  # type: ignore[index]
    if dtype == "float32" and any(fnmatchcase(value.name, pattern) for pattern in working):
        dtype = "working"
    return TensorSpec(shape, dtype)
