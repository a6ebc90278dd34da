"""A headless Chromium, driven by its own protocol over a WebSocket; nothing else is needed."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from websockets.sync.client import connect

PATIENCE = 60.0
NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


def found() -> str | None:
    """The command of a Chromium that is installed."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page of one browser. `requests` are the addresses that it asked for, `problems` what it complained about."""

    def __init__(self, folder: Path, width: int = 1280, height: int = 900) -> None:
        command = found()
        assert command is not None
        options = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--remote-debugging-port=0",
            "--hide-scrollbars",
        ]
        place = [f"--user-data-dir={folder}", f"--window-size={width},{height}", "about:blank"]
        self._process = subprocess.Popen(
            [command, *options, *place], stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        assert self._process.stderr is not None
        port = ""
        for line in self._process.stderr:
            if match := re.search(r"127\.0\.0\.1:(\d+)", line):
                port = match[1]
                break
        pages = httpx.get(f"http://127.0.0.1:{port}/json", timeout=PATIENCE).json()
        target = next(page for page in pages if page["type"] == "page")["webSocketDebuggerUrl"]
        self._socket = connect(target, max_size=2**28, open_timeout=PATIENCE)
        self._number = 0
        self.requests: list[str] = []
        self.problems: list[str] = []
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.do(f"{domain}.enable")

    def do(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Runs a command of the protocol."""
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv(PATIENCE))
            if message.get("id") == self._number:
                assert "error" not in message, message
                return dict(message["result"])
            data = message.get("params", {})
            if message.get("method") == "Network.requestWillBeSent":
                self.requests.append(data["request"]["url"])
            elif message.get("method") == "Network.webSocketCreated":
                self.requests.append(data["url"])
            elif message.get("method") == "Runtime.exceptionThrown":
                self.problems.append(json.dumps(data["exceptionDetails"])[:500])
            elif message.get("method") == "Log.entryAdded" and data["entry"]["source"] == "security":
                self.problems.append(data["entry"]["text"])

    def open(self, url: str) -> None:
        self.do("Page.navigate", url=url)

    def run(self, code: str) -> Any:
        """What an expression of JavaScript gives."""
        answer = self.do("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def until(self, code: str, done: Callable[[Any], bool] = bool) -> Any:
        """Waits until an expression gives what is wanted."""
        end = time.monotonic() + PATIENCE
        while not done(value := self.run(f"(() => {{ try {{ return {code} }} catch {{ return null }} }})()")):
            assert time.monotonic() < end, (code, value, self.problems)
            time.sleep(0.05)
        return value

    def key(self, key: str) -> None:
        code = {" ": 32, "Enter": 13, "ArrowLeft": 37}[key]
        more = {"text": "\r" if key == "Enter" else key} if key != "ArrowLeft" else {}
        for kind in ("keyDown", "keyUp"):
            self.do(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                windowsVirtualKeyCode=code,
                **(more if kind == "keyDown" else {}),
            )

    def shot(self, path: Path, width: int, height: int, dark: bool = False) -> None:
        """A picture of the page at a size."""
        self.do(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.do("Emulation.setEmulatedMedia", features=[scheme])
        time.sleep(0.5)
        path.write_bytes(base64.b64decode(self.do("Page.captureScreenshot", format="png")["data"]))

    def close(self) -> None:
        self._socket.close()
        os.killpg(self._process.pid, signal.SIGKILL)  # with the processes that it has started
        self._process.wait()
        assert self._process.stderr is not None
        self._process.stderr.close()
