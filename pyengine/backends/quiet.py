"""Keeps a compiler's package from counting its users."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["without_telemetry"]

PACKAGE = "openvino_telemetry"


@contextmanager
def without_telemetry() -> Iterator[None]:
    """Imports of OpenVINO inside write nothing into the home folder and send nothing.

    Its package sends an event as it is imported, and keeps an id and a count of runs in the home folder for that. Without the
    package that does so it uses a stub of its own; so that one is hidden meanwhile.
    """
    hidden = PACKAGE not in sys.modules
    if hidden:
        sys.modules[PACKAGE] = None  # type: ignore[assignment]  # what makes an import raise ImportError
    try:
        yield
    finally:
        if hidden:
            del sys.modules[PACKAGE]
