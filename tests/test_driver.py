"""The driver on networks that are Python functions: what a stream is, alone and among others, with no compiled plan."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import pytest
from fake_methods import LATENT, RING, Feedback, decode, denoiser, encode, feedback_networks
from fake_network import (
    FakeEngine,
    FakeExecutor,
    FakeNetwork,
    fake_bundle,
    finish,
    open_stream,
    stream_settings,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from pyengine import _C
from pyengine.errors import ConfigError, PlanError
from pyengine.schedule.samplers import euler, frame_noise
from pyengine.streaming import stream as stream_module
from pyengine.streaming.driver import Driver
from pyengine.streaming.state import StreamState
from pyengine.streaming.stream import Stream

SHAPE = (LATENT.channels, LATENT.height, LATENT.width)
CONTEXT = {"kind": "ring", "sink_frames": 2, "recent_frames": RING - 2}
PROGRESSIVE = {"name": "progressive", "steps": 4, "chunk_frames": 2, "cadence": 2, "context": CONTEXT}
SLIDING = PROGRESSIVE | {"cadence": 1}  # a chunk leaves at every call
REPLACED = {
    "name": "replacement", "steps": 3, "chunk_frames": 2, "clip_frames": 6, "overlap_frames": 2, "renoised": True,
    "ring_frames": RING, "sampler": "renoise",
}  # fmt: skip


def driver_of(networks: dict[str, FakeNetwork], sizes: tuple[int, ...] = (1,)) -> Driver:
    executor: Any = FakeExecutor(networks, decode=decode, ring=RING)
    return Driver(executor, fake_bundle(networks, LATENT), sizes)


def opened(driver: Driver, method: dict[str, Any], prompt: str = "one", **options: Any) -> StreamState:
    state = open_stream(driver, LATENT, stream_settings(method, **options))
    state.text = encode(prompt)
    return state


# ---- invariant 2: the ordinary sampler -----------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize(
    ("method", "chunks", "frames"),
    [
        (PROGRESSIVE | {"cadence": 4}, 1, 2),
        ({"name": "rflow", "steps": 4, "chunk_frames": 2, "frames_per_latent": 1.0}, 3, 6),
        (REPLACED | {"steps": 4, "sampler": "euler", "renoised": False}, 3, 6),
    ],
)
def test_one_chunk_or_clip_is_the_ordinary_sampler_to_the_bit(
    method: dict[str, Any], chunks: int, frames: int, guidance: float
) -> None:
    ring = method["name"] != "rflow"
    driver = driver_of({"denoiser": denoiser(ring=ring)})
    state = opened(driver, method, chunks=chunks, guidance=guidance, seed=5)
    finish(driver, state)
    got = state.store.window(range(frames))

    network = denoiser(ring=ring)
    x = np.stack([frame_noise(5, frame, SHAPE) for frame in range(frames)])[None]
    written_out = x[0].copy()
    weights = np.array(state.weights, np.float32)[:, None]
    inputs = {"frame_index": np.arange(frames)[None], "text": encode("one")["text"][: len(weights), None]}
    if ring:
        inputs |= {"ring_index": np.full((1, RING), -1), "append_slot": np.full((1, frames), -1)}
    rings = [{"ring_key": np.zeros((2, RING, 3), np.float32)}]
    for step in range(4):
        now, then = np.full(frames, 1 - step / 4), np.full(frames, 1 - (step + 1) / 4)
        level = now[None].astype(np.float32)
        prediction = network.run(inputs | {"latents": x, "level": level}, rings)["prediction"]
        sample, predicted, _ = (scale[None] for scale in euler(now, then))
        _C.denoise_step(x, prediction, weights, sample, predicted, np.zeros_like(sample), out=x)
        written_out += np.float32(0.25) * np.tensordot(weights[:, 0], prediction[:, 0], 1)
    assert np.array_equal(got, x[0])
    assert np.allclose(got, written_out, rtol=0, atol=1e-5)


# ---- streams on the driver -----------------------------------------------------------------------


def engine_of(networks: dict[str, FakeNetwork], seconds: float | None = None, see: Any = decode) -> Any:
    return FakeEngine(
        fake_bundle(networks, LATENT),
        lambda: FakeExecutor(networks, decode=see, seconds=seconds, ring=RING),
        encode,
    )


def stream_of(engine: Any, method: dict[str, Any], **options: Any) -> Stream:
    return Stream(engine, stream_settings(method, prompt="one", **options))


@pytest.mark.parametrize("method", [PROGRESSIVE, SLIDING, REPLACED], ids=["m = 2", "every call", "clips"])
def test_a_schedule_that_ends_short_is_said(method: dict[str, Any]) -> None:
    with stream_of(engine_of({"denoiser": denoiser(ring=True)}), method, frames=40, chunks=3) as stream:
        assert len(list(islice(stream, 6))) == 6
        with pytest.raises(PlanError, match=r"schedule ended after \d+ calls with 6 of 40 frames"):
            next(stream)


@pytest.mark.parametrize("method", [SLIDING, PROGRESSIVE, REPLACED], ids=["every call", "m = 2", "clips"])
@pytest.mark.parametrize("taken", [2, 7])
def test_when_a_prompt_takes_effect_does_not_depend_on_timing(method: dict[str, Any], taken: int) -> None:
    """Invariant 3: with a decoder that is done at once, and with one that is slower than everything else."""
    networks = {"denoiser": denoiser(ring=True)}
    videos, calls = [], []
    for seconds in (None, 0.01, 0.0):
        with stream_of(engine_of(networks, seconds), method) as stream:
            frames = list(islice(stream, taken))
            stream.prompt = "two"
            calls.append(stream.calls_made)
            videos.append(np.stack(frames + list(islice(stream, 21))))
    assert calls[0] == calls[1] == calls[2]
    assert np.array_equal(videos[0], videos[1])
    assert np.array_equal(videos[0], videos[2])
    with stream_of(engine_of(networks), method) as stream:  # the prompt shows at all
        assert not np.array_equal(np.stack(list(islice(stream, taken + 21))), videos[0])


@pytest.mark.parametrize("method", [SLIDING, PROGRESSIVE, REPLACED], ids=["every call", "m = 2", "clips"])
@pytest.mark.parametrize("taken", [0, 2, 5])
def test_a_resumed_stream_answers_a_new_prompt_as_the_first_would_have(
    method: dict[str, Any], taken: int
) -> None:
    """Frames that were ready when the snapshot was taken stay clips of their own, so that calls come when they would have come."""
    engine = engine_of({"denoiser": denoiser(ring=True)})
    with stream_of(engine, method) as stream:
        list(islice(stream, taken))
        state = stream.snapshot()
        with Stream.restore(engine, state) as resumed:
            for each in (stream, resumed):
                list(islice(each, 3))
            assert resumed.calls_made == stream.calls_made
            stream.prompt = resumed.prompt = "two"
            assert np.array_equal(np.stack(list(islice(stream, 17))), np.stack(list(islice(resumed, 17))))
            assert [len(clip) for clip in islice(resumed.clips(), 3)] == [
                len(c) for c in islice(stream.clips(), 3)
            ]


def test_a_warm_opening_remakes_what_it_is_given() -> None:
    """Of a full window of four chunks, three are noised to their levels: the video begins with those, made again."""
    networks = {"denoiser": denoiser(ring=True)}
    method = SLIDING | {"opening": "warm"}
    given = np.random.default_rng(0).standard_normal((8, *SHAPE)).astype(np.float32)
    settings = stream_settings(method, frames=12, chunks=6, given_chunks=4)
    with Stream(engine_of(networks), settings, given) as stream:
        assert len(list(stream)) == 12
        kept = stream._state.store.window([0, 1])
        assert stream.calls_made == 4 + 5 - 3  # K = m (N - 1) + S, less those that filled the window
    assert np.array_equal(kept, given[:2])
    with pytest.raises(ConfigError, match="a start of 4 chunks or more"):
        Stream(engine_of(networks), stream_settings(method, given_chunks=3, chunks=6), given[:6])


# ---- pixels that are fed back --------------------------------------------------------------------


def plain(latents: np.ndarray, memory: np.ndarray) -> np.ndarray:
    """`decode` of a decoder that remembers nothing."""
    return decode(latents, np.zeros_like(memory))


def test_a_method_may_read_the_pixels_that_it_made() -> None:
    networks = feedback_networks()
    executor: Any = FakeExecutor(networks, decode=plain)
    driver = Driver(executor, fake_bundle(networks, LATENT))
    state = open_stream(driver, LATENT, stream_settings(PROGRESSIVE, seed=3, guidance=2.0), Feedback(3))
    state.text = encode("one")
    clips = finish(driver, state)
    assert len(clips) == 3
    anchors = [given["anchor"][:, 0] for variant, given in executor.calls if variant.component == "denoiser"]
    assert len(anchors) == 9
    expected = [np.full(3, 3.5, np.float32)]  # of no pixels
    expected += [(clip / np.float32(128)).mean((0, 1, 2), dtype=np.float32) for clip in clips[:2]]
    for index, anchor in enumerate(anchors):
        assert np.array_equal(anchor, np.stack([expected[index // 3]] * 2))
    assert not np.array_equal(expected[1], expected[2])


def test_what_was_read_back_survives_a_snapshot(monkeypatch: pytest.MonkeyPatch) -> None:
    networks = feedback_networks()
    monkeypatch.setattr(stream_module, "make_method", lambda how, chunks, given_chunks: Feedback(chunks))
    engine = engine_of(networks, see=plain)
    options = stream_settings(PROGRESSIVE, prompt="one", frames=8, chunks=4, guidance=2.0)
    with Stream(engine, options) as stream:
        whole = np.stack(list(stream))
    for calls in range(Feedback(4).calls):
        with Stream(engine, options) as stream:
            for _ in range(calls):
                stream._advance()
            with Stream.restore(engine, stream.snapshot()) as resumed:
                assert np.array_equal(np.stack(list(resumed)), whole), calls


# ---- invariant 8: many streams -------------------------------------------------------------------

KINDS: list[tuple[dict[str, Any], float]] = [
    (PROGRESSIVE, 3.0),
    (PROGRESSIVE, 1.0),
    (SLIDING, 3.0),
    (REPLACED, 3.0),
]


@dataclass
class Member:
    """A stream and what was done to it."""

    kind: int
    seed: int
    state: StreamState
    done: list[str] = field(default_factory=list)

    def tell(self, driver: Driver, prompt: str) -> None:
        self.done.append(prompt)
        change(driver, self.state, prompt)


def change(driver: Driver, state: StreamState, prompt: str) -> None:
    state.text = encode(prompt)
    driver.recache(state)


def joined(driver: Driver, kind: int, seed: int) -> StreamState:
    method, guidance = KINDS[kind]
    return opened(driver, method, guidance=guidance, seed=seed)


def assert_as_alone(member: Member) -> None:
    driver = driver_of({"denoiser": denoiser(ring=True)})
    alone = joined(driver, member.kind, member.seed)
    for what in member.done:
        if what == "":
            driver.step([alone])
        else:
            change(driver, alone, what)
    got, expected = member.state, alone
    assert got.call == expected.call
    for name, array in expected.store.state().items():
        assert np.array_equal(got.store.state()[name], array), name
    assert np.array_equal(got.rings["ring_key"], expected.rings["ring_key"])
    frames = [[clip.result() for clip in state.clips] for state in (got, expected)]
    assert len(frames[0]) == len(frames[1])
    assert all(np.array_equal(*pair) for pair in zip(*frames, strict=True))


events = st.one_of(
    st.tuples(st.just("join"), st.integers(0, len(KINDS) - 1), st.integers(0, 2)),
    st.tuples(st.just("step"), st.integers(0, 63), st.just(0)),  # bits: who plays
    st.tuples(st.just("step"), st.just(63), st.just(0)),
    st.tuples(st.just("prompt"), st.integers(0, 5), st.integers(0, 2)),
    st.tuples(st.just("leave"), st.integers(0, 5), st.just(0)),
)


@settings(max_examples=60)
@given(st.lists(events, min_size=4, max_size=50), st.sampled_from([(1,), (1, 2), (1, 2, 4), (3,)]))
def test_streams_that_share_calls_are_what_they_are_alone(
    happens: list[tuple[str, int, int]], sizes: tuple[int, ...]
) -> None:
    driver = driver_of({"denoiser": denoiser(ring=True)}, sizes)
    members: list[Member] = []
    for what, number, other in happens:
        if what == "join" and len(members) < 6:
            members.append(Member(number, other, joined(driver, number, other)))
        elif what == "step":
            playing = [member for place, member in enumerate(members) if number >> place & 1]
            driver.step([member.state for member in playing])
            for member in playing:
                member.done.append("")
        elif what == "prompt" and number < len(members):
            members[number].tell(driver, ("one", "two", "three")[other])
        elif what == "leave" and number < len(members):
            leaver = members.pop(number)
            driver.forget(leaver.state)
            assert_as_alone(leaver)
    for member in members:
        assert_as_alone(member)


def test_calls_of_one_kind_run_together() -> None:
    driver = driver_of({"denoiser": denoiser(ring=True)}, (1, 2, 4))
    executor: Any = driver.executor
    states = [joined(driver, kind, seed) for kind, seed in ((0, 0), (1, 0), (0, 1), (0, 2), (3, 0))]
    driver.step(states)
    assert {(variant.symbols["streams"], variant.symbols["branches"]) for variant, _ in executor.calls} == {
        (4, 2), (1, 1), (1, 2),
    }  # fmt: skip
    (shared,) = [given for variant, given in executor.calls if variant.symbols["streams"] == 4]
    rows = shared["frame_index"] >= 0
    assert rows[:3].any(1).all()
    assert not rows[3].any()  # nobody's lane
    assert (shared["ring_index"][3] == -1).all()
    assert (shared["append_slot"][3] == -1).all()
    assert len({shared["latents"][lane].tobytes() for lane in range(3)}) == 3
