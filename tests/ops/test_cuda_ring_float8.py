"""A ring of float8_e4m3 with a scale per head: what it costs in accuracy, against float64."""

from __future__ import annotations

import pytest
import torch
from arrays import cast, error
from cuda_arrays import CudaOps

from pyengine.export.ops.frame_window_attention import reference
from pyengine.export.ops.frame_window_attention_cases import AttentionCase

LARGEST = 448.0  # of float8_e4m3

CASES = [
    AttentionCase("temporal_64", attributes={"rotary_dim": 64}),
    AttentionCase("temporal_72", head_dim=72, frames=20, heads=3, attributes={"rotary_dim": 72}),
    AttentionCase("frame_128", head_dim=128, branches=1, frames=2, ring=3, tokens=40,
                  attributes={"scope": "frame", "rotary_dim": 128}),
    AttentionCase("rows_40", head_dim=40, branches=1, attributes={"rotary_dim": 40}),
]  # fmt: skip


def quantise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [B, R, N, H, D] as (float8, scale [H]): the largest value of each head becomes 448."""
    scale = (x.double().abs().amax((0, 1, 2, 4)) / LARGEST).clamp_min(1e-12).float()
    return (x.float() / scale[:, None]).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scale


def widen(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """What a quantised ring holds, in float64."""
    return x.double() * scale.double()[:, None]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_reads_and_appends(cuda_ops: CudaOps, case: AttentionCase, dtype: torch.dtype) -> None:
    check(cuda_ops, case, dtype)


def test_warpgroups_read_and_append(cuda_ops: CudaOps) -> None:
    if not cuda_ops.module.has_warpgroups():
        pytest.skip("the GPU has no warpgroups of compute capability 9.0")
    before = cuda_ops.module.use_warpgroups(True)
    try:
        for head_dim in (64, 128):
            check(cuda_ops, AttentionCase("groups", branches=1, frames=2, ring=2, tokens=66, head_dim=head_dim,
                                          attributes={"scope": "frame", "rotary_dim": 64}), torch.bfloat16)  # fmt: skip
    finally:
        cuda_ops.module.use_warpgroups(before)


def check(cuda_ops: CudaOps, case: AttentionCase, dtype: torch.dtype) -> None:
    inputs = case.make_inputs()
    kept = {name: quantise(inputs[name]) for name in ("ring_key", "ring_value")}
    held = {**inputs, **{name: widen(*pair) for name, pair in kept.items()}}
    exact = reference(**held, **case.attributes)  # of the values that the ring really holds
    given = cast(inputs, dtype)
    torch_got = reference(**cast(held, dtype), **case.attributes)
    given["ring_key"], given["ring_value"] = kept["ring_key"][0], kept["ring_value"][0]
    scales = (kept["ring_key"][1], kept["ring_value"][1])
    slots = [1, -1, 0] + [-1] * (case.frames - 3) if case.frames > 2 else [1, -1]
    got = cuda_ops.attention(given, [slots], ring_scales=scales, **case.attributes)
    floor = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 1e-6}[dtype]
    assert error(got["out"], exact[0]) <= 2 * error(torch_got[0], exact[0]) + floor
    for frame, slot in enumerate(slots):
        if slot < 0:
            continue
        for name, new, scale in zip(("ring_key", "ring_value"), torch_got[1:], scales, strict=True):
            wanted = new[:, frame].double()
            stored = widen(got[name][:, slot], scale)
            clipped = wanted.clamp(-LARGEST * scale.double()[:, None], LARGEST * scale.double()[:, None])
            # half a unit of a 3-bit mantissa, and what dtype itself rounds
            allowed = clipped.abs() * (2**-4 + 2**-8) + scale.double()[:, None] * 2**-9
            assert ((stored - clipped).abs() <= allowed).all()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_of_the_whole_ring_in_float8(case: AttentionCase) -> None:
    """Pure float64 but for the ring: the error of the option itself, root mean square over that of the output.
    Measured on normal keys and values: 2.6 to 3.3 %; rounding the same ring to bfloat16 costs 0.16 to 0.20 %.
    """
    inputs = case.make_inputs()
    exact = reference(**inputs, **case.attributes)[0]

    def relative(ring: dict[str, torch.Tensor]) -> float:
        difference = reference(**{**inputs, **ring}, **case.attributes)[0] - exact
        return float((difference.square().mean() / exact.square().mean()).sqrt())

    names = ("ring_key", "ring_value")
    float8 = relative({name: widen(*quantise(inputs[name])) for name in names})
    # The inputs are bfloat16 numbers already, so another scale makes rounding show.
    rounded = relative({name: (1.37 * inputs[name]).bfloat16().double() / 1.37 for name in names})
    assert 5 * rounded < float8 < 0.04
    assert 0.001 < rounded < 0.003


def test_scales_come_with_a_quantised_ring_only(cuda_ops: CudaOps) -> None:
    case = CASES[0]
    inputs = cast(case.make_inputs(), torch.bfloat16)
    scales = (torch.ones(2), torch.ones(2))
    with pytest.raises(ValueError, match="ring_key_scale and ring_value_scale only with a float8_e4m3 ring"):
        cuda_ops.attention(inputs, ring_scales=scales)
    inputs["ring_key"] = inputs["ring_key"].to(torch.float8_e4m3fn)
    inputs["ring_value"] = inputs["ring_value"].to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="expected ring_key_scale of dtype float32 but got nothing"):
        cuda_ops.attention(inputs)
