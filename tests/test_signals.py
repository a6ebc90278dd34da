"""A command that is told to end: at any stage it closes its file, says what it kept, and exits as a shell expects."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import pyengine
from pyengine import signals
from pyengine.cli import main

COMMAND = [sys.executable, "-P", "-m", "pyengine", "generate", "a red circle bounces over a blue background"]
CODES = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGHUP: 129}


def start(path: Path, cache: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, "--choice", "cut", "--seconds", "3000", "--output", str(path)],
        env=os.environ | {"PYENGINE_CACHE": str(cache)},
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background jobs ignore Ctrl-C, and what they start does too.
        preexec_fn=lambda: [signal.signal(number, signal.SIG_DFL) for number in CODES] and None,
    )


def until_looked_after(process: subprocess.Popen[str]) -> None:
    """Until Python has started and signals are looked after; before, nothing can be lost."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        caught = Path(f"/proc/{process.pid}/status").read_text().split("SigCgt:")[1].split()[0]
        if int(caught, 16) >> (signal.SIGTERM - 1) & 1:
            return
        time.sleep(0.002)


def end(process: subprocess.Popen[str], number: signal.Signals) -> str:
    """What it said, after it has ended with the right code and without a traceback."""
    process.send_signal(number)
    try:
        said = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == CODES[number], said
    assert "Traceback" not in said
    return said


@pytest.mark.parametrize("number", CODES)
def test_while_frames_are_made(
    tmp_path: Path, plan_cache: Path, number: signal.Signals, engine: pyengine.Engine
) -> None:
    path = tmp_path / "video.mp4"
    process = start(path, plan_cache)
    deadline = time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    said = end(process, number)
    frames = len(pyengine.read_video(path))
    assert frames >= 1
    assert f"holds the {frames} frames made so far" in said
    assert os.listdir(tmp_path) == ["video.mp4"]


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("seconds", [0.0, 0.05, 0.2, 0.5, 0.9])
def test_at_the_start(tmp_path: Path, plan_cache: Path, seconds: float) -> None:
    path = tmp_path / "video.mp4"
    path.write_bytes(b"an earlier video")
    process = start(path, plan_cache)
    until_looked_after(process)
    time.sleep(seconds)
    end(process, signal.SIGTERM)
    assert os.listdir(tmp_path) == ["video.mp4"]
    if path.stat().st_size == len(b"an earlier video"):
        assert path.read_bytes() == b"an earlier video"
    else:  # a machine so fast that frames were there
        assert len(pyengine.read_video(path)) >= 1


def test_a_signal_waits_for_the_end_of_a_critical_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals._State, "number", None)
    monkeypatch.setattr(signals._State, "since", -signals.PATIENCE)
    before = signal.signal(signal.SIGUSR1, signals._handle)
    done = []

    def critical() -> None:
        with signals.held(), signals.held():
            signal.raise_signal(signal.SIGUSR1)
            done.append("whole")

    try:
        with pytest.raises(signals.Interrupted) as caught:
            critical()
        assert caught.value.number == signal.SIGUSR1
        assert signals.exit_code(caught.value) == 128 + signal.SIGUSR1
        signal.raise_signal(signal.SIGUSR1)  # the same one again, as when a terminal closes
        monkeypatch.setattr(signals._State, "since", -signals.PATIENCE)
        with pytest.raises(signals.Interrupted):
            signal.raise_signal(signal.SIGUSR1)  # somebody who has waited and insists
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert done == ["whole"]


def test_what_the_parent_ignores_stays_ignored() -> None:
    code = "from pyengine import signals; import signal; signals.install(); print(signal.getsignal(signal.SIGHUP) == signal.SIG_IGN)"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        capture_output=True,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN) and None,
    )
    assert done.stdout.strip() == "True", done.stderr


def test_what_a_signal_broke_off_is_no_mistake_of_the_user(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A signal in the middle of an import may become an ImportError, and that a sentence about a missing package."""
    monkeypatch.setattr(signals._State, "number", signal.SIGTERM)
    assert main(["info", "no such bundle"]) == 143
    assert capsys.readouterr().err == "pyengine: interrupted\n"
