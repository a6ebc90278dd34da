"""The Python examples of the README and the quick start run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.parametrize("document", ["README.md", "docs/quickstart.md"])
def test_the_examples_run(document: str, plan_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, with the names that earlier ones have made."""
    monkeypatch.setenv("PYENGINE_CACHE", str(plan_cache))
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)
    assert len(blocks) == 2
    names: dict[str, object] = {}
    for block in blocks:
        exec(block, names)
    if document == "README.md":
        circle, star = names["circle"], names["star"]
        assert isinstance(circle, list)
        assert isinstance(star, list)
        assert not np.array_equal(circle[-1], star[-1])
    else:
        frame = names["frame"]
        assert isinstance(frame, np.ndarray)
        assert frame.shape == (64, 64, 3)
