"""Merges equal nodes of a graph. Inlining repeats the masks and angles of an op in every layer; one copy is
enough.
"""

from __future__ import annotations

import onnx


def merge_equal_nodes(graph: onnx.GraphProto) -> None:
    """Keeps the first of nodes with equal op, attributes and inputs, in place. Shapes of inputs with equal
    dims are equal too.
    """
    dims = {value.name: value.type.tensor_type.SerializeToString(deterministic=True) for value in graph.input}
    outputs = {value.name for value in graph.output}
    first: dict[tuple[object, ...], onnx.NodeProto] = {}
    renamed: dict[str, str] = {}
    kept = []
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = renamed.get(name, name)
        attributes = tuple(sorted(entry.SerializeToString(deterministic=True) for entry in node.attribute))
        inputs: tuple[object, ...] = tuple(node.input)
        if node.op_type == "Shape" and node.input[0] in dims:
            inputs = (dims[node.input[0]],)
        same = first.setdefault((node.domain, node.op_type, node.overload, attributes, inputs), node)
        if same is node or outputs.intersection(node.output) or len(same.output) != len(node.output):
            kept.append(node)
        else:
            renamed.update(zip(node.output, same.output, strict=True))
    del graph.node[:]
    graph.node.extend(kept)
