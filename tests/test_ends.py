"""Nothing spins or hangs: lengths that a method cannot have, the last frames of a stream, lengths without measure, and other threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from itertools import islice
from typing import Any

import numpy as np
import pytest

import pyengine
from pyengine.engine import Engine
from pyengine.methods import make_method, method_settings
from pyengine.streaming.turns import Turns

PROMPT = "a red circle bounces over a blue background"
OTHER = "a green star orbits over a grey background"
SOON = 60.0  # seconds, on a machine that has much else to do
RFLOW = {"name": "rflow", "frames_per_latent": 4}
TWO_LEVELS = {
    "name": "hierarchical",
    "steps": 2,
    "timesteps": 10,
    "chunk_frames": 4,
    "clip_frames": 5,
    "known": 2,
    "stride": 4,
    "eta": 1.0,
    "betas": [0.001, 0.02],
    "guidance": 0.0,
}


def test_one_clip_needs_a_length_and_ends_after_it(engine: Engine) -> None:
    with pytest.raises(pyengine.ConfigError, match="makes one clip and needs its length"):
        engine.stream(PROMPT, method=RFLOW)
    with engine.stream(PROMPT, method={**RFLOW, "clip_frames": 4, "steps": 2}) as stream:
        assert len(list(islice(stream, 17))) == 16


@pytest.mark.parametrize("taken", [16, 17, 23, 24])
def test_a_prompt_near_the_end(engine: Engine, taken: int) -> None:
    """In the last chunk every call has been made: the prompt is taken, and what is decoded already comes out."""
    with engine.stream(PROMPT, frames=24) as stream:
        list(islice(stream, taken))
        stream.prompt = OTHER
        assert stream.prompt == OTHER
        assert len(list(stream)) == 24 - taken
        assert next(stream, None) is None


@pytest.mark.parametrize("decode", ["windowed", "streamed"])
@pytest.mark.parametrize("behaviour", ["intended", "released"])
def test_a_billion_frames_are_counted_at_once(decode: str, behaviour: str) -> None:
    chunks = 10**9 // 16
    settings = method_settings(TWO_LEVELS, {"decode": decode, "behaviour": behaviour})
    started = time.process_time()
    schedule = make_method(settings, chunks, 0)
    assert schedule.calls is not None
    for number in (*range(300), *range(schedule.calls - 300, schedule.calls)):
        schedule.call(number)
    assert time.process_time() - started < 5


def test_rounds_are_those_that_counting_gives() -> None:
    for chunks in range(1, 60):
        for clips in (1, 2, 3):
            for known in (1, 2, 4):
                method = {**TWO_LEVELS, "clips_per_round": clips, "known": known}
                config = make_method(method, chunks, 0).config
                made = 0
                while config.intervals_of(made).stop < chunks:
                    made += 1
                assert config.rounds == made + 1


@pytest.mark.parametrize(
    ("method", "frames"),
    [
        (RFLOW, 10**9),
        ({"cadence": 0}, 10**9),
        ({"steps": 60000, "cadence": 1}, 8),
        ({"context": {"kind": "ring", "sink_frames": 0, "recent_frames": 65536}}, 8),
        ({"row_counts": (10, 65536)}, 8),
        ({"name": "replacement", "clip_frames": 65536, "overlap_frames": 2, "renoised": True, "ring_frames": 6}, 8),
    ],
)  # fmt: skip
def test_what_no_memory_holds_is_refused_at_once(engine: Engine, method: dict[str, Any], frames: int) -> None:
    started = time.monotonic()
    with pytest.raises(pyengine.ConfigError, match="at most 4096") as caught:
        engine.stream(PROMPT, frames=frames, method=method)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - started < SOON


@pytest.mark.parametrize("changes", [{"decode": "whole"}, {"clip_frames": 5000}, {"clips_per_round": 500}])
def test_two_levels_that_no_memory_holds(changes: dict[str, Any]) -> None:
    with pytest.raises(pyengine.ConfigError, match="at most 4096"):
        make_method({**TWO_LEVELS, **changes}, 10**8, 0)


ACTIONS: list[tuple[str, Callable[[Any], object]]] = [
    ("close", lambda stream: stream.close()),
    ("prompt", lambda stream: setattr(stream, "prompt", OTHER)),
    ("snapshot", lambda stream: stream.snapshot()),
]


@pytest.mark.parametrize("batched", [False, True], ids=["alone", "batch"])
@pytest.mark.parametrize(("name", "act"), ACTIONS, ids=[name for name, _ in ACTIONS])
def test_other_threads_have_their_turn(
    engine: Engine, name: str, act: Callable[[Any], object], batched: bool
) -> None:
    """While one thread takes frame after frame, another closes the stream, sets its prompt or saves it within a few chunks."""
    batch = engine.batch(2) if batched else None
    stream = (batch or engine).stream(PROMPT, seed=1)
    seen, going, error = [0], threading.Event(), []

    def watch() -> None:
        try:
            for _ in stream:
                seen[0] += 1
                going.set()
        except Exception as raised:
            error.append(raised)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    assert going.wait(SOON)
    for _ in range(1 if name == "close" else 5):
        before = seen[0]
        act(stream)
        assert seen[0] - before < 40
    stream.close()
    watcher.join(SOON)
    assert not watcher.is_alive()
    assert [type(raised) for raised in error] == [pyengine.StreamClosed]
    if batch is not None:
        batch.close()


def test_turns_are_taken_in_order() -> None:
    """A thread that takes turn after turn lets another in between; one that has its turn may take it again."""
    turns, counts, stop = Turns(), [0, 0], threading.Event()

    def take(number: int) -> None:
        while not stop.is_set():
            with turns, turns:
                counts[number] += 1
                time.sleep(0.001)

    threads = [threading.Thread(target=take, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    stop.set()
    for thread in threads:
        thread.join(SOON)
    assert min(counts) > 0
    assert abs(counts[0] - counts[1]) <= 2 + 0.1 * max(counts)


def test_frames_of_a_billion_come(engine: Engine) -> None:
    with engine.stream(PROMPT, frames=10**9) as stream:
        frame = next(stream)
        state = stream.snapshot()
    assert frame.dtype == np.uint8
    with engine.resume(state) as stream:
        assert stream.frames == 10**9
        next(stream)
