"""Numbers that callers pass: the right thing, or a sentence that names the argument."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyengine.arguments import check_guidance, check_length, check_seed, finite, printable, whole
from pyengine.errors import ConfigError


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3)])
def test_whole_numbers_become_ints(value: Any) -> None:
    assert type(whole("n", value)) is int
    assert whole("n", value, 3, 3) == 3


@pytest.mark.parametrize("value", ["3", 3.0, True, None, np.nan, np.array([1, 2]), b"3", 10**400])
def test_what_is_no_whole_number_is_named(value: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"^\[frames\] expected a whole number from 0 to 100 but got "
    ) as caught:
        whole("frames", value, 0, 100)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    "value", [np.nan, np.inf, "1", b"1", True, None, 10**400, 1j, [1.0], np.array([1.0, 2.0])]
)
def test_what_is_no_finite_number_is_named(value: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"^\[guidance\] expected a finite number from -1000000 to 1000000 but got "
    ):
        check_guidance(value)
    assert finite("x", np.float32(1.5)) == 1.5


def test_an_int_of_too_many_digits_is_named_by_its_type() -> None:
    with pytest.raises(ConfigError, match=r"but got a value of type int$"):
        whole("frames", 10**5000, 0, 100)


def test_lengths() -> None:
    assert check_length(None, None, 24) is None
    assert check_length(np.int64(5), None, 24) == 5
    assert check_length(None, np.float32(0.5), 24) == 12
    for frames, seconds, sentence in [
        (1, 1.0, "but got both"),
        (0, None, "at least one frame"),
        (None, 0.001, "at least one frame"),
        (None, -1, "expected a finite number from 0 to"),
        (2**60, None, "at most"),
        (None, 1e308, "expected a finite number"),
        (None, 1e15, "expected a finite number"),
        ("1", None, "expected a whole number"),
        (None, "1", "expected a finite number"),
    ]:
        with pytest.raises(ConfigError, match=sentence):
            check_length(frames, seconds, 24)


@given(
    st.one_of(st.integers(), st.floats(), st.text(), st.none()),
    st.one_of(st.floats(), st.integers(), st.none()),
)
def test_any_length_is_a_count_or_refused(frames: Any, seconds: Any) -> None:
    try:
        count = check_length(frames, seconds, 24.0)
    except ConfigError:
        return
    assert count is None or (type(count) is int and count >= 1)


def test_seeds_fit_64_bits() -> None:
    for seed in (0, -(2**63), 2**64 - 1, np.int32(-7)):
        assert check_seed(seed) == seed
    for seed in (2**64, -(2**63) - 1, 1.5, None, "x"):
        with pytest.raises(ConfigError, match=r"^\[seed\] expected a whole number from "):
            check_seed(seed)


def test_names_are_shown_in_one_line() -> None:
    assert printable("take [red] ü.mp4") == "take [red] ü.mp4"
    assert printable("a\nb\udcff") == "a\\nb\\udcff"
