"""Runs the app: uvicorn, a log in JSON lines, and an end that loses nothing."""

from __future__ import annotations

import json
import logging
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvicorn

from pyengine.engine import Engine
from pyengine.errors import ConfigError
from pyengine.serve.app import make_app
from pyengine.serve.safety import Gate
from pyengine.serve.service import Options, Service
from pyengine.serve.store import FileStore

__all__ = ["JsonLines", "listen", "run_server", "uvicorn_config"]

DRAIN = 30  # seconds for what is under way when the server is asked to stop
PLAIN = set(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName", "color_message"}


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, logger, message, and what the call gave as `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: value for name, value in record.__dict__.items() if name not in PLAIN}
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 takes a free one. Raises ConfigError."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        made = socket.socket(family, socket.SOCK_STREAM)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host, port))
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host}:{port}: {error.strerror}; choose another with --port"
        ) from error
    return made


def uvicorn_config(app: Any) -> uvicorn.Config:
    """How the app is served: no compression of what is compressed already, small messages, no log of addresses."""
    return uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws="websockets-sansio",
        ws_per_message_deflate=False,
        ws_max_size=128 * 1024,
        timeout_graceful_shutdown=DRAIN,
    )


def run_server(
    engine: Engine,
    root: Path,
    gate: Gate,
    options: Options,
    at: socket.socket,
    told: Callable[[str], None],
) -> None:
    """Serves until the process is asked to stop (INT or TERM); `told` gets the address once it listens. Raises ConfigError where
    another process has the store in `root`.
    """
    store = FileStore(root)
    store.claim()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name in ("pyengine.serve", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO if name == "pyengine.serve" else logging.WARNING)
    service = Service(engine, store, options)
    app = make_app(service, gate, root / "videos")
    service.warm_up_beside()
    at.listen(uvicorn.Config("").backlog)  # whoever comes from now on is kept waiting, not turned away
    host, port = at.getsockname()[:2]
    told(f"http://{f'[{host}]' if ':' in host else host}:{port}/")
    uvicorn.Server(uvicorn_config(app)).run(sockets=[at])
