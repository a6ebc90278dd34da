"""What describes one op: tests, benchmarks and the exporter all read the same `OpSpec`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
import torch

DOMAIN = "pyengine"
VERSION = 1

Attributes = Mapping[str, Any]


@dataclass(frozen=True)
class OpSpec:
    """One op of the ONNX domain `pyengine`.

    `reference(*inputs, **attributes)` is plain torch in any float dtype, float64 included, to a tuple.
    `entry` has the same signature; while `torch.onnx.export` runs it leaves one opaque node instead.
    `onnx_function(attributes, node_inputs, opset)` is the body that says what the node means; `node_inputs`
    are the node's input names with "" where an optional one is absent.
    `working` names the inputs that come in the working precision; other floats are float32. The first output has
    the dtype of the first input.
    `cases` are small and awkward, for correctness; `bench_cases` are the shapes that have to be fast. A case has a
    `name`, `make_inputs(seed, dtype)` by input name (None: absent) and, unless the op has none, its `attributes`;
    `operations`, for benchmarks, counts those of matrix products.
    """

    name: str
    inputs: tuple[str, ...]
    optional_inputs: tuple[str, ...]
    working: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Attributes  # names and default values
    reference: Callable[..., tuple[torch.Tensor, ...]]
    entry: Callable[..., Any]
    onnx_function: Callable[[Attributes, Sequence[str] | None, int], onnx.FunctionProto]
    cases: tuple[Any, ...]
    bench_cases: tuple[Any, ...]

    @property
    def kernel(self) -> str:
        """The name of the compiled op in `pyengine._C` and `pyengine._cuda`."""
        return re.sub(r"(?<!^)(?=[A-Z])", "_", self.name).lower()

    def node_attributes(self, node: onnx.NodeProto) -> dict[str, Any]:
        """Every attribute of `node` as a Python value, defaults filled in; an unknown one is a ValueError."""
        values = dict(self.attributes)
        for attribute in node.attribute:
            if attribute.name not in values:
                raise ValueError(
                    f"expected {self.name} attributes among {sorted(values)} but got {attribute.name!r}"
                )
            value = onnx.helper.get_attribute_value(attribute)
            values[attribute.name] = value.decode() if isinstance(value, bytes) else value
        return values
