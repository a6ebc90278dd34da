"""The ops of the ONNX domain `pyengine`: one spec each, the `SPEC` of a module of this folder."""

from __future__ import annotations

import importlib
import pkgutil

import onnx

from .spec import DOMAIN, VERSION, OpSpec

__all__ = ["DOMAIN", "OPS", "VERSION", "OpSpec", "attach_functions", "spec_of"]


def _found() -> tuple[OpSpec, ...]:
    names = sorted(info.name for info in pkgutil.iter_modules(__path__))
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    return tuple(module.SPEC for module in modules if hasattr(module, "SPEC"))


OPS = _found()


def spec_of(op_type: str) -> OpSpec:
    """The spec of an op type, or a ValueError that lists them."""
    for spec in OPS:
        if spec.name == op_type:
            return spec
    raise ValueError(f"expected an op among {[spec.name for spec in OPS]} but got {op_type!r}")


def attach_functions(model: onnx.ModelProto) -> None:
    """Puts the function body of every `pyengine` node into `model`, in place, so that any runtime can run it.

    Nodes that differ in attributes or in which optional inputs they have get overloads of their own, named in
    `node.overload`.
    """
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    kept = [function for function in model.functions if function.domain != DOMAIN]
    bodies: dict[bytes, onnx.FunctionProto] = {}
    for node in model.graph.node:
        if node.domain != DOMAIN:
            continue
        spec = spec_of(node.op_type)
        body = spec.onnx_function(spec.node_attributes(node), list(node.input), opset)
        known = bodies.setdefault(body.SerializeToString(deterministic=True), body)
        if known is body:
            body.overload = f"{len(bodies)}"
        node.overload = known.overload
    del model.functions[:]
    model.functions.extend([*kept, *bodies.values()])
    if bodies and not any(entry.domain == DOMAIN for entry in model.opset_import):
        model.opset_import.append(onnx.helper.make_opsetid(DOMAIN, VERSION))
    model.ir_version = max(model.ir_version, 10)  # overloads exist since 10
