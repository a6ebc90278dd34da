"""`kill -9` at any moment: after a restart the video goes on with the next frame, none lost, none repeated, equal to the bit."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from fake_batch import expected

import pyengine
from pyengine.serve.store import FileStore
from pyengine.serve.timeline import Timeline

CHILD = Path(__file__).with_name("serve_child.py")
WORDS = ("a blue square", "a green circle", "a red square")


@contextmanager
def child(store: Path, engine: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = [
        sys.executable,
        "-P",
        "-c",
        f"import sys; sys.path.insert(0, {str(CHILD.parent)!r}); import serve_child; serve_child.main()",
    ]
    process = subprocess.Popen([*command, str(store), engine, *arguments], stdin=-1, stdout=-1, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        process.stdout.close()


def play(
    process: subprocess.Popen[str], frames: dict[int, str], upto: int, prompts: list[str]
) -> tuple[str, str, int]:
    """Reads until a frame has come, sending prompts on the way; then kills, and takes what was in the pipe. Frames that come twice,
    or with a gap, fail. Returns session, token and the number of prompts that were confirmed.
    """
    name = token = ""
    applied, killed = 0, False
    for line in process.stdout:
        word, *rest = line.split()
        if word == "SESSION":
            name, token = rest
        elif word == "APPLIED":
            applied += 1
        elif word == "FRAME":
            assert int(rest[0]) == len(frames)
            frames[len(frames)] = rest[1]
            if prompts and len(frames) % 16 == 3:
                event, prompt = prompts.pop(0).split(" ", 1)
                with contextlib.suppress(BrokenPipeError):  # it was killed meanwhile
                    process.stdin.write(f"PROMPT {event} {prompt}\n")
                    process.stdin.flush()
        else:
            pytest.fail(line)
        if len(frames) > upto and not killed:
            os.kill(process.pid, signal.SIGKILL)
            killed = True
    return name, token, applied


def undisturbed(folder: Path, name: str, engine: pyengine.Engine | None, frames: int) -> list[str]:
    """The hashes that the log of a session promises."""
    story = Timeline(FileStore(folder), f"sessions/{name}").story()
    prompts = [(0, "a red circle"), *((entry.call, entry.prompt) for entry in story)]
    if engine is None:
        made = list(expected(7, prompts, frames))
    else:
        made = []
        with engine.batch(max_streams=1) as batch, batch.stream(prompts.pop(0)[1], seed=7) as stream:
            while len(made) < frames:
                while prompts and prompts[0][0] == stream.calls_made:
                    stream.prompt = prompts.pop(0)[1]
                batch.advance()
                while (clip := stream.ready()) is not None:
                    made.extend(clip)
    return [hashlib.sha256(np.ascontiguousarray(frame)).hexdigest() for frame in made[:frames]]


def killed_again_and_again(
    folder: Path, engine: str, kills: int, seed: int, span: int
) -> tuple[str, dict[int, str], int]:
    """One session through so many kills, each after a random number of frames, with prompts in flight."""
    chance = random.Random(seed)
    frames: dict[int, str] = {}
    name = token = ""
    applied, sent = 0, 0
    for kill in range(kills + 1):
        prompts = [f"e{sent + number} {WORDS[(sent + number) % 3]}" for number in range(3)]
        sent += 3
        where = ("resume", name, token, str(len(frames))) if name else ("start", "7")
        with child(folder, engine, *where) as process:
            name, token, confirmed = play(process, frames, len(frames) + chance.randrange(span), prompts)
        applied += confirmed
        assert kill < kills or len(frames) > 0
    return name, frames, applied


def test_frames_go_on_to_the_bit_after_kills(tmp_path: Path) -> None:
    name, frames, applied = killed_again_and_again(tmp_path, "fake", kills=4, seed=1, span=90)
    assert list(frames.values()) == undisturbed(tmp_path, name, None, len(frames))
    assert applied > 0


@pytest.mark.slow
def test_frames_go_on_to_the_bit_after_fifty_kills(tmp_path: Path) -> None:
    name, frames, applied = killed_again_and_again(tmp_path, "fake", kills=50, seed=2, span=90)
    assert list(frames.values()) == undisturbed(tmp_path, name, None, len(frames))
    assert applied > 50


@pytest.mark.slow
def test_the_bundled_model_goes_on_to_the_bit_after_kills(
    tmp_path: Path, engine: pyengine.Engine, plan_cache: Path
) -> None:
    engine.batch(max_streams=1).close()  # so that its plans are there
    name, frames, _ = killed_again_and_again(tmp_path, str(plan_cache), kills=2, seed=3, span=60)
    assert list(frames.values()) == undisturbed(tmp_path, name, engine, len(frames))
