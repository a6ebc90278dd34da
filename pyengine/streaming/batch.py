"""Batch: several streams of one method whose calls run together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import pairwise
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
from pyengine.streaming.state import StreamState
from pyengine.streaming.stream import Stream
from pyengine.streaming.turns import Turns

if TYPE_CHECKING:
    from pyengine.engine import Engine

__all__ = ["Batch"]

# Chunks that a stream may have ready while nobody takes them; then it waits, and holds up no other.
BACKLOG = 2


class Batch:
    """Streams that share calls: one run of the network advances many. Get one from `engine.batch(...)`.

    Streams join with `stream(...)` or `resume(...)`, pause, change their prompts and leave (`close()`) at any time; a newcomer waits at
    most the schedule's cadence less one for its turn. Each gives the frames that it gives alone, to the bit where `exact` is True and
    otherwise but for rounding. Asking any stream for frames advances every stream that plays and has room.

    On a CPU a call of several streams is shared out to workers, as many as there are cores, each with its part of the streams and of the
    cores: what the networks of one stream do is too small to be divided well among many cores, and larger calls outgrow the caches.
    """

    def __init__(self, engine: Engine, settings: dict[str, Any], max_streams: int) -> None:
        """`settings` of every stream: method and guidance."""
        max_streams = whole("max_streams", max_streams, 1, 64)
        self.lock = Turns()
        self.max_streams = max_streams
        self._engine, self._settings = engine, settings
        self._schedule = make_method(settings["method"], settings["chunks"], 0)
        self._drivers: list[Driver] = []
        self.exact = True
        workers = engine.workers(max_streams)
        self._prepare(max_streams if workers == 1 else 1)
        if workers > 1:
            for _ in range(workers):
                self._prepare(-(-max_streams // workers), engine.cores // workers)
        # What single streams run on: it has every core.
        self.driver = self._drivers[0]
        self._workers = self._drivers[1:]
        self._pool = ThreadPoolExecutor(max(1, workers), "pyengine-batch")
        self._codec = engine.codec_program(self._schedule)
        self._members: list[Stream] = []
        self._tick = 0
        self._closed = False

    def _prepare(self, streams: int, threads: int | None = None) -> None:
        """A driver for calls of up to so many streams. Sizes are 1, 2, 4, 8, ... and that number."""
        sizes = (*(size for size in (1, 2, 4, 8, 16, 32) if size < streams), streams)
        engine, guidance = self._engine, self._settings["guidance"]
        program = engine.batch_program(self._schedule, guidance, sizes, threads)
        # Whether each stream gives what it gives alone, to the bit; tried when the plan was built.
        self.exact &= engine.try_streams(engine.program(self._schedule, guidance), program)
        self._drivers.append(Driver(program.executor(), engine.bundle, sizes))

    @property
    def seconds(self) -> dict[str, float]:
        """Time spent so far, in seconds, of all workers together: see `Stream.seconds`."""
        spent = [driver.executor.seconds for driver in self._drivers]
        return {name: sum(part[name] for part in spent) for name in spent[0]}

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

    def describe(self, state: bytes | str | Path) -> tuple[dict[str, Any], int]:
        """The settings of a snapshot, and how many frames had been taken of its stream. Raises InputError for one that cannot be
        resumed here.
        """
        header = snapshot.read_header(snapshot.read_bytes(state))
        snapshot.check_bundle(header, self._engine.bundle)
        settings = self._engine.restored_settings(header["settings"])
        self.check(settings)
        return settings, header["frames_made"]

    def check(self, settings: Mapping[str, Any]) -> None:
        """Raises InputError for a stream of another method or guidance, whose calls could not run with those of this batch."""
        if any(settings[name] != self._settings[name] for name in ("method", "guidance")):
            raise InputError(
                "expected a snapshot of the batch's method and guidance but it has others; resume it with engine.resume(...)"
            )

    def advance(self, asked: Stream | None = None, calls: int = 1) -> bool:
        """So many calls for every stream whose turn it is. Returns False where none can go on. `asked` goes on although it is paused."""
        with self.lock:
            self._open()
            ready = [member for member in self._members if member is asked or self._has_room(member)]
            ready = [member for member in ready if not member._state.ended]
            if not ready:
                return False
            states, period = [member._state for member in ready], self._schedule.period
            if asked is not None:
                # Nobody waits for a phase in which nothing is to do; the one who asks waits for no more than a round.
                while (asked._state.call - self._tick) % period:
                    self._step(states)
            else:
                self._tick += min((state.call - self._tick) % period for state in states)
            if all((state.call - self._tick) % period == 0 for state in states):
                self._tick += calls
                self._share(states, calls)
            else:
                for _ in range(calls):
                    self._step(states)
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
            if not waiting and not self.advance(calls=self._calls_to_clip()):
                return

    def leave(self, stream: Stream) -> None:
        """Takes a stream out, and lets go of what the driver keeps of it; `stream.close()` calls it."""
        with self.lock:
            if stream in self._members:
                self._members.remove(stream)
            for driver in self._drivers:
                driver.forget(stream._state)

    def decoder_executor(self) -> Executor:
        """Makes the decoder's executor of one more stream."""
        return self._codec.executor()

    def close(self) -> None:
        """Closes every stream and frees the buffers that they share."""
        with self.lock:
            if self._closed:
                return
            for member in self.streams:
                member.close()
            self._closed = True
            self._pool.shutdown()
            for driver in self._drivers:
                driver.executor.close()
            self._codec = self._codec.emptied()

    def __enter__(self) -> Batch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _step(self, states: list[StreamState]) -> None:
        """One call for each whose turn it is."""
        turn = [state for state in states if (state.call - self._tick) % self._schedule.period == 0]
        self._tick += 1
        self._share(turn, 1)

    def _share(self, turn: list[StreamState], calls: int) -> None:
        """So many calls of each, shared out to the workers, which wait for each other at the end only. Who works for whom changes when
        a stream joins, leaves or waits.
        """
        count = min(len(self._workers), len(turn))
        if count < 2:
            self.driver.steps(turn, calls)
            return
        ends = [len(turn) * part // count for part in range(count + 1)]
        shares = [turn[start:end] for start, end in pairwise(ends)]
        futures = [
            self._pool.submit(driver.steps, share, calls)
            for driver, share in zip(self._workers, shares, strict=False)
        ]
        wait(futures)
        for future in futures:
            future.result()

    def _calls_to_clip(self) -> int:
        """How many calls there are until somebody has frames."""
        with self.lock:
            going = [member for member in self._members if self._has_room(member) and not member.ended]
            return min((member._state.calls_to_clip(0) for member in going), default=1)

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
        if self._closed:
            raise StreamClosed("the batch is closed; make another with engine.batch(...)")
