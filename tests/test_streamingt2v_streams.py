"""StreamingT2V on the driver: its schedule as plain numbers, and its streams on networks that are Python functions."""

from __future__ import annotations

from itertools import islice, pairwise
from typing import Any

import numpy as np
import pytest
from fake_methods import LATENT, encode
from fake_network import FakeEngine, FakeExecutor, fake_bundle, finish, open_stream, stream_settings
from fake_streamingt2v import CONDITION, METHOD, WINDOW, by_hand, networks, plain
from hypothesis import given, settings
from hypothesis import strategies as st
from test_calls import Ledger

from pyengine.errors import ConfigError, InputError
from pyengine.methods import make_method, method_settings
from pyengine.methods.streamingt2v import REGENERATED, StreamingT2V
from pyengine.schedule.call import Call
from pyengine.streaming import snapshot
from pyengine.streaming.driver import Driver
from pyengine.streaming.state import StreamState
from pyengine.streaming.stream import Stream

RELEASED: dict[str, Any] = METHOD | {
    "steps": 50, "clip_frames": 16, "condition_frames": 8, "attentions": [16, 7],
    "first": {"steps": 50, "guidance": 9.0},
}  # fmt: skip
NEW = WINDOW - CONDITION


def schedule_of(method: dict[str, Any], chunks: int | None, given_chunks: int = 0) -> StreamingT2V:
    made = make_method(method, chunks, given_chunks)
    assert isinstance(made, StreamingT2V)
    return made


def calls_of(schedule: StreamingT2V) -> list[Call]:
    assert schedule.calls is not None
    return [schedule.call(index) for index in range(schedule.calls)]


def component(call: Call) -> str:
    return call.variant.component if call.variant else ""


# ---- the schedule ------------------------------------------------------------------------------


@pytest.mark.parametrize(("frames", "clips"), [(24, 2), (80, 9), (240, 29), (600, 74), (1200, 149)])
def test_a_video_has_the_chunks_of_the_release(frames: int, clips: int) -> None:
    """(frames - 8) // 8 clips, the first of 16 frames among them."""
    schedule = schedule_of(RELEASED, frames // 8)
    assert schedule.later_chunks == clips - 1
    assert schedule.calls == (1 + 50 + 1) + (clips - 1) * (1 + 1 + 50)
    last = schedule.call(schedule.calls - 1)
    assert last.emit[0].frames == tuple(range(frames - 8, frames))


@pytest.mark.parametrize("given_chunks", [0, 1])
@pytest.mark.parametrize("chunks", [1, 2, 3, 75])
def test_every_frame_is_made_once_and_shown_once(chunks: int, given_chunks: int) -> None:
    schedule = schedule_of(METHOD, chunks, given_chunks)
    ledger = Ledger(schedule, 0).play()
    made = max(chunks, 0 if given_chunks else 2) * NEW
    assert ledger.shown == list(range(made))
    assert set(ledger.final) == set(ledger.shown)
    assert set(ledger.final.values()) == {0.0}
    again = {frame for frame in ledger.begun if frame >= REGENERATED}
    assert ledger.begun.keys() == set(ledger.shown) | again
    assert len(again) == (schedule.later_chunks or 0) * CONDITION  # with noise of their own each time
    assert all(ledger.updates[frame] == 3 for frame in ledger.begun)
    assert not ledger.clean  # nothing is held on to


def test_levels_are_those_of_the_released_timesteps() -> None:
    calls = [call for call in calls_of(schedule_of(RELEASED, 3)) if component(call) == "denoiser"]
    levels = [call.lanes[0].rows[0].level for call in calls]
    assert [round(level * 1000) - 1 for level in levels] == list(range(981, 0, -20))
    for before, call in pairwise(calls):
        assert all(
            one.level_next == other.level
            for one, other in zip(before.lanes[0].rows, call.lanes[0].rows, strict=True)
        )
    assert {row.level_next for row in calls[-1].lanes[0].rows} == {0.0}
    assert [call.draw for call in calls] == list(range(50))


@pytest.mark.parametrize("given_chunks", [0, 1])
def test_nothing_is_done_twice(given_chunks: int) -> None:
    """Per chunk one condition, and only new frames are decoded; no call encodes latents; what is read was kept by a call before."""
    schedule, chunks = schedule_of(RELEASED, 6, given_chunks), 6 if given_chunks else 4
    calls = calls_of(schedule)
    count = [component(call) for call in calls].count
    assert count("condition") == count("appearance") == chunks
    assert count("image_encoder") == 1
    assert count("denoiser") == 50 * chunks
    assert count("encoder") == count("decoder") == 0
    assert sum(len(emit.frames) for call in calls for emit in call.emit) == 48
    assert {len(emit.frames) for call in calls for emit in call.emit} == set(schedule.decoder_sizes) == {8}
    kept = {"pixels", "anchor_pixels"} if given_chunks else set()
    for call in calls:
        assert {key.name for key in call.reads.values()} <= kept
        kept |= {*call.writes.values(), *(name for emit in call.emit for name in emit.writes.values())}
    denoisers = dict(schedule.denoisers())
    for call in calls:
        assert call.variant in (denoisers if call.lanes else (*schedule.others(), None))


@settings(max_examples=60)
@given(st.integers(0, 6), st.integers(1, 7), st.integers(1, 5), st.booleans())
def test_a_short_stream_is_the_head_of_a_longer_and_of_an_endless_one(
    more: int, chunks: int, steps: int, is_given: bool
) -> None:
    method = METHOD | {"steps": steps}
    short, longer, endless = (
        schedule_of(method, count, int(is_given)) for count in (chunks, chunks + more, None)
    )
    assert endless.calls is None
    for index, call in enumerate(calls_of(short)):
        if call.variant is None:  # nobody reads the anchor of a stream that is its first clip
            assert call.emit == endless.call(index).emit
        else:
            assert call == longer.call(index) == endless.call(index)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"condition_frames": 3},
            r"\[method.condition_frames\] expected half of clip_frames \(4\) but got 3",
        ),
        ({"steps": 1000}, r"\[method.steps\] steps must leave room for the offset 1 below 1000"),
        ({"first": {"steps": 0, "guidance": 9}}, r"\[method.first.steps\] expected a whole number from 1"),
        ({"first": {"steps": 1000, "guidance": 9}}, r"\[method.first.steps\] steps must be from 1 to 999"),
        (
            {"first": {"steps": 9, "guidance": 9, "sampler": "euler"}},
            r"first.sampler\] expected one of dpmsolver",
        ),
        ({"betas": [0.012, 0.00085]}, r"\[method.betas\] expected two numbers that rise"),
        ({"attentions": [16]}, r"\[method.attentions\] expected a list of a whole number"),
    ],
)
def test_settings_that_cannot_be_are_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        method_settings(METHOD | change)


# ---- streams -----------------------------------------------------------------------------------


def engine_of(seconds: float | None = None) -> Any:
    made = networks()
    return FakeEngine(
        fake_bundle(made, LATENT), lambda: FakeExecutor(made, decode=plain, seconds=seconds), encode
    )


def stream_of(engine: Any, start: np.ndarray | None = None, **options: Any) -> Stream:
    how = method_settings(options.get("method", METHOD))
    chosen = {"prompt": "one", "guidance": 7.5, "given_chunks": int(start is not None), **options}
    given = None if start is None else how.pixels_of(start)  # type: ignore[union-attr]
    return Stream(engine, stream_settings(chosen.pop("method", METHOD), **chosen), given)


def texts(*prompts: str) -> list[np.ndarray]:
    return [encode(prompt)["text"] for prompt in prompts]


def start_frames(count: int = CONDITION + 1) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, LATENT.height, LATENT.width, 3), np.uint8)


@pytest.mark.parametrize("sampler", ["dpmsolver++", "ddim"])
@pytest.mark.parametrize("guidance", [7.5, 1.0])
@pytest.mark.parametrize("start", [None, start_frames()], ids=["text", "frames"])
def test_a_stream_is_the_loop_of_the_paper_to_the_bit(
    guidance: float, start: np.ndarray | None, sampler: str
) -> None:
    method = METHOD | {"first": {"steps": 4, "guidance": guidance / 2, "sampler": sampler}}
    options: dict[str, Any] = {"frames": 12, "chunks": 6, "seed": 5, "guidance": guidance, "method": method}
    with stream_of(engine_of(), start, **options) as stream:
        got = np.stack(list(stream))
    prompts = texts(*["one"] * (6 if start is not None else 5))
    assert np.array_equal(got, by_hand(prompts, 5, guidance, start, method))
    assert got.std() > 5


def test_the_first_frame_and_the_last_ones_of_a_start_matter_and_no_other() -> None:
    videos = []
    start = start_frames(5)
    for place in (None, 0, 1, 3, 4):
        changed = start.copy()
        if place is not None:
            changed[place] = 255 - changed[place]
        with stream_of(engine_of(), changed, frames=8, chunks=4) as stream:
            videos.append(np.stack(list(stream)))
    same = [np.array_equal(videos[0], video) for video in videos]
    assert same == [True, False, True, False, False]


def test_without_a_network_for_a_first_clip_a_start_is_asked_for() -> None:
    method = METHOD | {"first": None}
    with pytest.raises(
        ConfigError, match=r"\[start\] expected frames to begin with.*give a picture or a video"
    ):
        stream_of(engine_of(), method=method, frames=8, chunks=4)
    with stream_of(engine_of(), start_frames(), method=method, frames=8, chunks=4) as stream:
        assert len(list(stream)) == 8


@pytest.mark.parametrize("frames", [1, 3, 5, 7])
def test_a_length_that_is_no_multiple_of_a_chunk_is_completed_and_cut(frames: int) -> None:
    with stream_of(engine_of(), frames=frames, chunks=-(-frames // NEW)) as stream:
        got = np.stack(list(stream))
    with stream_of(engine_of()) as endless:
        assert np.array_equal(got, np.stack(list(islice(endless, frames))))


@pytest.mark.parametrize("told", range(15))
def test_a_new_prompt_shows_from_the_next_chunk_on(told: int) -> None:
    """Whenever it is set: in the first clip, between chunks, and at any step of one."""
    with stream_of(engine_of(), frames=10, chunks=5, seed=2) as stream:
        stream._advance(told)
        stream.prompt = "two"
        got = np.stack(list(stream))
    opening, per_chunk = 3 + 2, 3 + 2
    # Chunks that had read their text by then, the first clip among them.
    begun = 0 if told == 0 else 1 + max(0, -(-(told - opening - 1) // per_chunk))
    assert begun <= 4
    prompts = ["one"] * begun + ["two"] * (4 - begun)
    assert np.array_equal(got, by_hand(texts(*prompts), 2, 7.5))


@pytest.mark.parametrize("seconds", [None, 0.01])
def test_when_a_prompt_takes_effect_does_not_depend_on_timing(seconds: float | None) -> None:
    with stream_of(engine_of(seconds), seed=2) as stream:
        head = list(islice(stream, 5))
        stream.prompt = "two"
        got = np.stack(head + list(islice(stream, 9)))
        assert stream.calls_made == 5 + 5 * 5 + 1  # one beyond the chunk of which there are 2 frames
    assert np.array_equal(got, by_hand(texts("one", "one", "two", "two", "two", "two"), 2, 7.5)[:14])


@pytest.mark.parametrize("start", [None, start_frames()], ids=["text", "frames"])
def test_a_snapshot_at_any_call_goes_on_to_the_bit(start: np.ndarray | None) -> None:
    """Also with a prompt that was set within the chunk."""
    engine = engine_of()
    with stream_of(engine, start, frames=8, chunks=4) as stream:
        whole = np.stack(list(stream))
        calls = stream.calls_made
    with stream_of(engine, start, frames=8, chunks=4) as stream:
        stream._advance(6)
        stream.prompt = "two"
        changed = np.stack(list(stream))
    assert not np.array_equal(whole, changed)
    for taken in range(calls + 1):
        with stream_of(engine, start, frames=8, chunks=4) as stream:
            stream._advance(min(taken, 6))
            if taken >= 6:
                stream.prompt = "two"
            stream._advance(max(0, taken - 6))
            expected = changed if taken >= 6 else whole
            with Stream.restore(engine, stream.snapshot()) as resumed:
                assert np.array_equal(np.stack(list(resumed)), expected), taken


def test_a_snapshot_that_lacks_what_the_next_call_reads_is_refused() -> None:
    engine = engine_of()
    with stream_of(engine, frames=8, chunks=4) as stream:
        stream._advance(7)
        data = stream.snapshot()
    header = snapshot.read_header(data)
    arrays = snapshot.read_archive(data, max_bytes=10**9)
    arrays.pop("header")
    del arrays["kept/condition"]
    header = {key: value for key, value in header.items() if key not in ("digest", "format")}
    with pytest.raises(InputError, match="values that the next calls read but it has no 'condition'"):
        Stream.restore(engine, snapshot.pack(header, arrays))


def test_memory_is_flat() -> None:
    """What a stream keeps is the same after any chunk."""
    with stream_of(engine_of()) as stream:
        sizes = []
        for _ in range(20):
            list(islice(stream, NEW))
            state = stream._state
            sizes.append((sum(value.nbytes for value in state.kept.values()), len(state.made)))
            assert not state.store.state()["clean"].size
    assert len(set(sizes[4:])) == 1


def opened(driver: Driver, seed: int) -> StreamState:
    state = open_stream(driver, LATENT, stream_settings(METHOD, seed=seed, chunks=6, guidance=7.5))
    state.text = encode("one")
    return state


def driver_of(sizes: tuple[int, ...] = (1,)) -> Driver:
    made = networks()
    executor: Any = FakeExecutor(made, decode=plain)
    return Driver(executor, fake_bundle(made, LATENT), sizes)


@pytest.mark.parametrize("late", [1, 4, 5, 8, 13])
def test_streams_that_share_calls_are_what_they_are_alone(late: int) -> None:
    """A second stream joins so many calls later; one of them is told another prompt on the way."""
    driver = driver_of((1, 2))
    states = [opened(driver, seed) for seed in (3, 4)]
    for _ in range(late):
        driver.step(states[:1])
    states[0].text = encode("two")
    while not all(state.ended for state in states):
        driver.step([state for state in states if not state.ended])
    executor: Any = driver.executor
    assert {variant.symbols.get("streams") for variant, _ in executor.calls} == {None, 1, 2}
    alone = driver_of()
    expected = opened(alone, 3)
    for _ in range(late):
        alone.step([expected])
    expected.text = encode("two")
    for state, wanted in zip(states, (expected, opened(alone, 4)), strict=True):
        clips = finish(alone, wanted)
        assert np.array_equal(np.stack([clip.result() for clip in state.clips]), np.stack(clips))


def test_networks_run_once_for_what_stays_the_same() -> None:
    """`appearance` per prompt, `condition` per chunk, `image_encoder` per video; texts are written into a denoiser once per prompt."""
    driver = driver_of()
    state = open_stream(driver, LATENT, stream_settings(METHOD, chunks=6, guidance=7.5))
    state.text = encode("one")
    executor: Any = driver.executor
    written: list[str] = []
    buffers = executor.call_buffers

    def watched(variant: Any) -> Any:
        made = buffers(variant)
        inner = made.input
        made.input = lambda name: written.append(f"{variant.component} {name}") or inner(name)  # type: ignore[func-returns-value]
        return made

    executor.call_buffers = watched
    for index in range(state.schedule.calls or 0):
        if index == 5 + 2 * 5 + 3:  # within the third chunk
            state.text = encode("two")
        driver.step([state])
    runs = [variant.component for variant, _ in executor.calls]
    assert [runs.count(name) for name in ("first_text", "image_encoder", "appearance", "condition")] == [
        1,
        1,
        2,
        4,
    ]
    assert [runs.count(name) for name in ("first_denoiser", "denoiser")] == [3, 4 * 3]
    assert written.count("denoiser text_key.0") == written.count("denoiser cam_text_value.0") == 2
    assert written.count("denoiser condition") == 4
    assert written.count("first_denoiser text_key.0") == 1
