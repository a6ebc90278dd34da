"""An engine whose frames are numbers: what the service layer needs of `Engine`, `Batch` and `Stream`, without a network.

A stream has a state of eight bytes that every call mixes with the prompt, as a network would; every fourth call gives a clip of 8 frames
that shows it. So frames depend on the seed, on each prompt and on the very call at which it was set.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from pyengine.bundle.bundle import Video
from pyengine.errors import ConfigError, InputError, PlanError, PromptError, StreamClosed

CALLS, CHUNK = 4, 8  # calls to a clip, and its frames
WORDS = ["a", "red", "green", "blue", "circle", "square"]


class FakeStream:
    def __init__(self, batch: FakeBatch, prompt: str, seed: int) -> None:
        self._batch, self._prompt, self.seed = batch, prompt, seed
        self._state = hashlib.sha256(str(seed).encode()).digest()[:8]
        self._clips: deque[np.ndarray] = deque()
        self.frames, self.frames_made, self.calls_made = None, 0, 0
        self.paused, self.ended, self.closed, self.fps = False, False, False, batch.engine.fps

    @property
    def prompt(self) -> str:
        return self._prompt

    @prompt.setter
    def prompt(self, prompt: str) -> None:
        self._batch.engine.check_prompt(prompt)
        self._prompt = prompt
        self._mix("recache")

    def call(self) -> None:
        if self._batch.engine.fails(self):
            raise PlanError("the network has failed")
        self._mix("call")
        self.calls_made += 1
        if self.calls_made % CALLS == 0:
            base = np.frombuffer(self._state, np.uint8).astype(int)
            clip = [
                np.resize(base + frame, (self._batch.engine.size, self._batch.engine.size, 3))
                for frame in range(CHUNK)
            ]
            self._clips.append(np.stack(clip).astype(np.uint8))

    def ready(self, wait: bool = True, most: int | None = None) -> np.ndarray | None:
        if self.closed:
            raise StreamClosed("the stream is closed")
        if not self._clips:
            return None
        if self._batch.engine.fails_to_decode(self):
            raise PlanError("the decoder has failed")
        clip = self._clips.popleft()
        if most is not None and most < len(clip):
            self._clips.appendleft(clip[most:])
            clip = clip[:most]
        self.frames_made += len(clip)
        return clip

    def first_unbegun(self) -> int:
        return self.frames_made + len(self._clips) * CHUNK + 2 * CHUNK

    def calls_to_full(self) -> int:
        return 2 * CALLS

    def capture(self, compress: bool = True) -> Callable[[], bytes]:
        data = {
            "state": self._state.hex(),
            "clips": [clip.tolist() for clip in self._clips],
            "frames_made": self.frames_made,
            "calls_made": self.calls_made,
            "prompt": self._prompt,
            "seed": self.seed,
        }
        return lambda: json.dumps(data).encode()

    def close(self) -> None:
        self.closed = True
        if self in self._batch.members:
            self._batch.members.remove(self)

    def __enter__(self) -> FakeStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _mix(self, what: str) -> None:
        self._state = hashlib.sha256(self._state + f"{what} {self._prompt}".encode()).digest()[:8]


class FakeBatch:
    exact = True

    def __init__(self, engine: FakeEngine, max_streams: int) -> None:
        self.engine, self.max_streams = engine, max_streams
        self.members: list[FakeStream] = []
        self.calls = 0
        self.lock = threading.RLock()

    def stream(self, prompt: str = "", *, seed: int = 0, **_: Any) -> FakeStream:
        self.engine.check_prompt(prompt)
        with self.lock:
            if len(self.members) >= self.max_streams:
                raise ConfigError("the batch is full")
            self.members.append(FakeStream(self, prompt, seed))
            return self.members[-1]

    def resume(self, state: bytes) -> FakeStream:
        try:
            data = json.loads(state)
            stream = self.stream(data["prompt"], seed=data["seed"])
        except (ValueError, KeyError) as error:
            raise InputError(f"expected a snapshot but got {error}") from error
        stream._state = bytes.fromhex(data["state"])
        stream._clips.extend(np.array(clip, np.uint8) for clip in data["clips"] if clip)
        stream.frames_made, stream.calls_made = data["frames_made"], data["calls_made"]
        return stream

    def describe(self, state: bytes) -> tuple[dict[str, Any], int]:
        try:
            data = json.loads(state)
            return {"prompt": data["prompt"], "seed": data["seed"]}, data["frames_made"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"expected a snapshot but got {error}") from error

    def advance(self) -> bool:
        with self.lock:
            going = [member for member in self.members if not member.paused and len(member._clips) < 2]
            if going:
                time.sleep(self.engine.seconds)
                self.calls += 1
            for member in going:
                member.call()
            return bool(going)

    def close(self) -> None:
        for member in list(self.members):
            member.close()


class FakeEngine:
    """`seconds` that a call takes; `fails(stream)` may say that it fails."""

    def __init__(self, seconds: float = 0.0, size: int = 16, fps: float = 24.0) -> None:
        self.seconds, self.size, self.fps, self.nbytes = seconds, size, fps, 1000
        self.fails: Callable[[FakeStream], bool] = lambda stream: False
        self.fails_to_decode: Callable[[FakeStream], bool] = lambda stream: False
        self.bundle = SimpleNamespace(
            name="fake", digest="fake", text=True, video=Video(size, size, fps, 4.0)
        )
        self.tokenizer = SimpleNamespace(words=WORDS)

    def batch(self, max_streams: int = 8) -> FakeBatch:
        return FakeBatch(self, max_streams)

    def check_prompt(self, prompt: str) -> None:
        if unknown := [word for word in prompt.split() if word not in WORDS]:
            raise PromptError(f"the prompt has words this model does not know: {', '.join(unknown)}")

    def encode_prompt(self, prompt: str) -> dict[str, np.ndarray]:
        return {}

    def close(self) -> None:
        pass


def expected(seed: int, prompts: list[tuple[int, str]], frames: int, size: int = 16) -> np.ndarray:
    """The frames of a session whose prompts took effect at these calls, in this order, made by a stream alone."""
    (_, first), *rest = prompts
    stream = FakeBatch(FakeEngine(size=size), 1).stream(first, seed=seed)
    made: list[np.ndarray] = []
    while len(made) * CHUNK < frames:
        while rest and rest[0][0] == stream.calls_made:
            stream.prompt = rest.pop(0)[1]
        stream.call()
        while (clip := stream.ready()) is not None:
            made.append(clip)
    return np.concatenate(made)[:frames]
