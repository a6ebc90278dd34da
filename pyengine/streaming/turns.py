"""A lock for threads that take turns: whoever waits has the next turn."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Any

__all__ = ["Turns"]


class Turns:
    """Used in `with`. The thread that has its turn may enter again.

    A plain lock would do if threads were patient: one that releases it and takes it again at once, as a loop over frames does, keeps all
    others waiting for as long as it goes on.
    """

    def __init__(self) -> None:
        self._next = threading.Lock()
        # Where a signal interrupts `__enter__` after the turn was taken, this very thread can still enter and close what it guards.
        self._turn: Any = threading.RLock()

    def __enter__(self) -> None:
        if self._turn._is_owned():
            self._turn.acquire()
            return
        with self._next:  # held by the first who waits
            self._turn.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._turn.release()
