"""The second stage on the driver: a wavefront of chunks, blended at random, against the whole-video order and the original's numbers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pytest
from fake_enhancer import GOLDEN, SHAPE, golden_settings, opened
from fake_network import finish
from streamingt2v_golden import array, difference, own_error

from pyengine.errors import ConfigError
from pyengine.methods.enhancement import Enhancement
from pyengine.schedule.samplers import frame_noise
from pyengine.schedule.wavefront import ChunkStep, Wavefront
from pyengine.streaming.state import StreamState


@dataclass(frozen=True)
class WholeVideo(Wavefront):
    """Every chunk makes a step before one makes the next."""

    @property
    def calls(self) -> int:
        assert self.chunks is not None
        return self.chunks * self.steps

    @property
    def frames_in_flight(self) -> int:
        assert self.frames is not None
        return self.frames

    def step_at(self, call: int) -> ChunkStep | None:
        assert self.chunks is not None
        step, chunk = divmod(call, self.chunks)
        return super().step_at((chunk + self.reach * step) * self.steps + step)

    def first_open(self, call: int) -> int:
        return self.frames_in_flight  # it forgets nothing that is given


class WholeOrder(Enhancement):
    @cached_property
    def wave(self) -> Wavefront:
        own = super().wave
        return WholeVideo(own.steps, own.chunk, own.overlap, own.chunks, own.blending, own.seed)


def video(schedule: Enhancement, given: np.ndarray, seed: int = 5) -> np.ndarray:
    """What leaves, frame by frame. [frames, 4, 5, 7]"""
    driver, state = opened(schedule, given, seed)
    made = finish(driver, state)
    assert all(len(clip) == 1 for clip in made)
    return np.concatenate(made)


def sources(frames: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((frames, *SHAPE)).astype(np.float32)


@pytest.mark.parametrize(
    ("chunks", "steps", "overlap"), [(1, 3, 8), (3, 4, 8), (8, 3, 8), (6, 3, 15), (3, 3, 0)]
)
def test_a_wavefront_gives_the_frames_of_the_whole_video_order_to_the_bit(
    chunks: int, steps: int, overlap: int
) -> None:
    settings = golden_settings(steps=steps, overlap=overlap)
    given = sources(chunks * (settings.clip_frames - overlap) + overlap)
    got = video(Enhancement(settings, chunks, 3), given)
    assert got.shape == given.shape
    assert np.isfinite(got).all()
    assert np.array_equal(got, video(WholeOrder(settings, chunks, 3), given))
    if chunks > 1 and overlap:
        assert not np.array_equal(got, video(Enhancement(settings, chunks, 4), given))


def test_the_golden_loop_on_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    noise, draws = array("blending_loop/noise")[0], array("blending_loop/sde_noise")
    splits = array("blending_loop/split").astype(int).reshape(GOLDEN["steps"], -1)

    def golden_noise(seed: int, frame: int, shape: Any, draw: int | None, out: np.ndarray) -> None:
        out[...] = noise[:, frame] if draw is None else draws[draw][:, frame]

    monkeypatch.setattr("pyengine.streaming.driver.frame_noise", golden_noise)
    monkeypatch.setattr(
        "pyengine.schedule.wavefront.split_at", lambda seed, step, chunk, _: int(splits[step, chunk - 1])
    )
    given = np.ascontiguousarray(array("blending_loop/x0")[0].swapaxes(0, 1))
    got = video(Enhancement(golden_settings(), 3, 0), given).swapaxes(0, 1)[None]
    # Off by the rounding of our own noise levels, and of one product where the original has two.
    assert difference(got, "blending_loop/x_final")[1] <= 2 * own_error("blend:x_final")[1] + 4e-6


def test_frames_leave_before_later_ones_are_there() -> None:
    """The release needs the whole video first. Here a frame is given when the schedule says that it is needed, and no earlier."""
    settings, chunks = golden_settings(steps=3), 9
    given = sources(chunks * 16 + 8)
    whole = video(Enhancement(settings, chunks, 3), given)
    schedule = Enhancement(settings, None, 3)
    driver, state = opened(schedule, given[:0])
    there, held = 0, list[int]()
    first = None
    while len(state.clips) < 16 * (chunks - 3):
        while there < schedule.needs(state.call):
            state.store.give(there, given[there])
            there += 1
        driver.step([state])
        held.append(len(state.store.clean))  # type: ignore[attr-defined]
        if state.clips and first is None:
            first = there
            held.clear()
    assert first == 24 + 2 * 16  # two chunks ahead of the one that has left
    got = np.concatenate([clip.result() for clip in state.clips])
    assert np.array_equal(got, whole[: len(got)])
    assert max(held) <= 2 * 24  # what is noised and not done lies in flight alone
    assert state.store.flight.shape[0] == schedule.places == 3 * (2 * 16 + 24)  # type: ignore[attr-defined]


def copy_of(state: StreamState, schedule: Enhancement) -> tuple[Any, StreamState]:
    """Another stream that goes on from there."""
    driver, other = opened(schedule, sources(0))
    other.store.load_state(state.store.state())
    other.call = state.call
    return driver, other


def test_what_a_call_depends_on_is_in_the_latent_store() -> None:
    settings = golden_settings(steps=3)
    schedule = Enhancement(settings, 4, 3)
    given = sources(4 * 16 + 8)
    whole = video(schedule, given)
    driver, state = opened(schedule, given)
    assert schedule.calls is not None
    for call in range(schedule.calls):
        if call % 4 == 0:
            other_driver, other = copy_of(state, schedule)
            rest = finish(other_driver, other)
            made = len(state.clips)
            assert np.array_equal(np.concatenate(rest), whole[made:])
        driver.step([state])


def test_streams_share_a_run_where_their_calls_are_alike() -> None:
    schedule = Enhancement(golden_settings(steps=2), 2, 3)
    given = sources(40)
    alone = video(schedule, given)
    driver, first = opened(schedule, given, sizes=(1, 2))
    _, second = opened(schedule, given)
    while not first.ended:
        driver.step([first, second])
    for state in (first, second):
        assert np.array_equal(np.concatenate([clip.result() for clip in state.clips]), alone)
    assert {variant.symbols["streams"] for variant, _ in driver.executor.calls} == {2}  # type: ignore[attr-defined]


# ---- what the paper compares --------------------------------------------------------------------


def test_the_three_ways_differ_in_the_noise_of_the_overlap_and_in_who_decides() -> None:
    given = sources(40)
    made = {
        name: video(Enhancement(golden_settings(steps=4, blending=name), 2, 3), given)
        for name in ("randomized", "shared", "independent")
    }
    # The first chunk of both ways without blending is the same but for its noise; its overlap is not shown.
    single = {
        name: video(Enhancement(golden_settings(steps=4, blending=name), 1, 3), given[:24]) for name in made
    }
    assert np.array_equal(single["randomized"], single["shared"])
    assert not np.array_equal(single["shared"], single["independent"])
    assert np.array_equal(made["shared"][:16], single["shared"][:16])
    assert np.array_equal(made["independent"][:16], single["independent"][:16])
    assert not np.array_equal(made["shared"][16:24], single["shared"][16:24])
    assert not np.array_equal(made["randomized"][:16], single["randomized"][:16])


def test_which_noise_a_chunk_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, list[tuple[int, int | None]]] = {}
    for name in ("randomized", "shared", "independent"):
        seen: list[tuple[int, int | None]] = drawn.setdefault(name, [])

        def note(
            seed: int, frame: int, shape: Any, draw: int | None, out: np.ndarray, seen: Any = seen
        ) -> None:
            seen.append((frame, draw))
            frame_noise(seed, frame, shape, draw, out)

        monkeypatch.setattr("pyengine.streaming.driver.frame_noise", note)
        video(Enhancement(golden_settings(steps=3, blending=name), 2, 3), sources(40))
    frames, overlap = range(40), range(16, 24)
    # The last step adds none.
    once = [(frame, draw) for frame in frames for draw in (None, 0, 1)]
    assert sorted(drawn["randomized"], key=str) == sorted(once, key=str)
    twice = once + [(frame, draw) for frame in overlap for draw in (None, 0, 1)]
    assert sorted(drawn["shared"], key=str) == sorted(twice, key=str)
    assert len(set(drawn["independent"])) == len(drawn["independent"]) == len(twice)


def test_lengths() -> None:
    settings = golden_settings()
    assert [settings.covered(frames) for frames in (1, 24, 25, 80, 240)] == [24, 24, 40, 88, 248]
    assert [settings.chunks_of(frames) for frames in (1, 24, 25, 80, 240)] == [1, 1, 2, 5, 15]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"overlap": 24}, r"\[method.enhancer\] overlap must be from 0 to below the chunk of 24"),
        ({"levels": 1000}, r"\[method.enhancer\] expected steps from 1 and levels from 2 to 999"),
        ({"steps": 700}, r"at most 599 steps of 600 levels but got 700"),
    ],
)
def test_settings_that_cannot_be_are_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        golden_settings(**change)
