"""`pyengine serve` and `pyengine client`, as processes and with the bundled model."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
from fake_batch import FakeEngine, expected
from serving import PATIENCE, served

import pyengine
from pyengine.cli import main
from pyengine.errors import ConfigError, InputError
from pyengine.serve.client import LiveClient

PROMPT = "a red circle bounces over a blue background"


@contextmanager
def running(cache: Path, store: Path, *more: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server in a process of its own, and its address."""
    command = [sys.executable, "-P", "-m", "pyengine", "serve", "--port", "0", "--store", str(store)]
    options = ["--cache", str(cache), "--choice", "cut", "--streams", "1", *more]
    process = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True)
    try:
        address = ""
        for line in process.stderr:
            if found := re.search(r"serving shapes at (http://\S+)", line):
                address = found[1]
                break
        assert address
        yield process, address
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def test_frames_are_those_of_the_engine_also_over_a_restart(
    engine: pyengine.Engine, plan_cache: Path, tmp_path: Path
) -> None:
    """A client begins before the server is warm; the server is asked to stop amid the video, and another takes over at its port."""
    engine.batch(max_streams=1).close()  # so that its plans are there
    with engine.stream(PROMPT, seed=5, frames=60) as stream:
        alone = np.stack(list(stream))
    got = []
    with running(plan_cache, tmp_path) as (first, address):
        client = LiveClient(address)
        frames = client.frames(PROMPT, frames=60, seed=5)
        for received in frames:
            got.append(received.frame)
            if len(got) == 20:
                break
        assert httpx.get(f"{address}ready").status_code == 200
        first.send_signal(signal.SIGTERM)
        assert first.wait(30) == 0
        with running(plan_cache, tmp_path, "--port", address.rstrip("/").rsplit(":", 1)[1]) as _:
            got += [received.frame for received in frames]
    assert client.resumed >= 1
    assert np.array_equal(np.stack(got), alone)


def test_the_client_command_writes_a_video(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "frames" / ""
    with served(tmp_path, FakeEngine()) as server:
        assert (
            main(
                [
                    "client",
                    server.url,
                    "a red circle",
                    "-o",
                    f"{out}/",
                    "--frames",
                    "12",
                    "--seed",
                    "2",
                    "--json",
                ]
            )
            == 0
        )
        assert json.loads(capsys.readouterr().out) == {"output": f"{out}/", "frames": 12, "resumed": 0}
        pictures = [pyengine.read_image(path) for path in sorted(out.glob("*.png"))]
        assert np.array_equal(np.concatenate(pictures), expected(2, [(0, "a red circle")], 12))
        assert main(["client", server.url, "an elephant", "-o", f"{out}2/"]) == 2
        assert "does not know" in capsys.readouterr().err
        with pytest.raises(InputError, match="does not know"):
            next(LiveClient(server.url).frames("an elephant", frames=1))
        store = server.service.store
        end = time.monotonic() + PATIENCE
        while store.list("sessions"):  # what the client has stopped is removed
            assert time.monotonic() < end
            time.sleep(0.01)
    with pytest.raises(ConfigError, match="no pyengine answers"):
        next(LiveClient(server.url).frames("red", frames=1))
    with pytest.raises(ConfigError, match="expected an address"):
        LiveClient("file:///etc/passwd")


def test_serving_others_without_a_token_is_refused_before_anything_is_loaded(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYENGINE_TOKEN", raising=False)
    assert main(["serve", "no-such-bundle", "--host", "0.0.0.0"]) == 2
    assert "give a token" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "pyengine.serve.server", raising=False)
    assert main(["serve"]) == 2
    assert "pyengine-video[serve]" in capsys.readouterr().err
