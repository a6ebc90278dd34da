"""Batch: several streams of one method whose calls run together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from pyengine.arguments import whole
from pyengine.errors import ConfigError, InputError, StreamClosed
from pyengine.methods import make_method
from pyengine.runtime.executor import Executor
from pyengine.streaming import snapshot
from pyengine.streaming.driver import Driver
from pyengine.streaming.stream import Stream
from pyengine.streaming.turns import Turns

if TYPE_CHECKING:
    from pyengine.engine import Engine

__all__ = ["Batch"]

BACKLOG = (
    2  # chunks that a stream may have ready while nobody takes them; then it waits, and holds up no other
)


class Batch:
    """Streams that share calls: one run of the network advances them all. Get one from `engine.batch(...)`.

    Streams join with `stream(...)` or `resume(...)`, pause, change their prompts and leave (`close()`) at any time; a newcomer waits at
    most the schedule's cadence less one for its turn. Each gives the frames that it would give alone, to the bit where the backend
    computes rows of a batch independently. Asking any stream for frames advances every stream that plays and has room.
    """

    def __init__(self, engine: Engine, settings: dict[str, Any], max_streams: int) -> None:
        """`settings` of every stream: method and guidance."""
        max_streams = whole("max_streams", max_streams, 1, 64)
        self.lock = Turns()
        self.max_streams = max_streams
        self._engine, self._settings = engine, settings
        self._schedule = make_method(settings["method"], settings["chunks"], 0)
        sizes = [size for size in (1, 2, 4, 8, 16, 32) if size < max_streams]
        self.sizes = (*sizes, max_streams)
        self._executor: Executor | None = engine.batch_program(
            self._schedule, settings["guidance"], self.sizes
        ).executor()
        self.driver = Driver(self._executor, engine.bundle, self.sizes)
        self._codec = engine.codec_program(self._schedule)
        self._members: list[Stream] = []
        self._tick = 0

    @property
    def streams(self) -> tuple[Stream, ...]:
        """The streams that are in it now."""
        return tuple(self._members)

    def stream(
        self,
        prompt: str = "",
        *,
        seed: int = 0,
        frames: int | None = None,
        seconds: float | None = None,
        start: np.ndarray | None = None,
        device_frames: bool = False,
    ) -> Stream:
        """One more stream; arguments as of `Engine.stream`. Raises ConfigError when the batch is full."""
        with self.lock:
            self._room()
            settings, given = self._engine.stream_settings(
                prompt,
                seed=seed,
                frames=frames,
                seconds=seconds,
                start=start,
                guidance=self._settings["guidance"],
                method=self._settings["method"],
                device_frames=device_frames,
            )
            return self._join(Stream(self._engine, settings, given, self))

    def resume(self, state: bytes | str | Path) -> Stream:
        """One more stream, from a snapshot of a stream of the same method and guidance. Raises InputError, ConfigError."""
        data = snapshot.read_bytes(state)
        with self.lock:
            self._room()
            return self._join(Stream.restore(self._engine, data, self))

    def check(self, settings: Mapping[str, Any]) -> None:
        """Raises InputError for a stream of another method or guidance, whose calls could not run with those of this batch."""
        if any(settings[name] != self._settings[name] for name in ("method", "guidance")):
            raise InputError(
                "expected a snapshot of the batch's method and guidance but it has others; resume it with engine.resume(...)"
            )

    def advance(self, asked: Stream | None = None) -> bool:
        """One call for every stream whose turn it is. Returns False where none can go on. `asked` goes on although it is paused."""
        with self.lock:
            self._open()
            ready = [member for member in self._members if member is asked or self._has_room(member)]
            ready = [member for member in ready if not member._state.ended]
            if not ready:
                return False
            period = self._schedule.period
            turns = {(member._state.call - self._tick) % period for member in ready}
            if asked is not None:
                # Nobody waits for a phase in which nothing is to do; the one who asks waits for no more than a round.
                while (asked._state.call - self._tick) % period:
                    self._step(ready)
            else:
                self._tick += min(turns)
            self._step(ready)
            return True

    def clips(self) -> Iterator[tuple[Stream, Any]]:
        """Every stream's frames as they become ready: (stream, uint8 [frames, height, width, 3]), until no stream can go on."""
        while True:
            with self.lock:
                waiting = [member for member in self._members if member._state.clips and not member.paused]
            for member in waiting:
                clip = next(member.clips(), None)
                if clip is not None:
                    yield member, clip
            if not waiting and not self.advance():
                return

    def leave(self, stream: Stream) -> None:
        """What `stream.close()` calls."""
        with self.lock:
            if stream in self._members:
                self._members.remove(stream)
            self.driver.forget(stream._state)

    def decoder_executor(self) -> Executor:
        """The decoder that one more stream has for itself."""
        return self._codec.executor()

    def close(self) -> None:
        """Closes every stream and frees the buffers that they share."""
        with self.lock:
            if self._executor is None:
                return
            for member in self.streams:
                member.close()
            self._executor.close()
            self._executor = None
            self._codec = self._codec.emptied()

    def __enter__(self) -> Batch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _step(self, ready: list[Stream]) -> None:
        period = self._schedule.period
        turn = [member._state for member in ready if (member._state.call - self._tick) % period == 0]
        self._tick += 1
        self.driver.step([state for state in turn if not state.ended])

    def _has_room(self, member: Stream) -> bool:
        if member.paused or (member.frames is not None and member.frames_made >= member.frames):
            return False
        return len(member._state.clips) < BACKLOG

    def _join(self, stream: Stream) -> Stream:
        self._members.append(stream)
        return stream

    def _room(self) -> None:
        self._open()
        if len(self._members) >= self.max_streams:
            raise ConfigError(
                f"expected at most {self.max_streams} streams in this batch but one more was asked for; close one, or make a batch "
                "with more max_streams"
            )

    def _open(self) -> None:
        if self._executor is None:
            raise StreamClosed("the batch is closed; make another with engine.batch(...)")
