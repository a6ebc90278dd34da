"""The check of imports that CI runs: that it finds circles."""

from __future__ import annotations

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

pytest.importorskip("importlinter")
SPEC = spec_from_file_location("ci_imports", Path(__file__).parents[1] / ".ci" / "imports.py")
assert SPEC is not None
assert SPEC.loader is not None
imports = module_from_spec(SPEC)
SPEC.loader.exec_module(imports)


@pytest.mark.parametrize(
    ("graph", "expected"),
    [
        ({"a": "b", "b": "c", "c": ""}, []),
        ({"a": "bc", "b": "d", "c": "d", "d": ""}, []),  # a diamond is no circle
        ({"a": "b", "b": "a"}, [["a", "b"]]),
        ({"a": "b", "b": "c", "c": "d", "d": "b"}, [["b", "c", "d"]]),
        ({"a": "b", "b": "a", "c": "ad", "d": "c"}, [["a", "b"], ["c", "d"]]),
    ],
)
def test_circles_are_found(graph: dict[str, str], expected: list[list[str]]) -> None:
    assert imports.circles(graph, graph.__getitem__) == expected
