"""A short turn of every target of tests/fuzz, so that they stay runnable; `python tests/fuzz/run.py --minutes 60` goes on."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent / "fuzz"))

import targets


@pytest.fixture(autouse=True)
def _plans(plan_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYENGINE_CACHE", str(plan_cache))


@pytest.mark.parametrize("name", targets.TARGETS)
def test_any_input_is_answered(name: str) -> None:
    @settings(max_examples=25, deadline=None)
    @given(st.data())
    def feed(data: st.DataObject) -> None:
        targets.fed(name, data)

    feed()
