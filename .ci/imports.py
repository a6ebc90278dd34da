"""Check who imports whom: `python .ci/imports.py`, with the test extra installed.

First the contracts of pyproject.toml (`[tool.importlinter]`), then that no files import each other in a circle; an import that only the
type checker reads counts in neither. Exits with 1 and names what is wrong.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from grimp import ImportGraph, build_graph
from importlinter.cli import lint_imports

ROOT = Path(__file__).resolve().parents[1]


def circles(nodes: Iterable[str], imports: Callable[[str], Collection[str]]) -> list[list[str]]:
    """Sets of two or more nodes that reach each other (strongly connected components, by Tarjan's algorithm)."""
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    waiting: list[str] = []
    found = []

    def visit(node: str) -> None:
        order[node] = lowest[node] = len(order)
        waiting.append(node)
        for other in imports(node):
            if other not in order:
                visit(other)
                lowest[node] = min(lowest[node], lowest[other])
            elif other in waiting:
                lowest[node] = min(lowest[node], order[other])
        if lowest[node] == order[node]:
            start = waiting.index(node)
            component = waiting[start:]
            del waiting[start:]
            if len(component) > 1:
                found.append(sorted(component))

    for node in sorted(nodes):
        if node not in order:
            visit(node)
    return found


def lay_out(folder: Path) -> None:
    """The packages as the wheel lays them out, `export` inside `pyengine`, as links to the sources."""
    package = folder / "pyengine"
    package.mkdir()
    for path in (ROOT / "pyengine").iterdir():
        (package / path.name).symlink_to(path)
    (package / "export").symlink_to(ROOT / "export")
    (folder / "training").symlink_to(ROOT / "training")


def check_circles() -> bool:
    """Whether no files import each other in a circle; prints those that do."""
    graph: ImportGraph = build_graph(
        "pyengine", "training", exclude_type_checking_imports=True, cache_dir=None
    )
    found = circles(graph.modules, graph.find_modules_directly_imported_by)
    for circle in found:
        print(f"These import each other in a circle: {', '.join(circle)}")
    print(f"{len(graph.modules)} files, {len(found)} circles")
    return not found


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        lay_out(Path(folder))
        os.chdir(folder)
        sys.path.insert(0, folder)
        # The finder of an install in place would answer with the folders of that install.
        sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in type(finder).__module__]
        kept = lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True) == 0
        return 0 if check_circles() and kept else 1


if __name__ == "__main__":
    sys.exit(main())
