"""The CUDA kernels: every case of the ops in every dtype against float64, under the emulator on a CPU, and on a GPU where
pyengine was built for one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from arrays import cast, error
from cuda_arrays import CudaOps, TensorArray

from pyengine.export.ops.frame_window_attention import CASES, reference
from pyengine.export.ops.frame_window_attention_cases import GROUP_CASES, AttentionCase

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Half a unit in the last place of values around 1.
FLOOR = {
    "float32": 1e-6,
    "bfloat16": 4e-3,
    "float16": 5e-4,
}
# Under the emulator: in one 16-bit dtype.
SLOW = ("frame", "frame_absent", "frame_ranged", "frame_halves", "frame_streams_2", "frame_streams_3")


def as_good_as_torch(got: torch.Tensor, torch_got: torch.Tensor, exact: torch.Tensor, dtype: str) -> None:
    """The rule of this project: at most twice the error that plain PyTorch makes in the same dtype."""
    ours, theirs = error(got, exact), error(torch_got, exact)
    assert ours <= 2 * theirs + FLOOR[dtype], f"error {ours:.3g}, torch in {dtype} {theirs:.3g}"


def append_slots(case: AttentionCase) -> list[list[int]] | None:
    """The first frames of a stream go to slots 0, 2, 4, ..., a slot further for each stream; the others nowhere."""
    if case.ring == 0:
        return None
    return [
        [
            2 * i + s if 2 * i + s < case.ring and s not in case.absent_streams else -1
            for i in range(case.frames)
        ]
        for s in range(case.streams)
    ]


def check_attention(ops: CudaOps, case: AttentionCase, dtype: str, **options: Any) -> None:
    exact = reference(**case.make_inputs(), **case.attributes)
    inputs = cast(case.make_inputs(), DTYPES[dtype])
    torch_got = reference(**inputs, **case.attributes)
    slots = append_slots(case)
    got = ops.attention(inputs, slots, **options, **case.attributes)
    as_good_as_torch(got["out"], torch_got[0], exact[0], dtype)
    ring_key, ring_value = inputs["ring_key"].clone(), inputs["ring_value"].clone()
    for stream, row in enumerate(slots or ()):
        own = slice(stream, None, case.streams)
        for frame, slot in enumerate(row):
            if slot >= 0:
                as_good_as_torch(
                    got["ring_key"][own, slot], torch_got[1][own, frame], exact[1][own, frame], dtype
                )
                ring_key[own, slot], ring_value[own, slot] = (
                    got["ring_key"][own, slot],
                    torch_got[2][own, frame],
                )
    assert torch.equal(got["ring_key"], ring_key)  # no other slot is touched
    assert torch.equal(got["ring_value"], ring_value)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_matches_reference(cuda_ops: CudaOps, case: AttentionCase, dtype: str) -> None:
    if cuda_ops.device == "cpu" and dtype != "bfloat16" and case.name in SLOW:
        pytest.skip("takes seconds in the emulator; bfloat16 covers it")
    check_attention(cuda_ops, case, dtype)


CROSSING = [
    AttentionCase("temporal_many", frames=20, tokens=9, heads=3, ring=9, attributes={"rotary_dim": 64}),
    AttentionCase("temporal_one_team", frames=70, ring=5, tokens=2, attributes={"rotary_dim": 32}),
    AttentionCase("frame_long", branches=1, heads=1, frames=2, ring=2, tokens=150, empty=(1,),
                  attributes={"scope": "frame", "rotary_dim": 64}),
    AttentionCase("frame_wide", branches=1, heads=1, frames=2, ring=1, tokens=129, head_dim=128,
                  attributes={"scope": "frame", "rotary_dim": 128}),
]  # fmt: skip


@pytest.mark.parametrize("order", ["backward", "shuffled", "alone"])
@pytest.mark.parametrize("case", CROSSING, ids=str)
def test_no_barrier_is_missing(
    emulated_ops: CudaOps, case: AttentionCase, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYENGINE_EMULATOR_ORDER", order)
    monkeypatch.setenv("PYENGINE_EMULATOR_COPIES", "early" if order == "backward" else "late")
    monkeypatch.setenv("PYENGINE_EMULATOR_PROCESSORS", "1")
    check_attention(emulated_ops, case, "bfloat16")


@pytest.fixture
def warpgroups(cuda_ops: CudaOps) -> Iterator[CudaOps]:
    """The CUDA module with the kernel for warpgroups switched on."""
    if not cuda_ops.module.has_warpgroups():
        pytest.skip("the GPU has no warpgroups of compute capability 9.0")
    before = cuda_ops.module.use_warpgroups(True)
    yield cuda_ops
    cuda_ops.module.use_warpgroups(before)


@pytest.mark.parametrize("order", ["backward", "shuffled", "alone"])
@pytest.mark.parametrize("case", GROUP_CASES, ids=str)
def test_warpgroups_match_reference(
    warpgroups: CudaOps, case: AttentionCase, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYENGINE_EMULATOR_ORDER", order)
    monkeypatch.setenv("PYENGINE_EMULATOR_COPIES", "early" if order == "backward" else "late")
    check_attention(warpgroups, case, "float16" if order == "shuffled" else "bfloat16")


def test_warpgroups_put_split_keys_together(warpgroups: CudaOps, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYENGINE_EMULATOR_PROCESSORS", "64")
    case = AttentionCase("split", branches=1, heads=1, frames=1, ring=17, tokens=66,
                         attributes={"scope": "frame", "rotary_dim": 64})  # fmt: skip
    check_attention(warpgroups, case, "bfloat16", workspace=True)


def test_one_stage_when_memory_is_short(emulated_ops: CudaOps, monkeypatch: pytest.MonkeyPatch) -> None:
    case = AttentionCase("short", frames=35, ring=8, head_dim=72, tokens=3, attributes={"rotary_dim": 72})
    plan = emulated_ops.module.attention_launch
    sizes = {"scope": "temporal", "dtype": "bfloat16", "batch": 2, "frames": 35, "tokens": 3, "heads": 2}
    sizes |= {"head_dim": 72, "ring": 8, "processors": 2, "processor_bytes": 64 << 10}
    assert plan(**sizes, block_bytes=48 << 10)["stages"] == 1
    monkeypatch.setenv("PYENGINE_EMULATOR_SHARED", str(48 << 10))
    check_attention(emulated_ops, case, "bfloat16")


def test_split_keys_are_put_together(emulated_ops: CudaOps, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYENGINE_EMULATOR_PROCESSORS", "64")
    case = AttentionCase(
        "split",
        branches=1,
        heads=1,
        frames=2,
        ring=12,
        tokens=66,
        attributes={"scope": "frame", "rotary_dim": 64},
    )
    qkv, ring = torch.zeros(1, 2, 66, 3, 1, 64).bfloat16(), torch.zeros(1, 12, 66, 1, 64).bfloat16()
    size = emulated_ops.module.frame_window_attention_workspace(
        qkv=TensorArray(qkv), ring_key=TensorArray(ring), scope="frame"
    )
    assert size > 0
    check_attention(emulated_ops, case, "bfloat16", workspace=True)
    inputs = cast(case.make_inputs(), torch.bfloat16)
    with pytest.raises(ValueError, match=rf"expected workspace of at least {size} bytes"):
        emulated_ops.module.frame_window_attention(
            **{
                k: emulated_ops.put(v.float() if "gain" in k else v)
                for k, v in inputs.items()
                if v is not None
            },
            out=TensorArray(torch.empty(1, 2, 66, 64).bfloat16()),
            workspace=TensorArray(torch.empty(16, dtype=torch.uint8)),
            scope="frame",
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scope", ["temporal", "frame"])
def test_masked_rows_are_exactly_zero(cuda_ops: CudaOps, scope: str, dtype: str) -> None:
    case = AttentionCase("absent", absent=(1, 5), empty=(0,), branches=1, heads=1)
    inputs = cast(case.make_inputs(), DTYPES[dtype])
    inputs["ring_index"] = torch.full_like(inputs["ring_index"], -1)
    inputs["qkv"][:, [1, 5]] = float("nan")  # an absent frame may hold anything, and so may an empty slot
    inputs["ring_key"][:], inputs["ring_value"][:] = float("nan"), float("inf")
    out = cuda_ops.attention(inputs, scope=scope)["out"].double()
    assert (out[:, [1, 5]] == 0).all()
    assert out.isfinite().all()
    assert (out[:, [0, 2, 3, 4, 6, 7]] != 0).any(-1).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_indices_far_apart(cuda_ops: CudaOps, dtype: str) -> None:
    """A sink a million frames back: angles are as exact as the float64 reference's."""
    case = AttentionCase("sink", ring=3, frames=4, first_index=10**6, attributes={"rotary_dim": 64})
    inputs = case.make_inputs()
    inputs["ring_index"] = torch.tensor([[0, 3, 999_999]])
    exact = reference(**inputs, **case.attributes)
    inputs = cast(inputs, DTYPES[dtype])
    got = cuda_ops.attention(inputs, **case.attributes)
    as_good_as_torch(got["out"], reference(**inputs, **case.attributes)[0], exact[0], dtype)


def test_narrow_indices_and_slots_out_of_range(cuda_ops: CudaOps) -> None:
    case = AttentionCase("narrow", branches=1, attributes={"rotary_dim": 64})
    inputs = cast(case.make_inputs(), torch.bfloat16)
    wide = cuda_ops.attention(inputs, [[-1] * 8], **case.attributes)
    for name in ("frame_index", "ring_index"):
        inputs[name] = inputs[name].int()
    narrow = cuda_ops.attention(inputs, [[8, -5, 1000, -1, -1, -1, -1, -1]], **case.attributes)
    for name, value in wide.items():
        assert torch.equal(value, narrow[name])


STREAMS = AttentionCase("batch", streams=3, frames=5, ring=4, tokens=5, chunk_frames=2, absent=(0,), empty=(2,),
                        absent_streams=(1,))  # fmt: skip


@pytest.mark.parametrize(
    ("dtype", "scope", "head_dim"),
    [
        ("bfloat16", "temporal", 64),
        ("float16", "temporal", 72),
        ("bfloat16", "frame", 64),
        ("float32", "frame", 40),
    ],
)
def test_a_stream_in_a_batch_is_the_same_alone(
    cuda_ops: CudaOps, dtype: str, scope: str, head_dim: int
) -> None:
    """To the bit, out and ring, whoever the others are."""
    case = replace(STREAMS, head_dim=head_dim)
    inputs = cast(case.make_inputs(), DTYPES[dtype])
    attributes = {"scope": scope, "rotary_dim": 24}
    slots = append_slots(case)
    assert slots is not None
    whole = cuda_ops.attention(inputs, slots, **attributes)
    for stream in range(case.streams):
        own = slice(stream, None, case.streams)
        alone = {k: v if v is None or v.dim() == 1 else v[own].contiguous() for k, v in inputs.items()}
        for name, value in cuda_ops.attention(alone, [slots[stream]], **attributes).items():
            assert torch.equal(whole[name][own], value), f"{name} of stream {stream}"


def test_warpgroups_take_several_streams(warpgroups: CudaOps) -> None:
    case = AttentionCase("groups", streams=2, branches=1, heads=1, frames=2, ring=2, tokens=70, empty=(1,),
                         attributes={"scope": "frame", "rotary_dim": 64})  # fmt: skip
    check_attention(warpgroups, case, "bfloat16")


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize(("dtype", "head_dim"), [(torch.float32, 8), (torch.bfloat16, 8), (torch.float16, 5)])
def test_ring_append_copies_exactly(
    cuda_ops: CudaOps, dtype: torch.dtype, head_dim: int, index: torch.dtype
) -> None:
    random = torch.Generator().manual_seed(0)

    def bits(frames: int) -> torch.Tensor:  # NaN payloads and denormals included
        size = 4 if dtype == torch.float32 else 2
        raw = torch.randint(0, 256, (2, frames, 3, 2, head_dim * size), dtype=torch.uint8, generator=random)
        return raw.view(dtype)

    key, value, ring_key, ring_value = bits(5), bits(5), bits(7), bits(7)
    slots = [6, -1, 0, 7, 3]  # 7 is out of range: nowhere
    got = cuda_ops.ring_append(
        key=key,
        value=value,
        ring_key=ring_key,
        ring_value=ring_value,
        append_slot=torch.tensor([slots]).to(index),
    )
    for made, ring, new in zip(got, (ring_key, ring_value), (key, value), strict=True):
        for frame, slot in enumerate(slots):
            if 0 <= slot < 7:
                ring[:, slot] = new[:, frame]
        assert torch.equal(made.view(torch.uint8), ring.view(torch.uint8))


def test_ring_append_of_several_streams(cuda_ops: CudaOps) -> None:
    key, value = torch.randn(2, 4, 3, 2, 2, 8).unbind(0)
    ring_key, ring_value = torch.randn(2, 4, 5, 2, 2, 8).unbind(0)
    slots = torch.tensor([[4, -1, 0], [-1, 2, 9]])
    given = {"key": key, "value": value, "ring_key": ring_key, "ring_value": ring_value, "append_slot": slots}
    made = cuda_ops.ring_append(**{name: tensor.clone() for name, tensor in given.items()})
    for got, ring, new in zip(made, (ring_key, ring_value), (key, value), strict=True):
        ring = ring.clone()
        for stream, frame, slot in ((0, 0, 4), (0, 2, 0), (1, 1, 2)):
            ring[stream::2, slot] = new[stream::2, frame]
        assert torch.equal(got, ring)
