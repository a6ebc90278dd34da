"""A segment with its precision in the graph, for compilers that take types as they are written (TensorRT since 11,
ONNX Runtime on CUDA). Needs the package onnx.

    model = typed_graph(path, symbols, inputs, outputs, "bf16")

A bundle says float32 throughout, with fp16 weights behind a Cast. Here every float tensor gets the working type, all
sizes become numbers, and float32 stays where rounding would be seen: inputs and outputs whose port says so, and the
reductions behind norms and means. Softmax stays in the working type: compilers fuse it with the products around it and
sum in float32 inside.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from pyengine.backends.base import Port, Ports, Precision, Symbols
from pyengine.bundle.graph_file import load_graph

FLOAT = TensorProto.FLOAT
WORKING = {"bf16": TensorProto.BFLOAT16, "fp16": TensorProto.FLOAT16, "fp32": FLOAT}
FLOATS = frozenset({FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE})
PORTS = {
    "bf16": TensorProto.BFLOAT16,
    "float16": TensorProto.FLOAT16,
    "float32": FLOAT,
    "int64": TensorProto.INT64,
    "uint8": TensorProto.UINT8,
    "bool": TensorProto.BOOL,
}
# Sums over many numbers, and functions with steep places.
PRECISE = frozenset(
    {
        "ReduceMean",
        "ReduceSum",
        "ReduceL2",
        "ReduceMax",
        "ReduceMin",
        "Sqrt",
        "Reciprocal",
        "Exp",
        "Log",
        "Sin",
        "Cos",
    }
)
# These run in float32 where all their tensors are float32 already, so that a norm written out stays whole.
FOLLOWING = frozenset(
    {"Add", "Sub", "Mul", "Div", "Neg", "Identity", "Reshape", "Transpose", "Unsqueeze", "Squeeze", "Expand"}
)
# What may stand between the last product and pixels: half a level of 255 is below bf16.
LEVELS = frozenset({"Add", "Sub", "Mul", "Div", "Clip", "Min", "Max", "Round", "Floor"})
_FP16_MAX = 65504.0


def typed_graph(
    path: Path, symbols: Symbols, inputs: Ports, outputs: Ports, precision: Precision
) -> onnx.ModelProto:
    """The model with types, sizes and weights of its own. Raises ValueError for a graph that it cannot type."""
    model = load_graph(path)
    return _Typed(model, symbols, WORKING[precision]).run(inputs, outputs)


class _Typed:
    def __init__(self, model: onnx.ModelProto, symbols: Symbols, working: int) -> None:
        self.model, self.working, self.symbols = model, working, symbols
        self.types: dict[str, int] = {}  # of every tensor in the new graph
        self.nodes: list[NodeProto] = []
        self.casts: dict[tuple[str, int], str] = {}
        self.constants: set[str] = set()
        self.levels: set[str] = set()  # outputs of nodes that make pixels
        # Factors of a Resize are sizes rather than data, and float32 by the standard.
        self.factors = {
            node.input[2] for node in model.graph.node if node.op_type == "Resize" and node.input[2]
        }

    def run(self, inputs: Ports, outputs: Ports) -> onnx.ModelProto:
        graph = self.model.graph
        self._weights()
        for value in graph.input:
            self.types[value.name] = _declare(value, inputs[value.name])
        nodes = [node for node in graph.node if node.output[0] not in self.types]
        self._pixels_in(nodes)
        self._pixels_out(nodes)
        for node in nodes:
            self._node(node)
        for value in graph.output:
            wanted = _declare(value, outputs[value.name])
            if self.types[value.name] != wanted:
                self._rename(value.name)
                self.nodes.append(_cast(f"{value.name}.inner", value.name, wanted))
        del graph.node[:], graph.value_info[:]
        graph.node.extend(self.nodes)
        # bfloat16 convolutions entered the standard with 22; nothing else that we use changed.
        for entry in self.model.opset_import:
            if entry.domain == "" and entry.version < 22:
                entry.version = 22
        return self.model

    def _weights(self) -> None:
        """Weights in the working type under the name that their readers use: the Cast behind them falls away."""
        graph = self.model.graph
        readers: dict[str, list[NodeProto]] = {}
        for node in graph.node:
            for tensor in node.input:
                readers.setdefault(tensor, []).append(node)
        kept: list[TensorProto] = []
        for tensor in graph.initializer:
            if tensor.data_type not in FLOATS:
                kept.append(tensor)
                self.types[tensor.name] = tensor.data_type
                continue
            array = numpy_helper.to_array(tensor).astype(np.float32)
            casts = [node for node in readers.get(tensor.name, []) if node.op_type == "Cast"]
            names = {node.output[0] for node in casts}
            if len(casts) < len(readers.get(tensor.name, [])):
                names.add(tensor.name)
            for name in sorted(names):
                kind = FLOAT if name in self.factors else self.working
                kept.append(_tensor(name, array, kind))
                self.types[name] = kind
                self.constants.add(name)
        del graph.initializer[:]
        graph.initializer.extend(kept)

    def _pixels_in(self, nodes: list[NodeProto]) -> None:
        """uint8 inputs become float32 at once: TensorRT has uint8 at the border of a network only."""
        names = {name for name, kind in self.types.items() if kind == TensorProto.UINT8}
        for name in names:
            self.nodes.append(_cast(name, f"{name}.float", FLOAT))
            self.types[f"{name}.float"] = FLOAT
        for node in nodes:
            for index, tensor in enumerate(node.input):
                if tensor in names:
                    node.input[index] = f"{tensor}.float"

    def _pixels_out(self, nodes: list[NodeProto]) -> None:
        """A cast to uint8 becomes Floor, which is the same for what is not negative, and the cast itself comes last;
        what leads to it is float32.
        """
        producer = {output: node for node in nodes for output in node.output}
        for node in nodes:
            if node.op_type == "Cast" and node.attribute[0].i == TensorProto.UINT8:
                node.op_type = "Floor"
                del node.attribute[:]
                self.levels.add(node.output[0])
                pending = [node.input[0]]
                while pending:
                    maker = producer.get(pending.pop())
                    if maker is not None and maker.op_type in (*LEVELS, "Cast"):
                        self.levels.add(maker.output[0])
                        pending.extend(maker.input)

    def _node(self, node: NodeProto) -> None:
        floats = [name for name in node.input if name and self.types[name] in FLOATS]
        moving = [self.types[name] for name in floats if name not in self.constants]
        made = self.working
        if (
            node.op_type in PRECISE
            or node.output[0] in self.levels | self.factors
            or (node.op_type in FOLLOWING and moving and all(kind == FLOAT for kind in moving))
        ):
            made = FLOAT
        for attribute in node.attribute:
            if attribute.name == "to" and attribute.i in FLOATS:
                attribute.i = made
            elif attribute.name == "value" and attribute.t.data_type in FLOATS:  # Constant, ConstantOfShape
                attribute.t.CopyFrom(_tensor("", numpy_helper.to_array(attribute.t).astype(np.float32), made))
        if node.op_type != "Cast":
            for index, name in enumerate(node.input):
                if name in floats and name not in self.factors:
                    node.input[index] = self._as(name, made)
        self.nodes.append(node)
        for name, kind in zip(node.output, _output_types(node, made, self.types), strict=True):
            self.types[name] = kind

    def _as(self, name: str, kind: int) -> str:
        """The tensor in that type, cast once for all who read it so."""
        if self.types[name] == kind:
            return name
        if (name, kind) not in self.casts:
            cast = f"{name}.{TensorProto.DataType.Name(kind).lower()}"
            self.nodes.append(_cast(name, cast, kind))
            self.casts[name, kind], self.types[cast] = cast, kind
        return self.casts[name, kind]

    def _rename(self, name: str) -> None:
        """An output that is made in another type than its port's gets an inner name."""
        for node in self.nodes:
            for names in (node.input, node.output):
                for index, tensor in enumerate(names):
                    if tensor == name:
                        names[index] = f"{name}.inner"


def weights(model: onnx.ModelProto) -> Iterator[tuple[str, bytes]]:
    """Names and bytes of the initialisers."""
    for tensor in model.graph.initializer:
        yield tensor.name, tensor.raw_data or numpy_helper.to_array(tensor).tobytes()


def _output_types(node: NodeProto, made: int, types: dict[str, int]) -> list[int]:
    """What a node makes, from what it reads."""
    kind = node.op_type
    if kind in ("Cast", "Constant", "ConstantOfShape"):
        for attribute in node.attribute:
            if attribute.name == "to":
                return [attribute.i]
            if attribute.name == "value":
                return [attribute.t.data_type]
        return [FLOAT]
    if kind in ("Shape", "Size", "ArgMax", "ArgMin", "NonZero"):
        return [TensorProto.INT64] * len(node.output)
    if kind in (
        "Equal",
        "Less",
        "LessOrEqual",
        "Greater",
        "GreaterOrEqual",
        "Not",
        "And",
        "Or",
        "Xor",
        "IsNaN",
    ):
        return [TensorProto.BOOL] * len(node.output)
    data = node.input[1] if kind == "Where" else node.input[1] if kind == "CastLike" else node.input[0]
    return [made if types[data] in FLOATS else types[data]] * len(node.output)


def _declare(value: onnx.ValueInfoProto, port: Port) -> int:
    """Gives a graph input or output the type and sizes of its port."""
    value.CopyFrom(helper.make_tensor_value_info(value.name, PORTS[port.dtype], list(port.shape)))
    return int(PORTS[port.dtype])


def _cast(source: str, target: str, kind: int) -> NodeProto:
    return helper.make_node("Cast", [source], [target], f"cast.{target}", to=kind)


def _tensor(name: str, array: np.ndarray, kind: int) -> TensorProto:
    if kind == TensorProto.FLOAT16:
        array = np.clip(array, -_FP16_MAX, _FP16_MAX)  # a mask of -1e9 must not become -inf
    tensor = TensorProto(name=name, data_type=kind, dims=array.shape)
    tensor.raw_data = _bits(array, kind).tobytes()
    return tensor


def _bits(array: np.ndarray, kind: int) -> np.ndarray:
    if kind == FLOAT:
        return array
    if kind == TensorProto.FLOAT16:
        return array.astype(np.float16)
    bits = array.view(np.uint32)
    nearest = bits + 0x7FFF + ((bits >> 16) & 1)  # ties to even; weights hold no NaN
    return (nearest >> 16).astype(np.uint16)
