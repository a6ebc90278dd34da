"""Shapes of tensors that ONNX shape inference leaves open: run the model at a few sizes, and read them off as
formulas.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper

from pyengine.bundle.bundle import TensorSpec


def measured_values(
    model: onnx.ModelProto, names: Sequence[str], symbols: Mapping[str, int]
) -> dict[str, onnx.ValueInfoProto]:
    """Value infos of these tensors of a small model, with dims that are sums of products of the symbols."""
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    # Distinct primes that appear nowhere else, so that no two formulas agree by chance.
    low = dict(zip(sorted(symbols), (11, 13, 17, 19), strict=False))
    if len(low) < len(symbols):
        raise ValueError(f"[export] expected at most 4 symbols but got {', '.join(sorted(symbols))}")
    products = [group for count in range(len(low) + 1) for group in combinations(low, count)]
    probes = [{symbol: low[symbol] + (12 if symbol in group else 0) for symbol in low} for group in products]
    check = {symbol: size + 7 for symbol, size in low.items()}
    runs = [_run(model, names, probe) for probe in (*probes, check)]
    values = {}
    for index, name in enumerate(names):
        shapes = [run[index].shape for run in runs]
        dims = [
            _formula(name, products, probes, check, [shape[axis] for shape in shapes])
            for axis in range(len(shapes[0]))
        ]
        values[name] = helper.make_tensor_value_info(
            name, helper.np_dtype_to_tensor_dtype(runs[0][index].dtype), dims
        )
    return values


def _run(model: onnx.ModelProto, names: Sequence[str], sizes: Mapping[str, int]) -> list[np.ndarray]:
    feeds = {}
    for value in model.graph.input:
        kind = value.type.tensor_type
        spec = TensorSpec(tuple(dim.dim_param or dim.dim_value for dim in kind.shape.dim), "")
        feeds[value.name] = np.zeros(spec.resolve(sizes), helper.tensor_dtype_to_np_dtype(kind.elem_type))
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [np.asarray(array) for array in session.run(list(names), feeds)]


def _formula(
    name: str,
    products: Sequence[tuple[str, ...]],
    probes: Sequence[Mapping[str, int]],
    check: Mapping[str, int],
    sizes: Sequence[int],
) -> int | str:
    """The dim with these sizes at the probes, the last of them at `check`, as `2*frames*streams+ring+1`."""
    terms = np.array([[_product(group, probe) for group in products] for probe in probes], np.float64)
    factors = np.round(np.linalg.solve(terms, np.array(sizes[:-1], np.float64))).astype(int)
    found = sum(int(f) * _product(group, check) for f, group in zip(factors, products, strict=True))
    if factors.min() < 0 or found != sizes[-1]:
        raise ValueError(f"[export] a dim of {name} is no sum of products of sizes: got {list(sizes)}")
    parts = [
        "*".join(([str(f)] if f > 1 else []) + list(group))
        for f, group in zip(factors, products, strict=True)
        if f and group
    ]
    constant = int(factors[0])
    if not parts:
        return constant
    return "+".join((*parts, str(constant)) if constant else parts)


def _product(symbols: Sequence[str], sizes: Mapping[str, int]) -> int:
    return math.prod(sizes[symbol] for symbol in symbols)
