"""The first calls, before anybody waits for them: every number of streams, with a context that is full, and what they cost."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from pyengine.engine import Engine
from pyengine.streaming.batch import Batch
from pyengine.streaming.stream import Stream

__all__ = ["Measured", "warm_up"]


@dataclass(frozen=True)
class Measured:
    """What a call costs.

    seconds           of a call by how many streams take part
    calls_per_frame   of a stream that runs steadily
    chunk             frames that leave the decoder together
    bytes_per_stream  of its buffers, and as much again for a snapshot of it that is being made
    """

    seconds: dict[int, float]
    calls_per_frame: float
    chunk: int
    bytes_per_stream: int


def warm_up(engine: Engine, batch: Batch, report: Callable[[int, int], None]) -> Measured:
    """Opens as many streams as the batch takes, one after the other, each until its context is full; at 1, 2, 4, ... and all of them
    a few calls are timed. `report(done, total)` is called in between and may raise.
    """
    sizes = sorted({*(size for size in (1, 2, 4, 8, 16, 32) if size < batch.max_streams), batch.max_streams})
    seconds: dict[int, float] = {}
    chunk, calls_per_frame, largest = 1, 1.0, 0
    words = getattr(engine.tokenizer, "words", None) if engine.bundle.text is not None else None
    prompt = words[0] if isinstance(words, list) and words else "a" if engine.bundle.text is not None else ""
    with ExitStack() as stack:
        streams: list[Stream] = []
        for size in sizes:
            while len(streams) < size:
                before = engine.nbytes
                streams.append(stack.enter_context(batch.stream(prompt, seed=len(streams))))
                largest = max(largest, engine.nbytes - before)
            newest, calls = streams[-1], streams[-1].calls_to_full()
            for call in range(calls):
                report(sizes.index(size) * calls + call, len(sizes) * calls)
                batch.advance()
                _drain(streams)
            made, frames, started, clips = newest.calls_made, newest.frames_made, time.perf_counter(), 0
            while clips < 2 and not newest.ended:
                batch.advance()
                clips += sum(stream is newest for stream, _ in _drain(streams))
            took, calls = time.perf_counter() - started, newest.calls_made - made
            if calls:
                seconds[size] = took / calls
            if clips:
                chunk = max(1, (newest.frames_made - frames) // clips)
                calls_per_frame = calls / max(1, newest.frames_made - frames)
    report(1, 1)
    return Measured(seconds, calls_per_frame, chunk, 2 * largest)


def _drain(streams: list[Stream]) -> list[tuple[Stream, Any]]:
    """Takes what is ready, so that no stream waits for a reader."""
    drained = []
    for stream in streams:
        while (frames := stream.ready()) is not None:
            drained.append((stream, frames))
    return drained
