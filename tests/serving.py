"""What tests of the service layer share: a service on an engine of numbers, and a viewer that keeps what it gets."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from fake_batch import FakeEngine

from pyengine.serve.service import Options, Service, Start
from pyengine.serve.session import Interaction, Piece, Session
from pyengine.serve.store import MemoryStore, Store

PATIENCE = 30.0  # seconds, on a machine that is busy with other things


class Viewer:
    """A sink that keeps frames and news. With `takes` off it never says that it has sent them."""

    def __init__(self, takes: bool = True) -> None:
        self.pieces: list[Piece] = []
        self.news: list[tuple[str, dict[str, Any]]] = []
        self.session: Session | None = None
        self._takes, self._changed = takes, threading.Condition()
        self.on_piece: Callable[[Piece], None] = lambda piece: None

    def piece(self, piece: Piece) -> None:
        with self._changed:
            self.pieces.append(piece)
            self._changed.notify_all()
        if self._takes and self.session is not None:
            self.session.unsent -= len(piece.frames)
        self.on_piece(piece)

    def notice(self, kind: str, data: dict[str, Any]) -> None:
        with self._changed:
            self.news.append((kind, data))
            self._changed.notify_all()

    def said(self, kind: str) -> list[dict[str, Any]]:
        return [data for what, data in self.news if what == kind]

    def until(self, done: Callable[[], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(done, PATIENCE), (self.count, self.news)

    @property
    def count(self) -> int:
        return sum(len(piece.frames) for piece in self.pieces)

    def frames(self) -> np.ndarray:
        """All frames that came, which must be numbered without a gap within each epoch."""
        for before, after in zip(self.pieces, self.pieces[1:], strict=False):
            assert after.epoch > before.epoch or after.first == before.first + len(before.frames)
        return np.concatenate([piece.frames for piece in self.pieces])


@contextmanager
def service(store: Store | None = None, engine: Any = None, **options: Any) -> Iterator[Service]:
    """A service that is warm."""
    made = Service(engine or FakeEngine(), store or MemoryStore(), Options(**{"live": 4, **options}))
    try:
        made.warm_up()
        yield made
    finally:
        made.close()


def begin(made: Service, viewer: Viewer, **start: Any) -> tuple[Session, str]:
    """A session as fast as it is taken; its first frames may have come already."""
    gate = threading.Event()
    made.scheduler.ask(gate.wait)  # so that the viewer knows its session before the first frame
    future = made.start(Start(**{"prompt": "a red circle", "realtime": False, **start}), viewer)
    made.scheduler.ask(lambda: setattr(viewer, "session", future.result()[0]))
    gate.set()
    return future.result(PATIENCE)


def again(made: Service, viewer: Viewer, name: str, token: str, frame: int | None, **start: Any) -> Session:
    """Resumes a session for this viewer."""
    gate = threading.Event()
    made.scheduler.ask(gate.wait)
    future = made.resume(name, token, viewer, frame, Start(**{"realtime": False, **start}))
    made.scheduler.ask(lambda: setattr(viewer, "session", future.result()[0]))
    gate.set()
    return future.result(PATIENCE)[0]


def say(made: Service, session: Session, prompt: str, event_id: str) -> bool:
    return made.scheduler.ask(lambda: session.interact(Interaction(event_id, prompt))).result(PATIENCE)
