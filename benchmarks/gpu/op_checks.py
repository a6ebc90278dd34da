"""Every op case on a GPU against float64, a record at a time: what raises is a record too, and a context that it cost ends the checks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pyengine.export.ops import OPS
from pyengine.export.ops.frame_window_attention import CASES, reference
from pyengine.export.ops.frame_window_attention_cases import GROUP_CASES, AttentionCase

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "ops"))
from arrays import cast, error, in_precision
from cuda_arrays import CudaOps, TensorArray

__all__ = [
    "PLAIN",
    "CudaOps",
    "TensorArray",
    "check",
    "check_warpgroups",
    "context_lives",
    "in_precision",
    "one_line",
    "warpgroups",
]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FLOOR = {"float32": 1e-6, "bfloat16": 4e-3, "float16": 5e-4}
PLAIN = tuple(spec for spec in OPS if spec.reference is not reference)  # ring_append is in tests/ops


@contextmanager
def warpgroups(ops: CudaOps) -> Iterator[None]:
    """Attention of scope frame by the kernel for Hopper's warpgroups."""
    before = ops.module.use_warpgroups(True)
    try:
        yield
    finally:
        ops.module.use_warpgroups(before)


def check(ops: CudaOps, small: bool) -> Iterator[dict[str, Any]]:
    """Errors of every case of every op, by the kernels that are on without being asked for, beside torch's own in the same dtype."""
    for name, dtype in DTYPES.items():
        for case in CASES[:: 3 if small else 1]:
            yield record(ops, "FrameWindowAttention", case.name, name, lambda: _attention(ops, case, name))  # noqa: B023
        for spec in PLAIN:
            for one in spec.cases[:: 3 if small else 1]:
                yield record(ops, spec.name, one.name, name, lambda: _plain(ops, spec, one, dtype))  # noqa: B023


def check_warpgroups(ops: CudaOps) -> Iterator[dict[str, Any]]:
    """The same of the kernel for warpgroups, in a process of its own: one wrong instruction loses the context."""
    for name in DTYPES:
        for case in GROUP_CASES if name != "float32" else ():
            with warpgroups(ops):
                yield record(ops, "FrameWindowAttention", f"{case.name} on warpgroups", name,
                             lambda: _attention(ops, case, name))  # fmt: skip  # noqa: B023


def record(
    ops: CudaOps, op: str, case: str, dtype: str, errors: Callable[[], tuple[float, float, float]]
) -> dict[str, Any]:
    """A case as it is kept. `errors()` is ours, torch's, and how much of ours is always allowed."""
    found: dict[str, Any] = {"op": op, "case": case, "dtype": dtype, "good": False}
    try:
        ours, theirs, floor = errors()
    except Exception as problem:
        return found | {"failed": one_line(problem), "context": context_lives(ops)}
    return found | {"error": ours, "torch_error": theirs, "good": ours <= 2 * theirs + floor}


def one_line(problem: Exception) -> str:
    return f"{type(problem).__name__}: {(str(problem).splitlines() or [''])[0]}"


def context_lives(ops: CudaOps) -> bool:
    """False after an error that every later call of the process reports again."""
    if ops.device != "cuda":
        return True
    try:
        torch.cuda.synchronize()
        torch.zeros(1, device="cuda").item()
    except RuntimeError:
        return False
    return True


def _attention(ops: CudaOps, case: AttentionCase, name: str) -> tuple[float, float, float]:
    exact = reference(**case.make_inputs(), **case.attributes)
    inputs = cast(case.make_inputs(), DTYPES[name])
    theirs = error(reference(**inputs, **case.attributes)[0], exact[0])
    slots = [[-1] * case.frames] * case.streams
    got = ops.attention(inputs, slots, workspace=True, **case.attributes)["out"]
    return error(got, exact[0]), theirs, FLOOR[name]


def _plain(ops: CudaOps, spec: Any, case: Any, dtype: torch.dtype) -> tuple[float, float, float]:
    attributes = getattr(case, "attributes", {})
    given = in_precision(spec, case.make_inputs(), dtype)
    wide = {k: v.double() if v is not None and v.is_floating_point() else v for k, v in given.items()}
    exact = spec.reference(**wide, **attributes)
    working = given[spec.inputs[0]].dtype
    theirs = error(spec.reference(**cast(wide, working), **attributes)[0], exact[0])
    ours = error(ops.run(spec, given, exact[0].shape, **attributes), exact[0])
    return ours, theirs, FLOOR[str(working).removeprefix("torch.")]
