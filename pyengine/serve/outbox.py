"""Outbox: between the scheduler's thread, which puts, and a socket's sender, which takes. In the event loop of the socket."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any, NamedTuple

from pyengine.serve.session import Piece

__all__ = ["Notice", "Outbox"]


class Notice(NamedTuple):
    """News of a session, or an answer that is to be sent as it is."""

    kind: str
    data: dict[str, Any]


class Outbox:
    """A session's sink. With `latest` a piece that was not taken yet gives way to the next, and `dropped` counts its frames."""

    def __init__(self, loop: asyncio.AbstractEventLoop, latest: bool) -> None:
        self._loop, self._latest = loop, latest
        self._items: deque[Piece | Notice] = deque()
        self._filled = asyncio.Event()
        self.dropped = 0

    def piece(self, piece: Piece) -> None:
        self._from_thread(piece)

    def notice(self, kind: str, data: dict[str, Any]) -> None:
        self._from_thread(Notice(kind, data))

    def put(self, item: Piece | Notice) -> None:
        """In the loop's thread."""
        if self._latest and isinstance(item, Piece):
            for old in [known for known in self._items if isinstance(known, Piece)]:
                self._items.remove(old)
                self.dropped += len(old.frames)
        self._items.append(item)
        self._filled.set()

    async def take(self) -> Piece | Notice:
        """The oldest; waits for one."""
        while not self._items:
            self._filled.clear()
            await self._filled.wait()
        return self._items.popleft()

    def _from_thread(self, item: Piece | Notice) -> None:
        try:
            self._loop.call_soon_threadsafe(self.put, item)
        except RuntimeError:  # the loop is closed: so is the socket
            return
