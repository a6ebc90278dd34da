"""What tests of the service layer share: a service on an engine of numbers, and a viewer that keeps what it gets."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from fake_batch import FakeEngine
from websockets.sync.client import connect

from pyengine.serve.app import make_app
from pyengine.serve.safety import Gate
from pyengine.serve.server import listen, uvicorn_config
from pyengine.serve.service import Options, Service, Start
from pyengine.serve.session import Interaction, Piece, Session
from pyengine.serve.store import FileStore, MemoryStore, Store
from pyengine.serve.wire import Kind, Message

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


class Server:
    """The app behind a real socket on loopback, in a thread."""

    def __init__(self, made: Service, folder: Path, gate: Gate | None = None, port: int = 0) -> None:
        self.service, self._socket = made, listen("127.0.0.1", port)
        self.port = self._socket.getsockname()[1]
        self.app = make_app(made, gate or Gate(), folder / "videos")
        self._server = uvicorn.Server(uvicorn_config(self.app))
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def live(self) -> str:
        return f"ws://127.0.0.1:{self.port}/v1/realtime/video"

    def start(self) -> None:
        self._thread.start()
        end = time.monotonic() + PATIENCE
        while not self._server.started and time.monotonic() < end:
            time.sleep(0.01)
        assert self._server.started

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()
        self._socket.close()


@contextmanager
def served(
    folder: Path,
    engine: Any = None,
    gate: Gate | None = None,
    warm: bool = True,
    port: int = 0,
    **options: Any,
) -> Iterator[Server]:
    """A server with a store in a folder."""
    made = Service(engine or FakeEngine(), FileStore(folder / "store"), Options(**{"live": 4, **options}))
    if warm:
        made.warm_up()
    server = Server(made, folder, gate, port)
    server.start()
    try:
        yield server
    finally:
        server.stop()


class Client:
    """A client of the live socket, in one thread. Frames are kept by number; those of an older epoch are void."""

    def __init__(self, server: Server, **options: Any) -> None:
        self.socket = connect(
            server.live, compression=None, max_size=2**26, open_timeout=PATIENCE, close_timeout=0.5, **options
        )
        self.news: list[dict[str, Any]] = []
        self.messages: list[Message] = []

    def send(self, kind: str, **data: Any) -> None:
        self.socket.send(json.dumps({"type": kind, **data}))

    def start(self, **data: Any) -> dict[str, Any]:
        way = {"format": "raw", "pace": "fastest", "prompt": "a red circle"}
        self.send("session.start", **{**way, **data})
        return self.until("video.start")

    def resume(self, start: dict[str, Any], frame: int | None) -> dict[str, Any]:
        names = {name: start[name] for name in ("session_id", "resume_token")}
        self.send("session.resume", **names, from_frame=frame, format="raw", pace="fastest")
        return self.until("video.start")

    def receive(self) -> None:
        data = self.socket.recv(PATIENCE)
        if isinstance(data, bytes):
            self.messages.append(Message.read(data))
        else:
            self.news.append(json.loads(data))

    def until(self, kind: str, after: int = 0) -> dict[str, Any]:
        """The first news of this kind after so many of it."""
        while len(found := [news for news in self.news if news["type"] == kind]) <= after:
            self.receive()
        return found[after]

    def frames(self, count: int, epoch: int | None = None) -> np.ndarray:
        """So many frames of the last epoch, or of one, whose numbers must have no gap. [frames, height, width, 3]"""
        while True:
            of = epoch if epoch is not None else max((message.epoch for message in self.messages), default=0)
            got = [message for message in self.messages if message.kind == Kind.FRAME and message.epoch == of]
            if len(got) >= count:
                break
            self.receive()
        assert [message.frame for message in got] == list(range(got[0].frame, got[0].frame + len(got)))
        shape = (got[0].height, got[0].width, 3)
        return np.stack([np.frombuffer(message.payload, np.uint8).reshape(shape) for message in got[:count]])

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
