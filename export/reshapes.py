"""Sizes inside a graph: targets of Reshape and Expand that are computed become constants, or are read off a tensor that is near.

The exporter computes a shape with two or more open dims from the graph's inputs, once, for the whole network: such a shape would cross into
every segment. Here each target is written with the dims that it takes over (0 in a Reshape, 1 in an Expand), with -1, and only where that
does not do with the dim of another tensor, which a compiler that knows its sizes folds away. The detour over three axes by which the
exporter transposes the keys of an attention becomes one Transpose.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import onnx
from onnx import NodeProto, helper, numpy_helper

from .ops import DOMAIN

Dims = tuple[int | str, ...]
Part = int | tuple[str, int]  # a number of a target, or a tensor and its axis


def localise_reshapes(model: onnx.ModelProto) -> None:
    """Rewrites every Reshape and Expand whose target is computed, in place, and drops what only computed it."""
    graph = model.graph
    sizes = _Sizes(graph)
    _transpose_directly(graph, sizes)
    near: list[str] = []  # what was made since the last op of ours: it lies in the same segment
    kept: list[NodeProto] = []
    for node in graph.node:
        if node.op_type in ("Reshape", "Expand") and node.input[1] not in sizes.constants:
            source, target = sizes.dims.get(node.input[0]), sizes.dims.get(node.output[0])
            if source and target:
                made = _Target(node, source, target, near[::-1], sizes).nodes()
                kept += made
                node.input[1] = made[-1].output[0]
                # The exporter means zeros literally; here they take over a dim.
                for attribute in [entry for entry in node.attribute if entry.name == "allowzero"]:
                    node.attribute.remove(attribute)
        if node.domain == DOMAIN:
            near.clear()
        near += [name for name in node.output if sizes.dims.get(name)]
        kept.append(node)
    del graph.node[:]
    graph.node.extend(kept)
    _drop_unread(graph)


class _Sizes:
    """What is known about sizes: the dims of each tensor, and the values of those tensors that hold dims."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        values = (*graph.value_info, *graph.input, *graph.output)
        self.dims = {value.name: _dims(value) for value in values}
        self.inputs = [value.name for value in graph.input if self.dims[value.name]]
        self.producer = {name: node for node in graph.node for name in node.output}
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        for node in graph.node:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                self.constants[node.output[0]] = node.attribute[0].t

    def held(self, name: str) -> Dims | None:
        """The numbers and symbols in a tensor that was made of the shapes of others, None for any other tensor."""
        if name in self.constants:
            return tuple(int(number) for number in numpy_helper.to_array(self.constants[name]).reshape(-1))
        node = self.producer.get(name)
        if node is None or node.op_type not in ("Shape", "Slice", "Concat"):
            return None
        if node.op_type == "Shape":
            cut = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
            dims = self.dims.get(node.input[0])
            return dims[cut.get("start", 0) : cut.get("end")] if dims else None
        parts = [self.held(tensor) for tensor in node.input]
        known = [part for part in parts if part is not None]
        if len(known) < len(parts):
            return None
        if node.op_type == "Concat":
            return tuple(dim for part in known for dim in part)
        shape, (start,), (end,) = known[:3]
        return (
            shape[start:end] if isinstance(start, int) and isinstance(end, int) and len(known) == 3 else None
        )


def _dims(value: onnx.ValueInfoProto) -> Dims:
    """The dims of a graph value, () where they are unknown or there are none."""
    dims = tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim)
    return () if any(dim == 0 for dim in dims) else dims


def _transpose_directly(graph: onnx.GraphProto, sizes: _Sizes) -> None:
    """[..., a, b] -> [-1, a, b] -> [-1, b, a] -> [..., b, a] in one step, in place."""
    readers: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    for node in graph.node:
        if node.op_type != "Transpose" or list(helper.get_attribute_value(node.attribute[0])) != [0, 2, 1]:
            continue
        before, after = sizes.producer.get(node.input[0]), readers.get(node.output[0], [])
        if before is None or before.op_type != "Reshape" or [n.op_type for n in after] != ["Reshape"]:
            continue
        dims = sizes.dims.get(before.input[0], ())
        flat, turned = sizes.held(before.input[1]), sizes.held(after[0].input[1])
        *lead, high, wide = dims if len(dims) > 2 else (0, 0, 0)
        # A flattened batch may stand in the way of a constant: -1 then, where there is one leading axis of it.
        swapped = ((*lead, wide, high), (-1, *lead[1:], wide, high))
        if flat != (-1, high, wide) or turned not in swapped:
            continue
        order = [*range(len(lead)), len(lead) + 1, len(lead)]
        last = after[0]
        last.CopyFrom(
            helper.make_node("Transpose", [before.input[0]], [last.output[0]], last.name, perm=order)
        )


class _Target:
    """The target of one Reshape or Expand. `near`: tensors of the same segment, the nearest first."""

    def __init__(
        self, node: NodeProto, source: Dims, target: Dims, near: Sequence[str], sizes: _Sizes
    ) -> None:
        self.node, self.source, self.target, self.sizes = node, source, target, sizes
        self.near = [node.input[0], *near]
        self.free = node.op_type == "Reshape"  # it may leave one dim to -1

    def nodes(self) -> list[NodeProto]:
        """What makes the target; the last of them has it as its output."""
        name = f"{self.node.output[0]}/target"
        numbers = [self._number(axis) for axis in range(len(self.target))]
        unknown = [axis for axis, number in enumerate(numbers) if number is None]
        if len(unknown) > 1:
            alike = [other for other in self.near if self.sizes.dims[other] == self.target]
            if alike:
                return [helper.make_node("Shape", [alike[0]], [name])]
        places = {axis: self._place(str(self.target[axis])) for axis in unknown}
        if self.free and unknown:
            far = [axis for axis in unknown if places[axis] is None or places[axis][0] not in self.near]  # type: ignore[index]
            numbers[(far or unknown)[0]] = -1
        parts: list[Part] = []
        for axis, number in enumerate(numbers):
            part = places[axis] if number is None else number
            if part is None:
                raise ValueError(
                    f"[export] no tensor has the dim {self.target[axis]} of {self.node.output[0]}: write it with fixed sizes"
                )
            parts.append(part)
        return list(_made(name, parts))

    def _number(self, axis: int) -> int | None:
        """The dim, or how the op says that it takes it over; None where it must be found."""
        dim = self.target[axis]
        if isinstance(dim, int):
            return dim
        own = axis if self.free else axis - len(self.target) + len(self.source)
        if 0 <= own < len(self.source) and self.source[own] == dim:
            return 0 if self.free else 1
        return None

    def _place(self, dim: str) -> tuple[str, int] | None:
        """A tensor and its axis of this size: one that is near, else an input of the graph."""
        for other in (*self.near, *self.sizes.inputs):
            dims = self.sizes.dims[other]
            if dim in dims:
                return other, dims.index(dim)
        return None


def _made(name: str, parts: Sequence[Part]) -> Iterator[NodeProto]:
    """The constant, or the concatenation, that holds these parts."""
    numbers = [part for part in parts if isinstance(part, int)]
    if len(numbers) == len(parts):
        yield _constant(name, numbers)
        return
    pieces: list[str] = []
    for axis, part in enumerate(parts):
        pieces.append(f"{name}.{axis}")
        if isinstance(part, int):
            yield _constant(pieces[-1], [part])
        else:
            other, at = part
            yield helper.make_node("Shape", [other], [pieces[-1]], start=at, end=at + 1)
    yield helper.make_node("Concat", pieces, [name], axis=0)


def _constant(name: str, values: Sequence[int]) -> NodeProto:
    return helper.make_node(
        "Constant", [], [name], value=numpy_helper.from_array(np.array(values, np.int64), name)
    )


def _drop_unread(graph: onnx.GraphProto) -> None:
    """Removes nodes and initialisers that nobody reads any more."""
    read = {value.name for value in graph.output}
    kept: list[NodeProto] = []
    for node in reversed(graph.node):
        if read.intersection(node.output):
            read.update(node.input)
            kept.append(node)
    del graph.node[:]
    graph.node.extend(reversed(kept))
    initializers = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.initializer[:]
    graph.initializer.extend(initializers)
