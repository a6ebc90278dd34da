"""ScaledAdd: out = x + scale * y."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import onnx
import onnx.parser
import torch

from .spec import DOMAIN, VERSION, OpSpec


def reference(x: torch.Tensor, y: torch.Tensor, *, scale: float = 1.0) -> tuple[torch.Tensor]:
    return (x + scale * y,)


def scaled_add(x: torch.Tensor, y: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
    if not torch.onnx.is_in_onnx_export():
        return reference(x, y, scale=scale)[0]
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::ScaledAdd", [x, y], {"scale": scale}, dtype=x.dtype, shape=x.shape, version=VERSION
    )


def onnx_function(attributes: Any, node_inputs: Any = None, opset: int = 18) -> onnx.FunctionProto:
    return onnx.parser.parse_function(f"""
    <opset_import: ["" : {opset}, "{DOMAIN}" : {VERSION}], domain: "{DOMAIN}">
    ScaledAdd <scale> (x, y) => (out) {{
        s = Constant<value = float {{{float(attributes["scale"])!r}}}>()
        part = Mul(y, s)
        out = Add(x, part)
    }}""")


@dataclass(frozen=True)
class Case:
    name: str
    shape: tuple[int, int] = (3, 5)
    attributes: dict[str, Any] = field(default_factory=lambda: {"scale": 0.5})

    def make_inputs(self, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor | None]:
        x, y = torch.randn(2, *self.shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
        return {"x": x, "y": y}


SPEC = OpSpec(
    name="ScaledAdd",
    inputs=("x", "y"),
    optional_inputs=(),
    working=(),
    outputs=("out",),
    attributes={"scale": 1.0},
    reference=reference,
    entry=scaled_add,
    onnx_function=onnx_function,
    cases=(Case("toy"), Case("toy_one", (1, 1))),
    bench_cases=(Case("toy_large", (64, 1024)),),
)
