"""Stream: one running generation, frame by frame."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from pyengine.bundle.manifest import Video
from pyengine.device.array import joined
from pyengine.errors import ConfigError, InputError, PlanError, StreamClosed
from pyengine.methods import make_method, method_settings
from pyengine.runtime.executor import Executor
from pyengine.runtime.host.decoder import Ready
from pyengine.schedule.call import Schedule
from pyengine.schedule.positions import PositionPolicy
from pyengine.schedule.samplers import Sampler
from pyengine.streaming import outlook, snapshot
from pyengine.streaming.driver import Driver
from pyengine.streaming.state import StreamState
from pyengine.streaming.turns import Turns

if TYPE_CHECKING:
    from pyengine.engine import Engine
    from pyengine.streaming.batch import Batch

__all__ = ["Stream", "open_state"]

# Calls that are made at least beyond the one that finished a chunk, while it is decoded, before its frames are handed out. A fixed
# number, so that what a prompt set between two chunks changes never depends on timing.
LOOKAHEAD = 1


class Stream:
    """Frames of one generation, made as they are asked for. Get one from `engine.stream(...)` or `batch.stream(...)`; close it or
    use it in a `with`.

    Iterating gives frames, uint8 [height, width, 3]; `clips()` gives them as they leave the decoder, uint8 [frames, height, width, 3].
    With `device_frames` both are DeviceArrays that stay on the GPU.

    Several streams of one engine may run in several threads. One stream may be used from several threads, one at a time: a call
    waits for the one under way.
    """

    def __init__(
        self,
        engine: Engine,
        settings: dict[str, Any],
        given: np.ndarray | Mapping[str, np.ndarray] | None = None,
        batch: Batch | None = None,
    ) -> None:
        """`settings` as `Engine.stream` makes them; `given` are clean latents that the video continues [frames, c, h, w], or values
        that the calls read, by name. A stream of a `batch` is advanced together with the others there.
        """
        bundle = engine.bundle
        assert bundle.video is not None  # Engine refuses other bundles
        how = method_settings(settings["method"])
        if how.needs_start and not settings["given_chunks"]:
            raise ConfigError(
                f"[start] expected frames to begin with, since '{bundle.name}' has no network that makes a first clip of a text, but got "
                "none; give a picture or a video, or export the bundle with that network"
            )
        schedule = make_method(how, settings["chunks"], settings["given_chunks"])
        if batch is None:
            executor = engine.program(schedule, settings["guidance"]).executor()
            driver, rings = Driver(executor, bundle), executor.rings
        else:
            executor, driver = batch.decoder_executor(), batch.driver
            rings = driver.executor.new_rings()
        sampler, numbered = how.make_sampler(), how.numbering
        state = open_state(driver, schedule, sampler, settings, rings, executor, bundle.latent, numbered)
        self._begin(engine, settings, bundle.video, driver, executor, state, batch)
        self._set_text(self._prompt)
        with self._lock:
            self._driver.prepare(self._state)
        if isinstance(given, Mapping):
            self._state.kept |= given
            given = None
        for frame, latent in enumerate(() if given is None else given):
            self._state.store.give(frame, latent)
        # Fills the decoder's memory; the caller has the frames.
        end, kept = how.first_chunk_frames, 0 if given is None else schedule.given_frames
        start = 0
        while end <= kept:
            self._state.decoder.submit(self._state.store.window(range(start, end))).result()
            start, end = end, end + schedule.chunk_frames

    def _begin(
        self,
        engine: Engine,
        settings: dict[str, Any],
        video: Video,
        driver: Driver,
        executor: Executor,
        state: StreamState,
        batch: Batch | None = None,
    ) -> None:
        """Takes what the stream runs on. `executor` is that of its decoder."""
        self._engine, self._settings, self._video, self._batch = engine, settings, video, batch
        self._lock = Turns() if batch is None else batch.lock
        self._driver, self._state = driver, state
        self._executor: Executor | None = executor
        self.frames = self._schedule.length(settings["frames"], video.frames_per_latent)
        self._rest: deque[Any] = deque()  # frames of a clip that the caller has not taken yet
        self.frames_made = 0  # frames handed out so far
        self.paused = False
        self._prompt = settings["prompt"]

    @property
    def prompt(self) -> str:
        """What the video shows. Setting it re-caches the context, so that the change shows within one window."""
        return str(self._prompt)

    @prompt.setter
    def prompt(self, prompt: str) -> None:
        with self._lock:
            self._open()
            self._engine.check_prompt(prompt)  # refuses a bad one before anything changes
            features = self._engine.encode_prompt(prompt)
            self._schedule.recache(self._state.call)
            self._prompt = self._settings["prompt"] = prompt
            self._give_text(features)
            self._driver.recache(self._state)

    @property
    def _schedule(self) -> Schedule:
        return self._state.schedule

    @property
    def fps(self) -> float:
        """Frames per second of the finished video."""
        return self._video.fps

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        with self._lock:
            self._open()
            if self.frames is not None and self.frames_made >= self.frames:
                raise StopIteration
            if not self._rest:
                self._rest.extend(self._next_clip())
            self.frames_made += 1
            return self._rest.popleft()

    def clips(self) -> Iterator[Any]:
        """Frames as they become ready, one chunk at a time. uint8 [frames, height, width, 3]"""
        while True:
            with self._lock:
                self._open()
                left = None if self.frames is None else self.frames - self.frames_made
                if left == 0:
                    return
                clip = joined(self._rest) if self._rest else self._next_clip()
                self._rest.clear()
                if left is not None and len(clip) > left:
                    clip = clip[:left]
                self.frames_made += len(clip)
            yield clip

    def ready(self, wait: bool = True, most: int | None = None) -> Any | None:
        """The oldest clip whose calls are made, uint8 [frames, height, width, 3], without making another call; the first `most` frames
        of it. None where there is none or, unless it is to `wait`, where it is still being decoded.
        """
        with self._lock:
            self._open()
            left = None if self.frames is None else self.frames - self.frames_made
            clips = self._state.clips
            if left == 0 or not (self._rest or clips):
                return None
            if self._rest:
                clip = joined(self._rest)
                self._rest.clear()
            elif wait or getattr(clips[0], "done", bool)():
                clip = clips.popleft().result()
            else:
                return None
            clip = clip if left is None else clip[:left]
            if most is not None:
                self._rest.extend(clip[most:])
                clip = clip[:most]
            self.frames_made += len(clip)
            return clip

    def first_unbegun(self) -> int | None:
        """The first frame whose denoising has not begun, so that only the prompt of now shapes it. None where none follows, or where
        a call has several lanes.
        """
        with self._lock:
            self._open()
            return outlook.first_unbegun(self._state, self._video)

    def calls_to_full(self) -> int:
        """How many calls there are until the context is as full as it gets, so that calls are as large as they get."""
        with self._lock:
            self._open()
            return outlook.calls_to_full(self._state)

    def snapshot(self, path: str | Path | None = None) -> bytes:
        """All that the stream depends on, as bytes and, with `path`, to a file. Raises OutputError.

        `engine.resume` continues bit-identically on the same plan.
        """
        data = self.capture()()
        if path is not None:
            snapshot.write(path, data)
        return data

    def capture(self, compress: bool = True) -> Callable[[], bytes]:
        """Copies all that the stream depends on as it is now. What is returned makes a snapshot of it, in any thread and at any time."""
        with self._lock:
            header, arrays = self._saved()
        # What changes later is not to change in there.
        header["settings"] = dict(header["settings"])
        return lambda: snapshot.pack(header, arrays, compress)

    def _saved(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Header and arrays of a snapshot."""
        executor, state = self._open(), self._state
        clips = [clip.result() for clip in state.clips]
        pending = [*self._rest, *(frame for clip in clips for frame in clip)]
        arrays = snapshot.state_arrays(executor, state, pending, self._video)
        header = {
            "bundle": self._engine.bundle.digest,
            "settings": self._settings,
            "frames_made": self.frames_made,
            "clips": [len(clip) for clip in clips],
        }
        if state.switched_at is not None:
            header["switched"] = state.switched_at
        return header, arrays

    @classmethod
    def restore(cls, engine: Engine, data: bytes, batch: Batch | None = None) -> Stream:
        """The stream that `snapshot` saved. Raises InputError if the bytes are not a snapshot of this engine's bundle."""
        header = snapshot.read_header(data)
        snapshot.check_bundle(header, engine.bundle)
        settings = engine.restored_settings(header["settings"])
        if batch is not None:
            batch.check(settings)
        try:
            stream = cls._opened(engine, settings, batch, header, data)
        except ConfigError as error:
            raise InputError(f"the stream of the snapshot cannot be opened here: {error}") from error
        try:
            stream._load(header, data)
        except Exception:
            stream.close()
            raise
        return stream

    @classmethod
    def _opened(
        cls,
        engine: Engine,
        settings: dict[str, Any],
        batch: Batch | None,
        header: Mapping[str, Any],
        data: bytes,
    ) -> Self:
        """A stream that a snapshot can be put into."""
        return cls(engine, settings, batch=batch)

    def _load(
        self,
        header: Mapping[str, Any],
        data: bytes,
        given: int | None = None,
        others: Collection[str] = (),
    ) -> None:
        """Puts a snapshot into a stream that has just been opened; `given` and `others` as of `snapshot.load`. Raises InputError."""
        state, clips = self._state, header["clips"]
        pending = snapshot.load(
            self._driver, self._open(), state, self._video, data, self.frames, given, others
        )
        begun, decoder = len(pending) - sum(clips), state.decoder
        self._rest.extend(decoder.own(pending[:begun]))
        # Clips that nobody has begun to take stay clips: the stream makes its next call when it would have made it.
        for length in clips:
            state.clips.append(Ready(decoder.own(pending[begun : begun + length])))
            begun += length
        self.frames_made = header["frames_made"]

    @property
    def seconds(self) -> dict[str, float]:
        """Time spent so far, in seconds: `segments` (the backend), `ops` (our kernels), `runs` (both and the walk between them). Of
        a batch, all its streams together.
        """
        self._open()
        return self._driver.executor.seconds if self._batch is None else self._batch.seconds

    @property
    def calls_made(self) -> int:
        """Calls of the network so far."""
        return self._state.call - self._schedule.first_call

    @property
    def ended(self) -> bool:
        """Whether every call of the stream has been made; frames may still be there to be taken."""
        return self._state.ended

    def pause(self) -> None:
        """In a batch: make no calls for this stream until `play()`, or until its frames are asked for."""
        self.paused = True

    def play(self) -> None:
        """In a batch: go on after `pause()`."""
        self.paused = False

    def close(self) -> None:
        """Free every buffer, once the call under way is done. A closed stream raises StreamClosed; the engine goes on."""
        with self._lock:
            if self._executor is None:
                return
            if self._batch is not None:
                self._batch.leave(self)
            self._state.decoder.close()
            self._executor.close()
            self._executor = None
            self._state.clips.clear()
            self._rest.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self) -> Executor:
        if self._executor is None:
            raise StreamClosed(
                "the stream is closed; start another with engine.stream(...), or engine.resume(...) a snapshot"
            )
        return self._executor

    def _set_text(self, prompt: str) -> None:
        self._give_text(self._engine.encode_prompt(prompt))

    def _give_text(self, features: dict[str, np.ndarray]) -> None:
        self._state.text = features

    def _next_clip(self) -> Any:
        """Makes calls until a clip is on its way, a fixed number more while it is decoded, and waits for it."""
        while not self._state.clips:
            if self._state.ended:
                raise PlanError(
                    f"the schedule ended after {self.calls_made} calls with {self.frames_made} of {self.frames} frames; "
                    "report the bundle and the settings that it came from"
                )
            self._advance(self._state.calls_to_clip(LOOKAHEAD))
        while not self._state.ended and self._state.made_by_last(LOOKAHEAD) >= len(self._state.clips):
            self._advance()
        return self._state.clips.popleft().result()

    def _advance(self, calls: int = 1) -> None:
        if self._batch is None:
            self._driver.steps([self._state], calls)
        else:
            self._batch.advance(self, calls)


def open_state(
    driver: Driver,
    schedule: Schedule,
    sampler: Sampler,
    settings: Mapping[str, Any],
    rings: Mapping[str, Any],
    codec: Executor,
    latent: Any,
    numbered: tuple[PositionPolicy, int] = ("local", 0),
) -> StreamState:
    """A stream before its first call. `codec` is the executor whose decoder it has for itself."""
    shape = (latent.channels, latent.height, latent.width)
    return StreamState(
        schedule=schedule,
        sampler=sampler,
        positions=numbered,
        seed=settings["seed"],
        weights=schedule.weights(settings["guidance"]),
        store=driver.executor.latent_store(shape, schedule.places),
        rings=rings,
        decoder=codec.decoder(device_frames=settings.get("device_frames", False)),
        call=schedule.first_call,
    )
