"""Several streams in one call: each gives what it gives alone, whoever joins, pauses, changes prompts or leaves beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pyengine
from pyengine.errors import ConfigError, InputError, StreamClosed
from pyengine.streaming.batch import Batch

PROMPTS = (
    "a red circle bounces over a blue background",
    "a green star orbits over a grey background",
    "a small square spins over a yellow background",
)
CHUNK = 8  # frames
LONGEST = 56


@pytest.fixture(scope="module")
def alone(engine: pyengine.Engine) -> dict[tuple[int, int], np.ndarray]:
    """Videos of streams by themselves, by prompt and seed."""
    videos = {}
    for prompt in range(len(PROMPTS)):
        for seed in range(2):
            with engine.stream(PROMPTS[prompt], seed=seed, frames=LONGEST) as stream:
                videos[prompt, seed] = np.stack(list(stream))
    return videos


@pytest.fixture(scope="module")
def batch(engine: pyengine.Engine) -> Iterator[Batch]:
    with engine.batch(max_streams=4) as made:
        yield made


def same(batch: Batch, got: np.ndarray, expected: np.ndarray) -> bool:
    """Equal to the bit, or, where the compiler rounds streams of one call differently, but for a few steps of a pixel."""
    expected = expected[: len(got)]
    if batch.exact:
        return np.array_equal(got, expected)
    difference = np.abs(got.astype(int) - expected.astype(int))
    return bool(difference.mean() < 1.0 and np.quantile(difference, 0.99) <= 16)


def take(stream: pyengine.Stream, count: int) -> np.ndarray:
    return np.stack(list(islice(stream, count)))


def test_streams_of_a_batch_give_what_they_give_alone(
    batch: Batch, alone: dict[tuple[int, int], np.ndarray]
) -> None:
    streams = {key: batch.stream(PROMPTS[key[0]], seed=key[1]) for key in ((0, 0), (1, 1), (2, 0))}
    for _ in range(LONGEST // CHUNK):  # in turns, so that their calls run together
        for key, stream in streams.items():
            made = stream.frames_made
            assert same(batch, take(stream, CHUNK), alone[key][made:])
    assert all(stream.frames_made == LONGEST for stream in streams.values())
    for stream in streams.values():
        stream.close()
    assert batch.streams == ()


EVENTS = st.lists(
    st.tuples(st.sampled_from(["join", "take", "pause", "play", "leave", "advance"]), st.integers(0, 5)),
    min_size=20,
    max_size=30,
)


@settings(max_examples=6)
@given(EVENTS)
def test_joins_pauses_and_leaves_change_nothing_for_the_others(
    batch: Batch, alone: dict[tuple[int, int], np.ndarray], events: list[tuple[str, int]]
) -> None:
    play(batch, alone, events)


@pytest.mark.slow
def test_a_thousand_joins_pauses_and_leaves(engine: pyengine.Engine) -> None:
    """With a window of two chunks, so that there is time for them."""
    context = {"kind": "ring", "sink_frames": 0, "recent_frames": 4}
    method = {"steps": 4, "cadence": 2, "context": context}
    videos = {}
    for key in [(prompt, seed) for prompt in range(len(PROMPTS)) for seed in range(2)]:
        with engine.stream(PROMPTS[key[0]], seed=key[1], frames=LONGEST, method=method) as stream:
            videos[key] = np.stack(list(stream))
    happened = []
    with engine.batch(max_streams=8, method=method) as batch:

        @settings(max_examples=45)
        @given(EVENTS)
        def many(events: list[tuple[str, int]]) -> None:
            happened.extend(events)
            play(batch, videos, events)

        many()
    assert len(happened) > 900


def play(batch: Batch, videos: dict[tuple[int, int], np.ndarray], events: list[tuple[str, int]]) -> None:
    """Does what the events say; whatever any stream gives is compared with the video of that stream alone."""
    members: list[tuple[tuple[int, int], pyengine.Stream]] = []
    for what, number in events:
        if what == "join" and len(members) < batch.max_streams:
            key = (number % 3, number // 3)
            members.append((key, batch.stream(PROMPTS[key[0]], seed=key[1])))
        elif what == "advance":
            batch.advance()
        elif members and what != "join":
            place = number % len(members)
            key, stream = members[place]
            if what == "take" and stream.frames_made + 4 <= LONGEST:
                made = stream.frames_made
                assert same(batch, take(stream, 4), videos[key][made:])
            elif what == "pause":
                stream.pause()
            elif what == "play":
                stream.play()
            elif what == "leave":
                stream.close()
                members.pop(place)
    for key, stream in members:
        made = stream.frames_made
        if made < LONGEST:
            assert same(batch, take(stream, min(4, LONGEST - made)), videos[key][made:])
        stream.close()


def test_frames_come_as_they_are_ready(batch: Batch, alone: dict[tuple[int, int], np.ndarray]) -> None:
    streams = {batch.stream(PROMPTS[0], seed=seed, frames=3 * CHUNK): seed for seed in range(2)}
    made: dict[int, list[np.ndarray]] = {0: [], 1: []}
    for stream, clip in batch.clips():
        made[streams[stream]].append(clip)
    for seed, clips in made.items():
        assert same(batch, np.concatenate(clips), alone[0, seed])
        assert sum(map(len, clips)) == 3 * CHUNK
    for stream in streams:
        stream.close()


def test_a_prompt_changes_one_stream_only(
    engine: pyengine.Engine, batch: Batch, alone: dict[tuple[int, int], np.ndarray]
) -> None:
    changed, other = batch.stream(PROMPTS[0], seed=0), batch.stream(PROMPTS[1], seed=1)
    with engine.stream(PROMPTS[0], seed=0) as by_itself:
        for stream in (changed, by_itself):
            take(stream, 2 * CHUNK)
        calls = changed.calls_made
        while by_itself.calls_made < calls:
            by_itself._advance()
        for stream in (changed, by_itself):
            stream.prompt = PROMPTS[2]
        assert same(batch, take(changed, 4 * CHUNK), take(by_itself, 4 * CHUNK))
    assert same(batch, take(other, 4 * CHUNK), alone[1, 1])
    changed.close()
    other.close()


def test_a_snapshot_goes_between_a_batch_and_a_stream_alone(
    engine: pyengine.Engine, batch: Batch, alone: dict[tuple[int, int], np.ndarray]
) -> None:
    with batch.stream(PROMPTS[0], seed=0) as stream, batch.stream(PROMPTS[1], seed=1) as other:
        take(stream, 12)
        take(other, 3)
        state = stream.snapshot()
    with engine.resume(state) as resumed:
        assert same(batch, take(resumed, 20), alone[0, 0][12:])
    with batch.resume(state) as again:
        assert same(batch, take(again, 20), alone[0, 0][12:])
    with engine.stream(PROMPTS[0], guidance=1.0) as unguided:
        state = unguided.snapshot()
    with pytest.raises(InputError, match="batch's method and guidance"):
        batch.resume(state)


def test_the_plan_says_whether_streams_are_exact(engine: pyengine.Engine, batch: Batch) -> None:
    parts = [part for plan in engine.plans for part in plan.parts.values()]
    assert {part.exact for part in parts if part.variant.symbols.get("streams", 1) > 1} <= {True, False}
    assert batch.exact == all(part.exact is not False for part in parts)
    folder = next(part.folder for part in parts if part.variant.symbols.get("streams") == 2)
    assert json.loads((folder / "plan.json").read_text())["exact"] in (True, False)


def test_a_stream_that_nobody_reads_waits_and_holds_up_no_other(batch: Batch) -> None:
    with batch.stream(PROMPTS[0], seed=0) as read, batch.stream(PROMPTS[1], seed=0) as unread:
        take(read, 6 * CHUNK)
        assert unread.frames_made == 0
        assert len(unread._state.clips) <= 3
        assert unread.calls_made < read.calls_made


def test_a_full_or_closed_batch_refuses(engine: pyengine.Engine) -> None:
    batch = engine.batch(max_streams=1)
    stream = batch.stream(PROMPTS[0])
    with pytest.raises(ConfigError, match="at most 1 streams"):
        batch.stream(PROMPTS[1])
    batch.close()
    batch.close()
    with pytest.raises(StreamClosed):
        next(stream)
    with pytest.raises(StreamClosed, match="batch is closed"):
        batch.stream(PROMPTS[0])
    with pytest.raises(ConfigError, match="max_streams"):
        engine.batch(max_streams=0)


def test_what_is_ready_is_taken_without_a_call(
    batch: Batch, alone: dict[tuple[int, int], np.ndarray]
) -> None:
    """As a scheduler of its own takes frames: in parts, and saved in between."""
    with batch.stream(PROMPTS[0], seed=0) as stream:
        assert stream.ready() is None
        assert stream.first_unbegun() == 0
        assert 0 < stream.calls_to_full() < 200
        taken: list[np.ndarray] = []
        while len(taken) < 2 * CHUNK:
            calls = stream.calls_made
            while (clip := stream.ready(most=5)) is not None:
                assert len(clip) <= 5
                taken.extend(clip)
                if len(taken) == 5:
                    save = stream.capture(compress=False)
            assert (stream.calls_made, stream.frames_made) == (calls, len(taken))
            batch.advance()
        assert same(batch, np.stack(taken), alone[0, 0])
        # Every frame that follows soon has begun; those after the window have not.
        begun = stream.first_unbegun()
        assert begun is not None
        assert stream.frames_made < begun <= stream.frames_made + 64
    assert batch.describe(save())[1] == 5
    with batch.resume(save()) as resumed:
        rest = resumed.ready()
        assert same(batch, rest, alone[0, 0][5:])
        assert resumed.frames_made == CHUNK
