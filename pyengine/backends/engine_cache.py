"""Engines on disk, found again by what went into them: graph, weights, version, GPU.

<cache>/tensorrt/<version>/<gpu>/timing                  what tactics took
<cache>/tensorrt/<version>/<gpu>/<graph>/<weights>.engine
"""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pyengine.backends.base import Ports
from pyengine.errors import PlanError


class EngineCache:
    """Keeps engines by graph and weights. Those of one graph differ in their weights only, so one can be refitted into another."""

    def __init__(self, folder: Path, version: str, device: str) -> None:
        self._folder = folder / _plain(version) / _plain(device)

    def find(self, graph: str, weights: str) -> Path | None:
        path = self._path(graph, weights)
        return path if path.is_file() else None

    def other_weights(self, graph: str) -> Path | None:
        """An engine of the same graph with any weights."""
        return next(iter(sorted(self._path(graph, "").parent.glob("*.engine"))), None)

    def keep(self, graph: str, weights: str, data: bytes) -> Path | None:
        path = self._path(graph, weights)
        return path if write(path, data) else None

    def timing(self) -> bytes:
        try:
            return (self._folder / "timing").read_bytes()
        except OSError:
            return b""

    def keep_timing(self, data: bytes) -> None:
        write(self._folder / "timing", data)

    def _path(self, graph: str, weights: str) -> Path:
        return self._folder / graph[:24] / f"{weights[:24]}.engine"


def link(source: Path | None, target: Path, data: Callable[[], bytes]) -> None:
    """Puts an engine where a plan wants it, without a second copy on disk where the file system allows."""
    try:
        if source is None:
            raise OSError
        os.link(source, target)
    except OSError:
        target.write_bytes(data())


def describe(version: str, device: str, refit: bool, inputs: Ports, outputs: Ports) -> dict[str, Any]:
    """What an engine is, to be checked before it is loaded."""
    ports = ({name: [list(p.shape), p.dtype] for name, p in side.items()} for side in (inputs, outputs))
    return {"version": version, "device": device, "refit": refit} | dict(
        zip(("inputs", "outputs"), ports, strict=True)
    )


def read_description(path: Path) -> dict[str, Any]:
    try:
        facts: dict[str, Any] = json.loads(path.read_text())
        _ = facts["version"], facts["device"]
        return facts
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PlanError(
            f"the description {path} of an engine is corrupt ({error}); build the plan again"
        ) from error


def write(path: Path, data: bytes) -> bool:
    """Whole or not at all. False where the folder cannot be written, which only costs time at the next start."""
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_bytes(data)
        scratch.replace(path)
        return True
    except OSError:
        scratch.unlink(missing_ok=True)
        return False


def _plain(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", text)
