"""A client of the live socket for scripts: frames as they come, resumed where they were when the connection breaks."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any, NamedTuple
from urllib.parse import urlsplit, urlunsplit

import numpy as np
from websockets.exceptions import InvalidStatus, WebSocketException
from websockets.sync.client import ClientConnection, connect

from pyengine.errors import ConfigError, InputError
from pyengine.serve.wire import Codec, Kind, Message

__all__ = ["LiveClient", "Received"]

PATIENCE = 60.0  # seconds without a message, or without a server, after which it gives up
PAUSE = 0.5  # between two attempts


class Received(NamedTuple):
    """A frame: its number in the timeline, and uint8 [height, width, 3]."""

    number: int
    frame: np.ndarray


class LiveClient:
    """A session at `url` (http://host:port). Raises InputError for what the server refuses and ConfigError where none answers."""

    def __init__(self, url: str, token: str | None = None) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ConfigError(f"expected an address such as http://127.0.0.1:8008 but got '{url[:200]}'")
        scheme = "wss" if parts.scheme == "https" else "ws"
        self._url = urlunsplit((scheme, parts.netloc, "/v1/realtime/video", "", ""))
        self._token = token
        self._start: dict[str, Any] = {}
        self._socket: ClientConnection | None = None
        self.info: dict[str, Any] = {}
        self.resumed = 0

    def frames(self, prompt: str, *, frames: int, seed: int = 0) -> Iterator[Received]:
        """Starts a session and gives its frames, each once and in order, also over restarts of the server."""
        self._start = {"type": "session.start", "prompt": prompt, "seed": seed, "num_frames": frames}
        expected, epoch, is_over = 0, 0, False
        while not is_over:
            try:
                self._connect(expected)
                for message in self._messages():
                    epoch = max(epoch, message.epoch)
                    if message.kind == Kind.FRAME and message.epoch == epoch and message.frame == expected:
                        yield Received(message.frame, _picture(message))
                        expected += 1
                        if expected == frames:
                            self._say({"type": "session.stop"})
                            break
                is_over = True
            except (WebSocketException, OSError, TimeoutError) as error:
                if isinstance(error, InvalidStatus) or not self.info:
                    raise ConfigError(f"no pyengine answers at {self._url}: {error}") from error
                self.resumed += 1
            finally:
                self.close()

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _connect(self, frame: int) -> None:
        """A socket with the session on it. Where there was one before, the server gets time to come back."""
        end = time.monotonic() + PATIENCE
        while True:
            try:
                self._socket = connect(self._url, compression=None, max_size=2**28, close_timeout=1)
                first = self._start
                if self.info:
                    names = {name: self.info[name] for name in ("session_id", "resume_token")}
                    first = {"type": "session.resume", **names, "from_frame": frame}
                way = {"format": "raw", "pace": "fastest"} | ({"token": self._token} if self._token else {})
                self._say({**first, **way})
                self.info = self._news("video.start")
                return
            except _NotReady as problem:
                if time.monotonic() > end:
                    raise InputError(str(problem)) from problem
            except (WebSocketException, OSError):
                if not self.info or time.monotonic() > end:
                    raise
            self.close()
            time.sleep(PAUSE)

    def _messages(self) -> Iterator[Message]:
        assert self._socket is not None
        while True:
            data = self._socket.recv(PATIENCE)
            if isinstance(data, bytes):
                yield Message.read(data)
                continue
            news = json.loads(data)
            if news["type"] == "error":
                raise InputError(news["message"])
            if news["type"] == "session.done":
                return

    def _news(self, kind: str) -> dict[str, Any]:
        assert self._socket is not None
        while True:
            data = self._socket.recv(PATIENCE)
            if isinstance(data, bytes):
                continue
            news = json.loads(data)
            if news["type"] == kind:
                return dict(news)
            if news["type"] == "error":
                refused = _NotReady if "retry_after" in news else InputError
                raise refused(news["message"])

    def _say(self, message: dict[str, Any]) -> None:
        assert self._socket is not None
        self._socket.send(json.dumps(message))


class _NotReady(Exception):
    """The server has no room yet."""


def _picture(message: Message) -> np.ndarray:
    if message.codec != Codec.RGB24:
        raise InputError(f"expected raw frames but got codec {message.codec}")
    return np.frombuffer(message.payload, np.uint8).reshape(message.height, message.width, 3)
