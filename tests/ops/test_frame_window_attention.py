"""Every case, on every instruction set of this CPU, in every dtype, against the float64 torch reference."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from functools import cache
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from arrays import DTYPES, assert_as_good_as_torch, cast, from_numpy, rings_of, run_attention, to_numpy

from pyengine import _C
from pyengine.export.ops.frame_window_attention import CASES, reference
from pyengine.export.ops.frame_window_attention_cases import AttentionCase

Tensors = tuple[torch.Tensor, ...]


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


@cache
def expected(case_name: str, dtype: str) -> tuple[Tensors, Tensors]:
    """The reference in float64 and in `dtype`, from the same inputs."""
    case = next(c for c in CASES if c.name == case_name)
    inputs = case.make_inputs()
    return reference(**inputs, **case.attributes), reference(**cast(inputs, DTYPES[dtype]), **case.attributes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_reference(case: AttentionCase, dtype: str, isa: str) -> None:
    exact, torch_got = expected(case.name, dtype)
    inputs = cast(case.make_inputs(), DTYPES[dtype])
    slots = append_slots(case)
    got = run_attention(inputs, slots, **case.attributes)
    assert_as_good_as_torch(got["out"], torch_got[0], exact[0], dtype)
    ring_key, ring_value = to_numpy(inputs["ring_key"]), to_numpy(inputs["ring_value"])
    value = to_numpy(torch_got[2])
    for stream, row in enumerate(slots or ()):
        own = slice(stream, None, case.streams)
        for frame, slot in enumerate(row):
            if slot < 0:
                continue
            wanted = torch_got[1][own, frame], exact[1][own, frame]
            assert_as_good_as_torch(got["ring_key"][own, slot], *wanted, dtype)
            ring_key[own, slot] = got["ring_key"][own, slot]
            ring_value[own, slot] = value[own, frame]
    np.testing.assert_array_equal(got["ring_key"], ring_key)  # no other slot is touched
    np.testing.assert_array_equal(got["ring_value"], ring_value)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scope", ["temporal", "frame"])
def test_masked_rows_are_exactly_zero(scope: str, dtype: str, isa: str) -> None:
    case = AttentionCase("absent", absent=(1, 5), empty=(0,))
    inputs = cast(case.make_inputs(), DTYPES[dtype])
    inputs["ring_index"] = torch.full_like(inputs["ring_index"], -1)
    inputs["qkv"][:, [1, 5]] = float("nan")  # an absent frame may hold anything, and so may an empty slot
    inputs["ring_key"][:], inputs["ring_value"][:] = float("nan"), float("inf")
    out = from_numpy(run_attention(inputs, scope=scope)["out"])
    assert (out[:, [1, 5]] == 0).all()
    assert out.isfinite().all()
    assert (out[:, [0, 2, 3, 4, 6, 7]] != 0).any(-1).all()


def test_huge_scores_do_not_overflow(isa: str) -> None:
    inputs = cast(AttentionCase("huge", gains=False).make_inputs(), torch.float32)
    inputs["qkv"] *= 1e4
    assert from_numpy(run_attention(inputs)["out"]).isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 72, 40])
def test_a_frame_is_the_same_in_a_longer_window(isa: str, dtype: str, head_dim: int) -> None:
    """To the bit: later frames are noisier and not seen, and a stream is the head of a longer one."""
    case = AttentionCase("long", frames=19, ring=5, chunk_frames=1, tokens=3, head_dim=head_dim,
                         attributes={"rotary_dim": head_dim})  # fmt: skip
    inputs = cast(case.make_inputs(), DTYPES[dtype])
    whole = run_attention(inputs, **case.attributes)["out"]
    for frames in (1, 2, 3, 5, 8, 9, 12, 17):
        head = {name: inputs[name][:, :frames].contiguous() for name in ("qkv", "level", "frame_index")}
        head = {**inputs, **head}
        np.testing.assert_array_equal(run_attention(head, **case.attributes)["out"], whole[:, :frames])


@pytest.mark.parametrize("scope", ["temporal", "frame"])
def test_the_norm_takes_rows_of_any_size(isa: str, scope: str) -> None:
    inputs = cast(AttentionCase("sizes", tokens=5).make_inputs(), torch.bfloat16)
    plain = from_numpy(run_attention(inputs, scope=scope)["out"]).float()
    inputs["qkv"][:, :, :, :2] *= 2.0**40  # queries and keys; exact
    large = from_numpy(run_attention(inputs, scope=scope)["out"]).float()
    torch.testing.assert_close(large, plain, atol=0.02, rtol=0.02)


STREAMS = AttentionCase("batch", streams=4, frames=7, ring=5, tokens=6, heads=3, chunk_frames=2, absent=(0,), empty=(2,),
                        absent_streams=(2,))  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scope", ["temporal", "frame"])
@pytest.mark.parametrize("head_dim", [64, 72, 40])
def test_a_stream_in_a_batch_is_the_same_alone(isa: str, dtype: str, scope: str, head_dim: int) -> None:
    """To the bit, out and ring, whoever the others are."""
    case = replace(STREAMS, head_dim=head_dim)
    inputs = cast(case.make_inputs(), DTYPES[dtype])
    attributes = {"scope": scope, "rotary_dim": 24}
    slots = append_slots(case)
    assert slots is not None
    whole = run_attention(inputs, slots, **attributes)
    for stream in range(case.streams):
        own = slice(stream, None, case.streams)
        alone = {k: v if v is None or v.dim() == 1 else v[own].contiguous() for k, v in inputs.items()}
        got = run_attention(alone, [slots[stream]], **attributes)
        for name, value in got.items():
            np.testing.assert_array_equal(whole[name][own], value, err_msg=f"{name} of stream {stream}")


def test_absent_streams_may_share_a_ring_and_one_stream_needs_no_list() -> None:
    case = replace(STREAMS, streams=3, absent_streams=(1, 2))
    good = arguments(case)
    shared = good["ring_key"][0].copy(), good["ring_value"][0].copy()
    own = {name: good[name][0].copy() for name in ("ring_key", "ring_value")}
    good["ring_key"] = (good["ring_key"][0], shared[0], shared[0])
    good["ring_value"] = (good["ring_value"][0], shared[1], shared[1])
    good["append_slot"] = np.full((3, case.frames), -1)
    good["append_slot"][0, 1] = 4
    _C.frame_window_attention(**good)
    assert (good["out"][1::3] == 0).all()
    good["append_slot"][:, 1] = 4
    with pytest.raises(
        ValueError, match="expected a ring of its own for every stream that appends but stream 2"
    ):
        _C.frame_window_attention(**good)
    alone = {name: value[::3].copy() for name, value in good.items() if name in ("qkv", "out")}
    alone |= {name: good[name][:1] for name in ("level", "frame_index", "ring_index", "append_slot")}
    _C.frame_window_attention(**{**good, **alone, **own})
    np.testing.assert_array_equal(alone["out"], good["out"][::3])


def test_a_network_without_a_ring_leaves_it_out() -> None:
    case = AttentionCase("none", frames=4, ring=0)
    good = arguments(case)
    _C.frame_window_attention(**good)
    out = good["out"].copy()
    _C.frame_window_attention(**{**good, "ring_key": None, "ring_value": None, "ring_index": None})
    np.testing.assert_array_equal(good["out"], out)


@pytest.mark.parametrize("scope", ["temporal", "frame"])
@pytest.mark.parametrize("threads", [2, 3, 7])
def test_is_the_same_on_one_thread_and_on_many(scope: str, threads: int) -> None:
    inputs = cast(AttentionCase("threads", tokens=33).make_inputs(), torch.float32)
    try:
        _C.set_threads(1)
        one = run_attention(inputs, [list(range(8))], scope=scope)
        _C.set_threads(threads)
        runs = [run_attention(inputs, [list(range(8))], scope=scope) for _ in range(5)]
    finally:
        _C.set_threads(0)
    for many in runs:
        for name, value in many.items():
            np.testing.assert_array_equal(value, one[name])


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system does not say")
def test_callers_keep_their_processors() -> None:
    before = os.sched_getaffinity(0)
    for _ in range(3):
        run_attention(cast(AttentionCase("affinity", tokens=40).make_inputs(), torch.float32))
        time.sleep(0.01)  # the workers choose where to sleep
    assert os.sched_getaffinity(0) == before


def test_python_threads_may_call_at_once() -> None:
    cases = [AttentionCase("a", tokens=40, frames=9), AttentionCase("b", tokens=60, head_dim=72, ring=3)]
    inputs = [cast(c.make_inputs(seed), torch.float32) for seed, c in enumerate(cases * 2)]
    alone = [run_attention(i, scope="temporal")["out"] for i in inputs]
    wrong: list[int] = []

    def work(which: int) -> None:
        for _ in range(50):
            if not np.array_equal(run_attention(inputs[which])["out"], alone[which]):
                wrong.append(which)

    threads = [Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


GOOD = AttentionCase("good", frames=3, ring=2)


def arguments(case: AttentionCase = GOOD, **changes: Any) -> dict[str, Any]:
    """A good call of _C.frame_window_attention, with some arguments changed."""
    inputs = cast(case.make_inputs(), torch.float32)
    arrays: dict[str, Any] = {k: None if v is None else to_numpy(v) for k, v in inputs.items()}
    arrays |= {name: rings_of(arrays[name], case.streams) for name in ("ring_key", "ring_value")}
    arrays["out"] = np.zeros((case.batch, case.frames, case.tokens, case.heads * case.head_dim), np.float32)
    return arrays | changes


def zeros(shape: int | tuple[int, ...], dtype: type = np.float32) -> np.ndarray:
    return np.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qkv": zeros((2, 3, 4, 2, 2, 64))}, r"qkv \[batch, frames, tokens, 3, heads, head_dim\]"),
        ({"qkv": zeros((2, 3, 4, 3, 2, 64), np.float64)}, "qkv of dtype float32 or bfloat16"),
        ({"qkv": zeros((2, 3, 4, 3, 64, 2)).swapaxes(-1, -2)}, "qkv to be C-contiguous"),
        ({"qkv": zeros((2, 0, 4, 3, 2, 64))}, "qkv with values"),
        ({"level": zeros((1, 4))}, r"level of shape \[1,3\] but got float32 \[1,4\]"),
        ({"level": zeros((1, 3), np.float64)}, "level of dtype float32"),
        ({"frame_index": zeros((1, 3))}, "frame_index of dtype int64 but got float32"),
        ({"frame_index": zeros(3, np.int64)}, r"frame_index \[streams, frames\] but got int64 \[3\]"),
        ({"frame_index": zeros((3, 3), np.int64)}, r"a batch of branches \* 3 streams but got 2"),
        ({"frame_index": zeros((2, 3), np.int64), "level": zeros((2, 3))}, "ring_key of 2 streams, one ring each, but got 1"),
        ({"ring_key": [zeros((2, 2, 4, 2, 64)), zeros((1, 2, 4, 2, 64))]},
         "the ring_key of stream 1 like that of stream 0, float32"),
        ({"ring_key": []}, "ring_key of 1 to 64 streams but got 0"),
        ({"ring_value": None}, "ring_key, ring_value and ring_index or none of them"),
        ({"qkv": [1.0]}, "qkv to be a numpy array but got list"),
        ({"theta": "x"}, "theta to be a number but got 'x'"),
        ({"ring_key": zeros((2, 2, 4, 2, 64), np.uint16)}, "ring_key of dtype float32 but got bfloat16"),
        ({"ring_value": zeros((2, 3, 4, 2, 64))}, "ring_value of shape"),
        ({"ring_index": zeros((1, 3), np.int64)}, "ring_index of shape"),
        ({"q_gain": zeros(63)}, "q_gain of shape"),
        ({"k_gain": zeros(64, np.uint16)}, "k_gain of dtype float32"),
        ({"reach": zeros((1, 3), np.int64)}, 'reach exactly when mask is "ranged"'),
        ({"mask": "ranged"}, 'reach exactly when mask is "ranged" but got nothing'),
        ({"append_slot": np.array([[0, 1, 2]])}, r"append_slot within \[-1, 2\) but got 2 for frame 2 of stream 0"),
        ({"append_slot": np.array([[0, 1, 0]])}, "every slot at most once"),
        ({"rotary_dim": 66}, r"rotary_dim even and within \[0, 64\] but got 66"),
        ({"rotary_dim": 3}, "rotary_dim even"),
        ({"mask": "causal"}, "mask to be one of bidirectional, noise_causal, ranged but got 'causal'"),
        ({"scope": "space"}, "scope to be one of temporal, frame but got 'space'"),
        ({"out": zeros((2, 3, 4, 127))}, "out of shape"),
        ({"out": np.broadcast_to(np.float32(0), (2, 3, 4, 128))}, "out to be"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"^\[frame_window_attention\] expected " + message):
        _C.frame_window_attention(**arguments(**changes))


def test_read_only_ring_is_refused_only_for_appending() -> None:
    good = arguments()
    good["ring_key"][0].flags.writeable = False
    _C.frame_window_attention(**good)
    with pytest.raises(ValueError, match="expected ring_key to be writable"):
        _C.frame_window_attention(**good, append_slot=np.array([[0, -1, -1]]))


def test_arguments_that_it_does_not_take_are_refused() -> None:
    good = arguments()
    with pytest.raises(TypeError, match=r"\[frame_window_attention\] got an unexpected argument 'colour'"):
        _C.frame_window_attention(**good, colour=1)
    with pytest.raises(TypeError, match="got an unexpected argument 'qkv'"):
        _C.frame_window_attention(good["qkv"], **good)
    with pytest.raises(TypeError, match="expected at most 9 arguments by position but got 10"):
        _C.frame_window_attention(*[None] * 10)
