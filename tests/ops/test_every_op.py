"""Every case of every op that has no memory of its own, on every instruction set of this CPU and by the CUDA kernels, in every
dtype, against float64 torch. An op needs no test file to be held to its meaning; FrameWindowAttention, which appends to
rings, has one.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from arrays import FLOOR, cast, error, from_numpy, in_precision, run_op, to_numpy
from cuda_arrays import CudaOps

from pyengine import _C
from pyengine.export.ops import OPS, OpSpec, spec_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FLOORS = {**FLOOR, "float16": 5e-4}
STATELESS = [spec for spec in OPS if "append_slot" not in _C.SIGNATURES[spec.kernel]["arrays"]]
ROWS = [
    pytest.param(spec.name, case.name, id=f"{spec.name}-{case.name}")
    for spec in STATELESS
    for case in spec.cases
]
FIRST = [pytest.param(spec.name, id=spec.name) for spec in STATELESS]


@cache
def case_of(
    op: str, case: str, dtype: str
) -> tuple[dict[str, Any], dict[str, Any], torch.Tensor, torch.Tensor]:
    """Inputs in this precision, attributes, the exact first output and torch's own in this precision."""
    spec = spec_of(op)
    made = next(one for one in spec.cases if one.name == case)
    attributes = getattr(made, "attributes", {})
    given = in_precision(spec, made.make_inputs(), DTYPES[dtype])
    wide = {name: v.double() if v is not None and v.is_floating_point() else v for name, v in given.items()}
    exact = spec.reference(**wide, **attributes)[0]
    first = given[spec.inputs[0]].dtype
    return given, attributes, exact, spec.reference(**cast(wide, first), **attributes)[0]


def as_good_as_torch(got: torch.Tensor, op: str, case: str, dtype: str) -> None:
    """The rule of this project: at most twice the error that plain PyTorch makes in the dtype of the output."""
    _, _, exact, torch_got = case_of(op, case, dtype)
    ours, theirs = error(got, exact), error(torch_got, exact)
    floor = FLOORS[str(torch_got.dtype).removeprefix("torch.")]
    assert ours <= 2 * theirs + floor, f"error {ours:.3g}, torch {theirs:.3g}"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("op", "case"), ROWS)
def test_matches_reference(op: str, case: str, dtype: str, isa: str) -> None:
    given, attributes, exact, _ = case_of(op, case, dtype)
    as_good_as_torch(from_numpy(run_op(spec_of(op), given, exact.shape, **attributes)), op, case, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("op", "case"), ROWS)
def test_cuda_matches_reference(op: str, case: str, dtype: str, cuda_ops: CudaOps) -> None:
    if not hasattr(cuda_ops.module, spec_of(op).kernel):
        pytest.skip("the op has no CUDA kernel")
    given, attributes, exact, _ = case_of(op, case, dtype)
    as_good_as_torch(cuda_ops.run(spec_of(op), given, exact.shape, **attributes), op, case, dtype)


@pytest.mark.parametrize("op", FIRST)
def test_is_the_same_on_one_thread_and_on_many(op: str) -> None:
    for case in spec_of(op).cases:
        given, attributes, exact, _ = case_of(op, case.name, "bfloat16")
        runs = []
        try:
            for threads in (1, 3):
                _C.set_threads(threads)
                runs.append(run_op(spec_of(op), given, exact.shape, **attributes))
        finally:
            _C.set_threads(0)
        assert (runs[0] == runs[1]).all(), case.name


@pytest.mark.parametrize("spec", OPS, ids=lambda spec: spec.name)
def test_the_kernel_takes_what_the_onnx_op_takes(spec: OpSpec, emulated_ops: CudaOps) -> None:
    takes = _C.SIGNATURES[spec.kernel]
    assert takes["inputs"] == (*spec.inputs, *spec.optional_inputs)
    assert set(takes["attributes"]) == set(spec.attributes)
    assert "out" in takes["arrays"]
    on_device = emulated_ops.module.SIGNATURES.get(spec.kernel, takes)
    assert on_device["inputs"] == takes["inputs"]


@pytest.mark.parametrize("op", FIRST)
def test_bad_arguments_are_named(op: str) -> None:
    spec = spec_of(op)
    given, attributes, exact, _ = case_of(op, spec.cases[0].name, "float32")
    arrays = {name: None if tensor is None else to_numpy(tensor) for name, tensor in given.items()}
    arrays["out"] = to_numpy(exact.float())
    call = getattr(_C, spec.kernel)
    for name in (*spec.inputs, "out"):
        for bad in (None, arrays[name].astype("int8")):
            with pytest.raises(ValueError, match=rf"^\[{spec.kernel}\] expected {name} "):
                call(**{**arrays, name: bad}, **attributes)
    with pytest.raises(TypeError, match=rf"^\[{spec.kernel}\] got an unexpected argument 'colour'"):
        call(**arrays, colour=1)
