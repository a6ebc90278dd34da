"""Numbers that callers pass: the right thing, or a sentence that names the argument."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pyengine
from pyengine.arguments import check_guidance, check_length, check_seed, finite, printable, whole
from pyengine.errors import ConfigError

PROMPT = "a red circle bounces over a blue background"


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


@pytest.mark.parametrize("bundle", [5, None, b"shapes", "", "\0", "\udcff", ["shapes"], "a" * 5000, "../x"])
def test_what_is_no_bundle_is_said(bundle: Any) -> None:
    with pytest.raises(pyengine.BundleError, match="bundle") as caught:
        pyengine.load(bundle)
    assert "\n" not in str(caught.value)


def test_rows_of_different_lengths_are_no_frames(engine: pyengine.Engine, tmp_path: Path) -> None:
    ragged: Any = [[1], [2, 3]]
    with pytest.raises(pyengine.ShapeError, match=r"\[start\] expected an array"):
        engine.stream(PROMPT, start=ragged)
    with (
        pyengine.VideoWriter(tmp_path / "a.gif", height=8, width=8) as writer,
        pytest.raises(pyengine.ShapeError, match=r"\[video\] expected an array"),
    ):
        writer.write(ragged)


def test_the_size_of_a_batch_is_any_whole_number(engine: pyengine.Engine) -> None:
    with engine.batch(np.int64(1)) as batch:
        assert batch.max_streams == 1
    for wrong in (True, "2", 0, 65, 2.0):
        with pytest.raises(
            pyengine.ConfigError, match=r"\[max_streams\] expected a whole number from 1 to 64"
        ):
            engine.batch(wrong)  # type: ignore[arg-type]


def test_places_of_a_snapshot(engine: pyengine.Engine, tmp_path: Path) -> None:
    with engine.stream(PROMPT, frames=2) as stream:
        stream.snapshot(os.fsencode(tmp_path / "state"))  # type: ignore[arg-type]
        assert (tmp_path / "state").stat().st_size > 1000
        for place in (5, "a\0b", "", str(tmp_path), "/nowhere/x", "a" * 5000):
            with pytest.raises(pyengine.OutputError, match="snapshot") as caught:
                stream.snapshot(place)  # type: ignore[arg-type]
            assert "\n" not in str(caught.value)
