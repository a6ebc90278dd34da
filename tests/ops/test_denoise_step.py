from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from arrays import assert_as_good_as_torch, cast, to_numpy

from pyengine import _C
from pyengine.export.ops.denoise_step import DENOISE_STEP, StepCase, reference


def run(inputs: dict[str, torch.Tensor | None], in_place: bool = False) -> np.ndarray:
    arrays: dict[str, Any] = {k: None if v is None else to_numpy(v) for k, v in inputs.items()}
    out = arrays["sample"] if in_place else np.full_like(arrays["sample"], np.nan)
    _C.denoise_step(**arrays, out=out)
    return out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", DENOISE_STEP.cases, ids=str)
def test_matches_reference(case: StepCase, dtype: str, isa: str) -> None:
    inputs = case.make_inputs()
    (exact,), (torch_got,) = reference(**inputs), reference(**cast(inputs, torch.float32))
    given = cast(inputs, torch.float32)
    if dtype == "bfloat16":
        given["prediction"] = given["prediction"].bfloat16()
    got = run(given)
    assert_as_good_as_torch(got, torch_got, exact, "float32")
    np.testing.assert_array_equal(got, run(given, in_place=True))


def test_clean_frames_are_copied_bit_for_bit(isa: str) -> None:
    given = cast(StepCase("copies", frames=4, copies=4).make_inputs(), torch.float32)
    awkward = torch.tensor([-0.0, 1e-42, float("nan"), float("inf")])
    given["sample"].view(-1)[:4] = awkward
    given["prediction"][:] = float("nan")
    np.testing.assert_array_equal(run(given).view(np.uint32), to_numpy(given["sample"]).view(np.uint32))


def test_a_stream_in_a_batch_is_the_same_alone(isa: str) -> None:
    case = StepCase("batch", streams=3, frames=4, values=(5, 7), branches=3, noise=True)
    given = cast(case.make_inputs(), torch.float32)
    whole = run(given)
    for stream in range(case.streams):
        own = slice(stream, stream + 1)
        alone = {
            name: None if v is None else v[:, own] if name in ("prediction", "weights") else v[own]
            for name, v in given.items()
        }
        np.testing.assert_array_equal(run(alone), whole[own])


def test_an_operand_of_scale_zero_is_not_read(isa: str) -> None:
    given = cast(StepCase("zero", copies=0).make_inputs(), torch.float32)
    given["sample_scale"].zero_()
    given["sample"][:] = float("nan")
    assert np.isfinite(run(given)).all()


def test_bfloat16_prediction_equals_the_same_values_in_float32(isa: str) -> None:
    given = cast(StepCase("same", frames=5, values=(13,)).make_inputs(), torch.float32)
    wide = run(given)
    given["prediction"] = given["prediction"].bfloat16()
    np.testing.assert_array_equal(run(given), wide)


GOOD = {
    k: None if v is None else to_numpy(v) for k, v in cast(StepCase("x").make_inputs(), torch.float32).items()
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample": np.zeros((1, 8, 16, 8, 8))}, "expected sample of dtype float32"),
        (
            {"prediction": np.zeros((1, 8, 16, 8, 8), np.float32)},
            r"expected prediction \[branches, streams, frames, \.\.\.\]",
        ),
        (
            {"prediction": np.zeros((2, 1, 8, 16, 8, 8), np.int32)},
            "expected prediction of dtype float32 or bfloat16",
        ),
        ({"weights": np.zeros(3, np.float32)}, r"expected weights of shape \[2,1\] but got float32 \[3\]"),
        ({"sample_scale": np.zeros(8)}, "expected sample_scale of dtype float32"),
        (
            {"noise_scale": np.ones((1, 8), np.float32)},
            r"expected noise because noise_scale\[0,0\] is 1 but got nothing",
        ),
        ({"noise": np.zeros((1, 8, 16, 8), np.float32)}, "expected noise shaped like sample"),
        ({"out": np.zeros((1, 8, 16, 64), np.float32)}, "expected out shaped like sample"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, Any], message: str) -> None:
    arguments = {**GOOD, "out": np.zeros((1, 8, 16, 8, 8), np.float32), **changes}
    with pytest.raises(ValueError, match=r"^\[denoise_step\] " + message):
        _C.denoise_step(**arguments)
