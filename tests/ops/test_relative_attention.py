"""Every case of RelativeAttention, on every instruction set of this CPU, in every dtype, against float64 torch."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from arrays import DTYPES, assert_as_good_as_torch, cast, from_numpy, to_numpy

from pyengine import _C
from pyengine.export.ops.relative_attention import CASES, RelativeCase, reference


def run(inputs: dict[str, torch.Tensor | None], **attributes: Any) -> np.ndarray:
    """_C.relative_attention on torch inputs; the tables are float32, as a bundle keeps them."""
    qkv = to_numpy(inputs["qkv"])
    tables = [None if inputs[k] is None else inputs[k].float().numpy() for k in ("key_table", "value_table")]
    batch, frames, places, _, heads, head_dim = qkv.shape
    out = np.full((batch, frames, places, heads * head_dim), 7, qkv.dtype)
    _C.relative_attention(qkv, *tables, out=out, transposed=bool(attributes.get("transposed", 0)))
    return out


@cache
def expected(name: str, dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference in float64 and in `dtype`, from the same inputs."""
    case = next(c for c in CASES if c.name == name)
    inputs = case.make_inputs()
    exact = reference(**inputs, **case.attributes)[0]
    return exact, reference(**cast(inputs, DTYPES[dtype]), **case.attributes)[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_reference(case: RelativeCase, dtype: str, isa: str) -> None:
    exact, torch_got = expected(case.name, dtype)
    got = run(cast(case.make_inputs(), DTYPES[dtype]), **case.attributes)
    assert_as_good_as_torch(got, torch_got, exact, dtype)


def test_the_transposed_form_is_another_function(isa: str) -> None:
    inputs = cast(RelativeCase("short").make_inputs(), torch.float32)
    plain, transposed = (from_numpy(run(inputs, transposed=value)) for value in (0, 1))
    assert (plain - transposed).abs().max() > 0.1


def test_is_the_same_on_one_thread_and_on_many() -> None:
    inputs = cast(RelativeCase("threads", places=300, batch=2).make_inputs(), torch.float32)
    many = run(inputs)
    _C.set_threads(1)
    try:
        np.testing.assert_array_equal(run(inputs), many)
    finally:
        _C.set_threads(0)


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
