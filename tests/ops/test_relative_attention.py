"""What RelativeAttention does besides matching its reference (test_every_op.py), on the CPU and by its CUDA kernel."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from arrays import cast, error, from_numpy, in_precision, run_op
from cuda_arrays import CudaOps

from pyengine import _C
from pyengine.export.ops.relative_attention import SPEC, RelativeCase, reference


def run(inputs: dict[str, torch.Tensor | None], **attributes: Any) -> np.ndarray:
    """_C.relative_attention on torch inputs."""
    return run_op(SPEC, inputs, shape_of(inputs), **attributes)


def shape_of(inputs: dict[str, torch.Tensor | None]) -> tuple[int, ...]:
    """Of the output."""
    qkv = inputs["qkv"]
    assert qkv is not None
    return (*qkv.shape[:3], qkv.shape[4] * qkv.shape[5])


def test_the_transposed_form_is_another_function(isa: str) -> None:
    inputs = cast(RelativeCase("short").make_inputs(), torch.float32)
    plain, transposed = (from_numpy(run(inputs, transposed=value)) for value in (0, 1))
    assert (plain - transposed).abs().max() > 0.1


def test_huge_scores_do_not_overflow(isa: str) -> None:
    inputs = cast(RelativeCase("huge").make_inputs(), torch.float32)
    inputs["qkv"] *= 1e4
    assert np.isfinite(run(inputs)).all()


def arguments(**changes: Any) -> dict[str, Any]:
    arrays = {
        "qkv": np.zeros((1, 4, 3, 3, 2, 16), np.float32),
        "key_table": np.zeros((9, 16), np.float32),
        "value_table": np.zeros((9, 16), np.float32),
        "out": np.zeros((1, 4, 3, 32), np.float32),
    }
    return arrays | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qkv": np.zeros((1, 4, 3, 2, 2, 16), np.float32)}, r"qkv \[batch, frames, places, 3, heads"),
        ({"qkv": np.zeros((1, 4, 3, 3, 2, 16), np.float64)}, "qkv of dtype float32 or bfloat16"),
        ({"qkv": np.zeros((1, 0, 3, 3, 2, 16), np.float32)}, "qkv with values"),
        ({"key_table": None}, "key_table and value_table or neither"),
        ({"key_table": np.zeros((8, 16), np.float32)}, r"key_table \[2 \* reach \+ 1, head_dim\]"),
        ({"value_table": np.zeros((7, 16), np.float32)}, r"value_table of shape \[9,16\]"),
        ({"key_table": np.zeros((9, 16), np.uint16)}, "key_table of dtype float32"),
        ({"out": np.zeros((1, 4, 3, 31), np.float32)}, "out of shape"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"^\[relative_attention\] expected " + message):
        _C.relative_attention(**arguments(**changes))


CUDA_CASES = (
    RelativeCase("past_a_slice", frames=3, head_dim=260, heads=1, places=2, transposed=True),
    RelativeCase("past_a_warp", frames=35, head_dim=24, heads=1, places=2, reach=9),
    RelativeCase("last_block_is_half_full", batch=3, frames=5, heads=1, places=1, head_dim=7, reach=1),
)


@pytest.mark.parametrize("order", ["backward", "shuffled", "alone"])
@pytest.mark.parametrize("case", CUDA_CASES, ids=str)
def test_no_barrier_is_missing(
    emulated_ops: CudaOps, case: RelativeCase, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYENGINE_EMULATOR_ORDER", order)
    inputs = case.make_inputs()
    exact = reference(**inputs, **case.attributes)[0]
    theirs = error(reference(**cast(inputs, torch.bfloat16), **case.attributes)[0], exact)
    given = in_precision(SPEC, inputs, torch.bfloat16)
    got = emulated_ops.run(SPEC, given, shape_of(inputs), **case.attributes)
    assert error(got, exact) <= 2 * theirs + 4e-3


def test_cuda_takes_huge_scores(cuda_ops: CudaOps) -> None:
    inputs = cast(RelativeCase("huge").make_inputs(), torch.float32)
    inputs["qkv"] *= 1e4
    assert cuda_ops.run(SPEC, inputs, shape_of(inputs)).isfinite().all()


def test_cuda_names_bad_arguments(emulated_ops: CudaOps) -> None:
    def refused(message: str, **changes: torch.Tensor | None) -> None:
        inputs = cast(RelativeCase("good").make_inputs(), torch.float32) | changes
        with pytest.raises(ValueError, match=r"^\[relative_attention\] expected " + message):
            emulated_ops.run(SPEC, inputs, shape_of(inputs))

    refused("key_table and value_table or neither", key_table=None)
    refused(r"key_table \[2 \* reach \+ 1, head_dim\]", key_table=torch.zeros(8, 16))
    refused("qkv of dtype float32, float16 or bfloat16", qkv=torch.zeros(1, 4, 3, 3, 2, 16).int())
    refused("at most 2048 frames but got 2049", qkv=torch.zeros(1, 2049, 1, 3, 1, 16))
