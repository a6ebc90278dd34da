"""The example in the README runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest


@pytest.mark.slow
def test_the_example_runs(plan_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYENGINE_CACHE", str(plan_cache))
    text = (Path(__file__).parents[1] / "README.md").read_text()
    found = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert found is not None
    names: dict[str, object] = {}
    exec(found[1], names)
    circle, star = names["circle"], names["star"]
    assert isinstance(circle, list)
    assert isinstance(star, list)
    assert not np.array_equal(circle[-1], star[-1])
