"""Cuts a model into segments: what must stay float32, then a piece before each of our ops, and the piece
after the last.

Each segment is a stateless ONNX file for a graph compiler. Every node is placed as late as its first reader
allows, so what several segments read (the time embedding) is computed once and passed on by name, while what
one block alone reads (its modulation, its text keys) stays inside its segment. An inlined model has no ops
left, and becomes one segment behind the float32 one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import NodeProto, helper

from pyengine.bundle.bundle import Constant, Graph, Step

from .crossing import measured_values
from .ops import DOMAIN
from .precision import precise_nodes, tensor_spec
from .weights import WeightStore, read_initializer

LEVEL_INPUT = 1  # of FrameWindowAttention


def partition(
    model: onnx.ModelProto, prefix: str, folder: Path, store: WeightStore, symbols: Mapping[str, int]
) -> Graph:
    """Writes `<prefix>.onnx` (an inlined model) or `<prefix><i>.onnx`, and returns the steps that replace the
    model.
    """
    return _Partition(model, store, symbols).run(prefix, folder)


class _Partition:
    def __init__(self, model: onnx.ModelProto, store: WeightStore, symbols: Mapping[str, int]) -> None:
        self.model, self.store, self.symbols = model, store, symbols
        graph = model.graph
        self.nodes = list(graph.node)  # held, so that id(node) stays the node's
        self.initializers = {tensor.name: tensor for tensor in graph.initializer}
        self.producer = {output: node for node in self.nodes for output in node.output if output}
        self.values = {value.name: value for value in (*graph.value_info, *graph.input, *graph.output)}
        self.inputs = {value.name for value in graph.input}
        self.outputs = {value.name for value in graph.output}
        self.ops = [node for node in self.nodes if node.domain == DOMAIN]
        self.constant = self._constant_outputs()
        self.placed: list[NodeProto] = []  # nodes that end up in a segment

    def run(self, prefix: str, folder: Path) -> Graph:
        for op in self.ops:
            if op.op_type == "FrameWindowAttention" and op.input[LEVEL_INPUT] not in self.inputs:
                raise ValueError(
                    f"[export] expected the level of {op.name} to be a graph input, so that no segment rounds it, but got "
                    f"{op.input[LEVEL_INPUT]}"
                )
        constants = {
            tensor: self._read(tensor) for op in self.ops for tensor in op.input if tensor in self.constant
        }
        precise, segments = self._segments()
        steps: list[Step] = []
        if precise:
            self._measure(precise)
            steps.append(self._write_segment(f"{prefix}.float32.onnx", folder, precise, "fp32"))
        for index, nodes in enumerate(segments):
            if nodes:
                file = f"{prefix}{index}.onnx" if self.ops else f"{prefix}.onnx"
                steps.append(self._write_segment(file, folder, nodes))
            if index < len(self.ops):
                steps.append(self._op_step(self.ops[index]))
        crossing = {tensor for step in steps for tensor in (*step.inputs, *step.outputs) if tensor} - set(
            constants
        )
        specs = {
            tensor: tensor_spec(self.values[tensor], (tensor,))
            for tensor in sorted(crossing - self.inputs - self.outputs)
        }
        return Graph(specs, constants, tuple(steps))

    def _constant_outputs(self) -> set[str]:
        """Initialisers and all that is computed from them alone: every segment takes its own copy."""
        known = set(self.initializers)
        for node in self.nodes:
            if node.domain != DOMAIN and all(tensor in known for tensor in node.input if tensor):
                known.update(node.output)
        return known

    def _segments(self) -> tuple[list[NodeProto], list[list[NodeProto]]]:
        """The float32 nodes, and the others by segment, in graph order. Segment i runs before op i."""
        precise = {
            id(self.nodes[index])
            for index in precise_nodes(self.nodes, self.constant, self.inputs, self.values)
        }
        last = len(self.ops)
        order = {id(op): index for index, op in enumerate(self.ops)}
        place: dict[int, int] = {}
        due = dict.fromkeys(self.outputs, last)
        for node in reversed(self.nodes):
            if node.domain == DOMAIN:
                stage = order[id(node)]
            else:
                stages = [due[output] for output in node.output if output in due]
                if not stages or node.output[0] in self.constant:
                    continue  # nobody reads it, or each reader takes its own copy
                stage = place[id(node)] = min(stages)
            for tensor in node.input:
                due[tensor] = min(due.get(tensor, last), stage)
        segments: list[list[NodeProto]] = [[] for _ in range(last + 1)]
        for node in self.nodes:
            if id(node) in place and id(node) not in precise:
                segments[place[id(node)]].append(node)
        self.placed = [node for node in self.nodes if id(node) in place]
        return [node for node in self.placed if id(node) in precise], segments

    def _op_step(self, op: NodeProto) -> Step:
        attributes = {entry.name: _plain(helper.get_attribute_value(entry)) for entry in op.attribute}
        return Step(
            "op", tuple(op.input), (op.output[0],), op=op.op_type, attributes=dict(sorted(attributes.items()))
        )

    def _write_segment(
        self,
        file: str,
        folder: Path,
        nodes: list[NodeProto],
        precision: str | None = None,
    ) -> Step:
        inside, made = {id(node) for node in nodes}, {output for node in nodes for output in node.output}
        readers = [node for node in self.placed if id(node) not in inside]
        read_outside = self.outputs | {tensor for node in readers for tensor in node.input}
        read_outside |= {tensor for op in self.ops for tensor in op.input}
        outputs = [tensor for node in nodes for tensor in node.output if tensor in read_outside]
        read = list(dict.fromkeys(tensor for node in nodes for tensor in node.input if tensor))
        inputs = [tensor for tensor in read if tensor not in made and tensor not in self.constant]
        for tensor in inputs:
            spec = tensor_spec(self.values[tensor])
            if tensor not in self.inputs and spec.dtype == "int64" and len(spec.shape) == 1:
                raise ValueError(
                    f"[export] {tensor} is a shape that would cross into {file}: write that reshape with "
                    "fixed sizes and -1"
                )
        segment = self._model(
            nodes, [self.values[tensor] for tensor in inputs], [self.values[tensor] for tensor in outputs]
        )
        (folder / file).write_bytes(segment.SerializeToString(deterministic=True))
        return Step("segment", tuple(inputs), tuple(outputs), file=file, precision=precision)

    def _model(
        self, nodes: list[NodeProto], inputs: list[onnx.ValueInfoProto], outputs: list[onnx.ValueInfoProto]
    ) -> onnx.ModelProto:
        constants = self._closure(
            [tensor for node in nodes for tensor in node.input if tensor in self.constant]
        )
        used = {tensor for node in (*constants, *nodes) for tensor in node.input}
        weights = [tensor for name, tensor in self.initializers.items() if name in used]
        graph = helper.make_graph([*constants, *nodes], "segment", inputs, outputs, weights)
        opsets = [entry for entry in self.model.opset_import if entry.domain != DOMAIN]
        return helper.make_model(
            graph, opset_imports=opsets, ir_version=self.model.ir_version, producer_name="pyengine"
        )

    def _closure(self, tensors: list[str]) -> list[NodeProto]:
        """The nodes that make these constants, in graph order."""
        needed, pending = set[int](), list(tensors)
        while pending:
            node = self.producer.get(pending.pop())
            if node is not None and id(node) not in needed:
                needed.add(id(node))
                pending.extend(node.input)
        return [node for node in self.nodes if id(node) in needed]

    def _measure(self, nodes: list[NodeProto]) -> None:
        """Finds the shapes of what these nodes make, where the exporter and the inliner left none."""
        unknown = [tensor for node in nodes for tensor in node.output if tensor not in self.values]
        if not unknown:
            return
        made = {output for node in nodes for output in node.output}
        read = {tensor for node in nodes for tensor in node.input} & self.inputs - made
        model = self._model(nodes, [self.values[name] for name in sorted(read)], [])
        for index, tensor in enumerate(model.graph.initializer):
            loaded = onnx.numpy_helper.from_array(read_initializer(tensor, self.store), tensor.name)
            model.graph.initializer[index].CopyFrom(loaded)
        self.values |= measured_values(model, unknown, self.symbols)

    def _read(self, tensor: str) -> Constant:
        """A weight of an op, as float32 in weights.bin."""
        source = tensor
        while source in self.producer:
            node = self.producer[source]
            if node.op_type not in ("Cast", "Identity"):
                raise ValueError(
                    f"[export] expected {tensor}, read by an op, to be a plain weight but it comes from "
                    f"{node.op_type}"
                )
            source = node.input[0]
        array = read_initializer(self.initializers[source], self.store)
        return self.store.constant(array.astype(np.float32) if array.dtype == np.float16 else array)


def _plain(value: object) -> object:
    return value.decode() if isinstance(value, bytes) else value
