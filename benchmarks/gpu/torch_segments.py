"""Segments run by PyTorch, op by op: for checking the engine on a machine whose only GPU library is PyTorch.

    import torch_segments; torch_segments.register()
    engine = pyengine.load("shapes", backend="torch", choice="cut", precision="bf16")

Our kernels, the ring, graph capture and delivery are then the engine's own; only the dense algebra between them is
eager PyTorch. Nobody should ship this: it compiles nothing. It reads the same typed graphs as TensorRT.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import TensorProto, numpy_helper
from torch import Tensor

from pyengine.backends import base as backends
from pyengine.backends.base import Ports, Precision, Symbols
from pyengine.backends.typed_graph import typed_graph
from pyengine.errors import ConfigError, PlanError

NAME = "torch"
DTYPES = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.BFLOAT16: torch.bfloat16,
    TensorProto.INT64: torch.int64,
    TensorProto.INT32: torch.int32,
    TensorProto.UINT8: torch.uint8,
    TensorProto.BOOL: torch.bool,
}
Attributes = Mapping[str, Any]
Op = Callable[[Sequence[Any], Attributes], Tensor]


def _ints(tensor: Tensor) -> list[int]:
    """Sizes and axes. They are constants of the graph, kept on the host."""
    if tensor.is_cuda:
        raise PlanError("[torch] expected sizes that are constants but got ones made on the GPU")
    return [int(value) for value in tensor.reshape(-1)]


def _axes(values: Sequence[Any], attributes: Attributes) -> list[int] | None:
    if len(values) > 1 and values[1] is not None:
        return _ints(values[1])
    axes = attributes.get("axes")
    return None if axes is None else list(axes)


def _product(x: Tensor, axes: Sequence[int], keepdim: bool) -> Tensor:
    """torch.prod over several axes."""
    for axis in sorted((axis % x.dim() for axis in axes), reverse=True):
        x = x.prod(axis, keepdim=keepdim)
    return x


def _reduce(function: Callable[..., Tensor]) -> Op:
    def run(values: Sequence[Any], attributes: Attributes) -> Tensor:
        axes = _axes(values, attributes)
        dims = list(range(values[0].ndim)) if axes is None else axes
        return function(values[0], dims, keepdim=bool(attributes.get("keepdims", 1)))

    return run


def _reshape(values: Sequence[Any], attributes: Attributes) -> Tensor:
    data, shape = values[0], _ints(values[1])
    return data.reshape([data.shape[i] if size == 0 else size for i, size in enumerate(shape)])


def _slice(values: Sequence[Any], attributes: Attributes) -> Tensor:
    data, starts, ends = values[0], _ints(values[1]), _ints(values[2])
    axes = _ints(values[3]) if len(values) > 3 and values[3] is not None else list(range(len(starts)))
    steps = _ints(values[4]) if len(values) > 4 and values[4] is not None else [1] * len(starts)
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        if step < 1:
            raise PlanError(f"[torch] expected slices that go forward but got step {step}")
        index = [slice(None)] * data.ndim
        index[axis] = slice(max(start, -data.shape[axis]), min(end, data.shape[axis]), step)
        data = data[tuple(index)]
    return data


def _squeeze(values: Sequence[Any], attributes: Attributes) -> Tensor:
    axes = _axes(values, attributes)
    return values[0].squeeze() if axes is None else values[0].squeeze(tuple(axes))


def _unsqueeze(values: Sequence[Any], attributes: Attributes) -> Tensor:
    axes, data = _axes(values, attributes) or [], values[0]
    rank = data.ndim + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        data = data.unsqueeze(axis)
    return data


def _gather(values: Sequence[Any], attributes: Attributes) -> Tensor:
    data, index = values
    axis = attributes.get("axis", 0) % data.ndim
    index = torch.where(index < 0, index + data.shape[axis], index)
    found = data.index_select(axis, index.reshape(-1))
    return found.reshape(*data.shape[:axis], *index.shape, *data.shape[axis + 1 :])


def _layer_norm(values: Sequence[Any], attributes: Attributes) -> Tensor:
    data, axis = values[0], attributes.get("axis", -1)
    bias = values[2] if len(values) > 2 else None
    return F.layer_norm(data, data.shape[axis:], values[1], bias, attributes.get("epsilon", 1e-5))


def _conv(values: Sequence[Any], attributes: Attributes) -> Tensor:
    data, weight = values[0], values[1]
    bias = values[2] if len(values) > 2 else None
    rank = weight.ndim - 2
    pads = list(attributes.get("pads", [0] * (2 * rank)))
    both = [amount for axis in reversed(range(rank)) for amount in (pads[axis], pads[rank + axis])]
    if attributes.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
        raise PlanError("[torch] expected convolutions with explicit padding")
    run = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[rank]
    return run(F.pad(data, both), weight, bias, attributes.get("strides", [1] * rank), 0,
               attributes.get("dilations", [1] * rank), attributes.get("group", 1))  # fmt: skip


def _depth_to_space(values: Sequence[Any], attributes: Attributes) -> Tensor:
    data, size = values[0], attributes["blocksize"]
    n, c, h, w = data.shape
    if attributes.get("mode", b"DCR") == b"CRD":
        return F.pixel_shuffle(data, size)
    parts = data.reshape(n, size, size, c // size**2, h, w).permute(0, 3, 4, 1, 5, 2)
    return parts.reshape(n, c // size**2, h * size, w * size)


def _gemm(values: Sequence[Any], attributes: Attributes) -> Tensor:
    a, b = values[0], values[1]
    a, b = (a.mT if attributes.get("transA") else a), (b.mT if attributes.get("transB") else b)
    out = attributes.get("alpha", 1.0) * (a @ b)
    return out if len(values) < 3 else out + attributes.get("beta", 1.0) * values[2]


def _clip(values: Sequence[Any], attributes: Attributes) -> Tensor:
    low, high = (values[i] if len(values) > i else None for i in (1, 2))
    out = values[0]
    out = out if low is None else torch.maximum(out, low)
    return out if high is None else torch.minimum(out, high)


def _group_norm(values: Sequence[Any], attributes: Attributes) -> Tensor:
    return F.group_norm(
        values[0], attributes["num_groups"], values[1], values[2], attributes.get("epsilon", 1e-5)
    )


def _constant_of_shape(values: Sequence[Any], attributes: Attributes) -> Tensor:
    value = attributes.get("value", torch.zeros(1))
    return value.reshape(()).expand(_ints(values[0])).clone()


def _div(values: Sequence[Any], attributes: Attributes) -> Tensor:
    mode = None if values[0].is_floating_point() else "trunc"
    return torch.div(values[0], values[1], rounding_mode=mode)


def _same(function: Callable[..., Tensor]) -> Op:
    return lambda values, attributes: function(*values)


OPS: dict[str, Op] = {
    **{name: _same(function) for name, function in {
        "Add": torch.add, "And": torch.logical_and, "Cos": torch.cos, "Equal": torch.eq, "Erf": torch.erf, "Exp": torch.exp,
        "Floor": torch.floor, "GreaterOrEqual": torch.ge, "LessOrEqual": torch.le, "Greater": torch.gt, "Less": torch.lt,
        "MatMul": torch.matmul, "Mul": torch.mul, "Neg": torch.neg, "Not": torch.logical_not, "Or": torch.logical_or,
        "Pow": torch.pow, "Reciprocal": torch.reciprocal, "Relu": torch.relu, "Round": torch.round,
        "Sigmoid": torch.sigmoid, "Sin": torch.sin, "Sqrt": torch.sqrt, "Sub": torch.sub, "Tanh": torch.tanh,
        "Where": torch.where, "Max": torch.maximum, "Min": torch.minimum}.items()},
    "Cast": lambda v, a: v[0].to(DTYPES[a["to"]]),
    "CastLike": lambda v, a: v[0].to(v[1].dtype),
    "Clip": _clip,
    "Concat": lambda v, a: torch.cat(list(v), a["axis"]),
    "ConstantOfShape": _constant_of_shape,
    "Conv": _conv,
    "DepthToSpace": _depth_to_space,
    "Div": _div,
    "Expand": lambda v, a: v[0].expand(torch.broadcast_shapes(v[0].shape, tuple(_ints(v[1])))),
    "Gather": _gather,
    "Gelu": lambda v, a: F.gelu(v[0], approximate=a.get("approximate", b"none").decode()),
    "Gemm": _gemm,
    "GroupNormalization": _group_norm,
    "Identity": lambda v, a: v[0],
    "LayerNormalization": _layer_norm,
    "ReduceMax": _reduce(torch.amax),
    "ReduceMean": _reduce(torch.mean),
    "ReduceMin": _reduce(torch.amin),
    "ReduceProd": _reduce(_product),
    "ReduceSum": _reduce(torch.sum),
    "Reshape": _reshape,
    "Slice": _slice,
    "Softmax": lambda v, a: torch.softmax(v[0], a.get("axis", -1)),
    "Squeeze": _squeeze,
    "Transpose": lambda v, a: v[0].permute(a["perm"]),
    "Unsqueeze": _unsqueeze,
}  # fmt: skip
HOST_ARGUMENTS = {"Reshape": (1,), "Slice": (1, 2, 3, 4), "Squeeze": (1,), "Unsqueeze": (1,), "Expand": (1,),
                  "ConstantOfShape": (0,), "ReduceMax": (1,), "ReduceMean": (1,), "ReduceMin": (1,),
                  "ReduceProd": (1,), "ReduceSum": (1,)}  # fmt: skip


class Segment:
    """A typed graph as torch calls. Constants are kept on the host and, from the first run on, on the device too."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.inputs = [value.name for value in model.graph.input]
        self.outputs = [value.name for value in model.graph.output]
        self.constants = {tensor.name: _tensor(tensor) for tensor in model.graph.initializer}
        self.nodes = [(node, _attributes(node)) for node in model.graph.node]
        unknown = {node.op_type for node, _ in self.nodes} - set(OPS) - {"Constant", "Shape"}
        if unknown:
            raise PlanError(
                f"[torch] expected ops that torch_segments.py knows but got {', '.join(sorted(unknown))}"
            )
        self._moved: dict[tuple[int, int], Tensor] = {}

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {**self.constants, **feeds}
        for place, (node, attributes) in enumerate(self.nodes):
            if node.op_type == "Constant":
                made = attributes["value"]
            elif node.op_type == "Shape":
                shape = list(values[node.input[0]].shape)
                made = torch.tensor(shape[attributes.get("start", 0) : attributes.get("end", len(shape))])
            else:
                made = OPS[node.op_type](self._arguments(place, node, values), attributes)
            values[node.output[0]] = made
        return {name: values[name] for name in self.outputs}

    def _arguments(self, place: int, node: onnx.NodeProto, values: Mapping[str, Tensor]) -> list[Any]:
        """Constants beside data on a device go there, once: a captured run may copy nothing from the host."""
        found = [values[name] if name else None for name in node.input]
        device = next((value.device for value in found if value is not None and value.is_cuda), None)
        if device is None:
            return found
        hosts = HOST_ARGUMENTS.get(node.op_type, ())
        for index, value in enumerate(found):
            if value is not None and not value.is_cuda and index not in hosts:
                key = (place, index)
                if key not in self._moved:
                    self._moved[key] = value.to(device)
                found[index] = self._moved[key]
        return found


def _tensor(tensor: TensorProto) -> Tensor:
    array = numpy_helper.to_array(tensor)
    kind = DTYPES[tensor.data_type]
    if kind == torch.bfloat16:
        return torch.from_numpy(array.astype(np.float32)).to(kind)
    return torch.from_numpy(np.array(array))


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    found = {entry.name: onnx.helper.get_attribute_value(entry) for entry in node.attribute}
    return {name: _tensor(v) if isinstance(v, TensorProto) else v for name, v in found.items()}


class TorchEngine:
    """`backends.CudaEngine`: enqueues on the executor's stream, and can be captured with it."""

    arena_bytes = 0
    capturable, stream = True, None

    def __init__(self, segment: Segment) -> None:
        self.segment = segment

    def bind(self, inputs: Any, outputs: Any, stream: Any, arena: Any) -> Callable[[], None]:
        given = {name: torch.from_dlpack(inputs[name]) for name in self.segment.inputs}
        wanted = {name: torch.from_dlpack(outputs[name]) for name in self.segment.outputs}
        external = torch.cuda.ExternalStream(stream.handle)
        # Of its own, and alive as long as the call: what a captured run wrote, nobody else may own.
        pool = torch.cuda.MemPool()
        held = (inputs, outputs)

        def call(held: object = held) -> None:
            try:
                with torch.no_grad(), torch.cuda.stream(external), torch.cuda.use_mem_pool(pool):
                    for name, made in self.segment.run(given).items():
                        wanted[name].copy_(made)
            except RuntimeError as error:
                raise PlanError(f"[torch] a segment could not run: {str(error).splitlines()[0]}") from error

        return call


class TorchBackend:
    name, kind, remote = NAME, "cuda", False
    version = torch.__version__

    def __init__(self) -> None:
        from pyengine.device.cuda import runtime

        gpu = runtime()
        self.device = f"{gpu.capability} {gpu.name}"
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False

    def facts(self) -> dict[str, Any]:
        return {}

    def prepare(self, cache: Path, report: Callable[[str], object]) -> None:
        pass

    def precision(self, wanted: str) -> Precision:
        if wanted not in ("auto", "bf16", "fp16", "fp32"):
            raise ConfigError(f"expected precision auto, bf16, fp16 or fp32 but got {wanted!r}")
        return "bf16" if wanted == "auto" else wanted  # type: ignore[return-value]

    def compile(
        self,
        model: Path,
        symbols: Symbols,
        inputs: Ports,
        outputs: Ports,
        precision: Precision,
        threads: int | None,
    ) -> TorchEngine:
        return TorchEngine(Segment(typed_graph(model, symbols, inputs, outputs, precision)))

    def save(self, engine: TorchEngine, path: Path) -> bool:
        return False

    def load(self, path: Path, precision: Precision, threads: int | None) -> TorchEngine:
        raise PlanError(f"PyTorch saves no engines, so it cannot read {path}")


@cache
def backend() -> TorchBackend:
    return TorchBackend()


def register() -> None:
    """Makes `backend="torch"` known to this process."""
    sys.modules[f"{backends.__name__}.torch_segments"] = sys.modules[__name__]
    backends.MODULES[NAME, "cuda"] = ("torch_segments", "torch")
    backends.NAMES = tuple(dict.fromkeys((*backends.NAMES, NAME)))
