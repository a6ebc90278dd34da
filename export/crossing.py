"""Shapes of tensors that ONNX shape inference leaves open: run the model at a few sizes, and read them off as
formulas.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper

from pyengine.bundle.bundle import TensorSpec


def measured_values(
    model: onnx.ModelProto, names: Sequence[str], symbols: Mapping[str, int]
) -> dict[str, onnx.ValueInfoProto]:
    """Value infos of these tensors of a small model, with dims that are affine in the symbols."""
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    # Distinct primes that appear nowhere else, so that no two formulas agree by chance.
    bases = dict(zip(sorted(symbols), (11, 13, 17, 19), strict=False))
    probes = [bases] + [bases | {symbol: bases[symbol] + 12} for symbol in bases]
    check = {symbol: size + 7 for symbol, size in bases.items()}
    runs = [_run(model, names, probe) for probe in (*probes, check)]
    values = {}
    for index, name in enumerate(names):
        shapes = [run[index].shape for run in runs]
        dims = [
            _formula(name, list(bases), probes, check, [shape[axis] for shape in shapes])
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
    symbols: Sequence[str],
    probes: Sequence[Mapping[str, int]],
    check: Mapping[str, int],
    sizes: Sequence[int],
) -> int | str:
    """The dim with these sizes at the probes as `2*frames+ring+1`."""
    base = probes[0]
    slopes = [
        (sizes[1 + i] - sizes[0]) // (probes[1 + i][symbol] - base[symbol])
        for i, symbol in enumerate(symbols)
    ]
    constant = sizes[0] - sum(slope * base[symbol] for slope, symbol in zip(slopes, symbols, strict=True))
    if (
        constant < 0
        or constant + sum(slope * check[symbol] for slope, symbol in zip(slopes, symbols, strict=True))
        != sizes[-1]
    ):
        raise ValueError(
            f"[export] a dim of {name} is no sum of multiples of {', '.join(symbols)}: got {list(sizes)}"
        )
    pairs = zip(slopes, symbols, strict=True)
    terms = [symbol if slope == 1 else f"{slope}*{symbol}" for slope, symbol in pairs if slope]
    if not terms:
        return constant
    return "+".join((*terms, str(constant)) if constant else terms)
