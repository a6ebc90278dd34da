from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pyengine import _C


def arrays(dtype: type = np.float32, frames: int = 5, ring: int = 7) -> dict[str, Any]:
    random = np.random.default_rng(0)

    def bits(*shape: int) -> np.ndarray:  # NaN payloads and denormals included
        size = np.dtype(dtype).itemsize
        return random.integers(0, 256, (*shape, size), np.uint8).view(dtype)[..., 0].copy()

    return {
        "key": bits(2, frames, 3, 2, 8),
        "value": bits(2, frames, 3, 2, 8),
        "ring_key": bits(2, ring, 3, 2, 8),
        "ring_value": bits(2, ring, 3, 2, 8),
        "append_slot": np.array([[6, -1, 0, -1, 3][:frames]]),
    }


@pytest.mark.parametrize("index", [np.int32, np.int64])
@pytest.mark.parametrize("dtype", [np.float32, np.uint16])
def test_copies_exactly_and_nothing_else(dtype: type, index: type) -> None:
    given = arrays(dtype)
    given["append_slot"] = given["append_slot"].astype(index)
    expected = {name: given[name].copy() for name in ("ring_key", "ring_value")}
    for frame, slot in enumerate(given["append_slot"][0]):
        if slot >= 0:
            expected["ring_key"][:, slot] = given["key"][:, frame]
            expected["ring_value"][:, slot] = given["value"][:, frame]
    _C.ring_append(**given)
    for name, value in expected.items():
        np.testing.assert_array_equal(given[name].view(np.uint8), value.view(np.uint8))


def test_every_stream_has_a_ring_of_its_own() -> None:
    given = arrays()
    given["append_slot"] = np.array([[6, -1, 0, -1, 3], [1, 2, -1, -1, -1]])
    for name in ("ring_key", "ring_value"):
        given[name] = [given[name][stream::2].copy() for stream in range(2)]
    expected = {name: [ring.copy() for ring in given[name]] for name in ("ring_key", "ring_value")}
    for stream, row in enumerate(given["append_slot"]):
        for frame, slot in enumerate(row):
            if slot >= 0:
                expected["ring_key"][stream][:, slot] = given["key"][stream::2, frame]
                expected["ring_value"][stream][:, slot] = given["value"][stream::2, frame]
    _C.ring_append(**given)
    for name, rings in expected.items():
        for got, wanted in zip(given[name], rings, strict=True):
            np.testing.assert_array_equal(got.view(np.uint8), wanted.view(np.uint8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"key": np.zeros((2, 5, 3, 16), np.float32)},
            r"expected key \[batch, frames, tokens, heads, head_dim\]",
        ),
        ({"key": np.zeros((2, 5, 3, 2, 8))}, "expected key of dtype float32 or bfloat16"),
        ({"value": np.zeros((2, 5, 3, 2, 7), np.float32)}, "expected value of shape"),
        ({"ring_value": np.zeros((2, 7, 3, 2, 8), np.uint16)}, "expected ring_value of dtype float32"),
        (
            {"append_slot": np.array([[7, -1, 0, -1, 3]])},
            r"expected append_slot within \[-1, 7\) but got 7 for frame 0",
        ),
        ({"append_slot": np.array([[3, -1, 0, -1, 3]])}, "expected every slot at most once"),
        ({"append_slot": np.zeros((1, 5))}, "expected append_slot of dtype int64"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"^\[ring_append\] " + message):
        _C.ring_append(**{**arrays(), **changes})
