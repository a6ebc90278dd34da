"""Named ranges for Nsight, where the package nvtx is installed (`pip install nvtx`)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

try:
    import nvtx as _nvtx
except ImportError:
    _nvtx = None


def annotate(name: str) -> AbstractContextManager[Any]:
    """A range of this thread on the profiler's timeline."""
    if _nvtx is None:
        return nullcontext()
    ranged: AbstractContextManager[Any] = _nvtx.annotate(name, domain="pyengine")
    return ranged
