"""Tells a caller how far a build is."""

from __future__ import annotations

import threading
from collections.abc import Callable

from pyengine.bundle.variant import Variant

__all__ = ["Counter", "Progress", "unheard"]

Progress = Callable[[int, int, str], None]  # called as progress(done, total, what)


def unheard(done: int, total: int, what: str) -> None:
    """The progress of a caller that wants none."""


class Counter:
    """Counts compiled engines for the caller's progress bar, which hears from one thread at a time."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._lock = progress, threading.Lock()
        self._done = 0
        self._expected: dict[Variant, int] = {}

    def expect(self, variant: Variant, engines: int) -> None:
        """A variant that will be built, out of so many engines; to say so twice changes nothing."""
        with self._lock:
            self._expected.setdefault(variant, engines)

    def spare(self, variant: Variant) -> None:
        """A variant that need not be built after all: another thread has it."""
        with self._lock:
            self._expected.pop(variant, None)

    def done(self, what: str) -> None:
        """One more engine is compiled."""
        self._say(1, what)

    def say(self, what: str) -> None:
        self._say(0, what)

    def _say(self, more: int, what: str) -> None:
        with self._lock:
            self._done += more
            self._progress(self._done, sum(self._expected.values()), what)
