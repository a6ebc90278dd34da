"""What every method tells the driver, played on a ledger of levels: which latent lies where, at which level, and who needs it again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyengine.errors import PromptError
from pyengine.methods import Hierarchical, make_method, method_settings
from pyengine.schedule.call import Call, Lane, Row, Schedule

T = 20  # timesteps of LVDM's method


@st.composite
def progressive(draw: st.DrawFn) -> tuple[dict[str, Any], int, int]:
    """Settings, chunks and given chunks."""
    steps, size = draw(st.integers(1, 6)), draw(st.integers(1, 2))
    kind = draw(st.sampled_from(["ring", "recompute", "none"]))
    opening = None if kind == "none" else draw(st.sampled_from([None, "rflow", "warm"]))
    method = {
        "name": "progressive",
        "steps": steps,
        "chunk_frames": size,
        "cadence": draw(st.integers(1, steps)),
        "context": {
            "kind": kind,
            "sink_frames": size * draw(st.integers(0, 2)),
            "recent_frames": size * draw(st.integers(1, 3)),
        },
        "opening": opening,
    }
    chunks = 0 if kind == "none" else draw(st.integers(0, 3))
    if opening == "warm" and chunks:
        chunks += method_settings(method).remade_chunks  # type: ignore[union-attr]
    return method, draw(st.integers(1, 6)), chunks


@st.composite
def replacement(draw: st.DrawFn) -> tuple[dict[str, Any], int, int]:
    size, overlap = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    method = {
        "name": "replacement",
        "steps": draw(st.integers(1, 5)),
        "chunk_frames": size,
        "clip_frames": size * (overlap + draw(st.integers(1, 4))),
        "overlap_frames": size * overlap,
        "renoised": draw(st.booleans()),
        "ring_frames": draw(st.sampled_from([0, 4])),
    }
    return method, draw(st.integers(1, 8)), draw(st.sampled_from([0, overlap, overlap + 1]))


@st.composite
def rflow(draw: st.DrawFn) -> tuple[dict[str, Any], int, int]:
    steps, size = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    method = {"name": "rflow", "steps": steps, "chunk_frames": size, "frames_per_latent": 1.0}
    return method, draw(st.integers(1, 5)), draw(st.integers(0, 2))


@st.composite
def hierarchical(draw: st.DrawFn) -> tuple[dict[str, Any], int, int]:
    clip, interpolates = draw(st.integers(2, 4)), draw(st.booleans())
    stride = draw(st.integers(2, 4)) if interpolates else 1
    method = {
        "name": "hierarchical" if interpolates else "clip",
        "steps": draw(st.sampled_from([1, 2, 4, T])),
        "timesteps": T,
        "clip_frames": clip,
        "chunk_frames": stride if interpolates else clip,
        "known": draw(st.integers(1, clip - 1)),
        "stride": stride,
        "clips_per_round": draw(st.integers(1, 2)) if interpolates else 1,
        "left_context": draw(st.integers(0, 2)),
        "decode": draw(st.sampled_from(["windowed", "whole", "streamed"])),
        "behaviour": draw(st.sampled_from(["intended", "released"])),
        "eta": 1.0,
        "betas": (0.001, 0.01),
        "guidance": 0.0,
        "perturbation": draw(st.sampled_from([None, 0, 7])),
    }
    return method, draw(st.integers(1, 9)) if interpolates else 1, 0


ANY = st.one_of(progressive(), replacement(), rflow(), hierarchical())


class Ledger:
    """Plays calls as the driver would, with a level for each latent, and notes what happened to each frame."""

    def __init__(self, schedule: Schedule, given_frames: int) -> None:
        self.schedule = schedule
        self.flight: dict[int, tuple[int, float]] = {}  # by place: frame, level
        self.clean = set(range(given_frames))
        self.begun: dict[int, float] = {}  # by frame: the level of its birth
        self.updates: Counter[int] = Counter()
        self.final: dict[int, float] = {}
        self.shown: list[int] = []

    def play(self) -> Ledger:
        assert self.schedule.calls is not None
        for index in range(self.schedule.first_call, self.schedule.calls):
            self._recaches(index)
            self._obey(self.schedule.call(index))
        return self

    def _obey(self, call: Call) -> None:
        places: list[int] = []
        for lane in call.lanes:
            for row in lane.rows:
                self._follow(row)
            places += [row.place for row in lane.rows if row.frame >= 0]
        assert len(set(places)) == len(places)
        assert all(0 <= place < self.schedule.places for place in places)
        for emit in call.emit:
            assert set(emit.frames) <= self.clean  # what is decoded is there
            assert len(emit.frames) in self.schedule.decoder_sizes
            self.shown += emit.frames[emit.keep]
        if call.keeps is not None:
            pinned, oldest = call.keeps
            self.clean = {frame for frame in self.clean if frame < pinned or frame >= oldest}

    def _follow(self, row: Row) -> None:
        if row.frame < 0:
            assert row == Row()
            return
        own = 0.0 if row.renoised else row.level  # of the latent itself
        if row.origin == "carried":
            assert self.flight[row.place] == (row.frame, own)
        elif row.origin == "noise":
            assert row.frame not in self.begun
            self.begun[row.frame] = row.level
        else:
            assert row.frame in self.clean
            assert row.origin == "noised" or own == 0
            if row.level != row.level_next:
                assert row.frame not in self.begun
                self.begun[row.frame] = row.level
        assert row.level_next <= row.level
        self.updates[row.frame] += row.level_next < row.level
        self.flight[row.place] = row.frame, 0.0 if row.renoised else row.level_next
        assert not row.done or row.level_next < row.level
        if row.done:
            self.clean.add(row.frame)
            self.final[row.frame] = row.level_next

    def _recaches(self, index: int) -> None:
        """Calls that rewrite the ring read clean latents that are still there, and leave those in flight alone."""
        try:
            calls = list(self.schedule.recache(index))
        except PromptError:
            return
        for call in calls:
            assert not call.update
            rows = [row for lane in call.lanes for row in lane.rows if row.frame >= 0]
            assert {row.frame for row in rows} <= self.clean
            assert all(row.place < 0 and row.level == row.level_next == 0 for row in rows)


def opened(case: tuple[dict[str, Any], int, int]) -> tuple[Schedule, int]:
    """A schedule and its given frames."""
    method, chunks, given_chunks = case
    return make_method(method, chunks, given_chunks), given_chunks * method["chunk_frames"]


def all_calls(schedule: Schedule) -> list[Call]:
    assert schedule.calls is not None
    return [schedule.call(index) for index in range(schedule.first_call, schedule.calls)]


@settings(max_examples=60)
@given(ANY)
def test_the_same_number_gives_the_same_call(case: tuple[dict[str, Any], int, int]) -> None:
    """In any order, and of any schedule that was made alike: a schedule remembers nothing."""
    (schedule, _), (other, _) = opened(case), opened(case)
    calls = all_calls(schedule)
    assert calls
    backwards = range(schedule.calls - 1, schedule.first_call - 1, -1)  # type: ignore[operator]
    assert [other.call(index) for index in backwards] == calls[::-1]
    assert other.prepare() == schedule.prepare()
    denoisers = dict(schedule.denoisers())
    for call in calls:  # what is compiled is what is called
        assert call.variant is None or len(call.lanes) <= denoisers[call.variant]


@settings(max_examples=150)
@given(ANY)
def test_every_frame_gets_all_its_updates_and_ends_clean(case: tuple[dict[str, Any], int, int]) -> None:
    """Invariant 1, for what is born at the top of the ladder, and for what a warm opening noises to a rung of it."""
    schedule, given_frames = opened(case)
    ledger = Ledger(schedule, given_frames).play()
    if isinstance(schedule, Hierarchical):
        config = schedule.config
        ladder = [(step + 1) / T for step in (*config.ladder, config.final_timestep)][::-1]
    else:
        config = schedule.opening if getattr(schedule, "opening", None) else schedule.config  # type: ignore[attr-defined]
        ladder = list(config.levels)
    assert ledger.begun.keys() == ledger.final.keys()
    assert set(ledger.final.values()) == {ladder[0]}
    for frame, level in ledger.begun.items():
        assert ledger.updates[frame] == ladder.index(level), frame
    fresh = set(range(schedule.given_frames)) | ledger.begun.keys()
    assert all(ledger.updates[frame] == 0 for frame in ledger.updates.keys() - ledger.begun.keys())
    assert fresh >= set(ledger.shown)


@settings(max_examples=150)
@given(ANY)
def test_every_frame_is_shown_once_and_in_order(case: tuple[dict[str, Any], int, int]) -> None:
    method, chunks, _ = case
    schedule, given_frames = opened(case)
    shown = Ledger(schedule, given_frames).play().shown
    first = schedule.given_frames if given_frames else 0
    assert shown == list(range(first, first + len(shown)))
    wanted = schedule.length(chunks * method["chunk_frames"], 1.0)
    assert wanted is not None
    assert len(shown) >= wanted
    if not isinstance(schedule, Hierarchical):
        assert len(shown) == wanted


def sees_a_rising_window(lane: Lane, updated_only: bool) -> bool:
    rows = [row for row in lane.rows if row.frame >= 0]
    rows = [row for row in rows if not updated_only or row.level != row.level_next]
    frames, levels = [row.frame for row in rows], [row.level for row in rows]
    left = [0.0 if row.renoised else row.level_next for row in rows]
    return all(side == sorted(side) for side in (frames, levels, left))


@settings(max_examples=100)
@given(ANY)
def test_levels_never_decrease_along_the_window(case: tuple[dict[str, Any], int, int]) -> None:
    """The conditions of a clip stand at levels of their own; every other frame counts."""
    schedule, _ = opened(case)
    for call in all_calls(schedule):
        for lane in call.lanes:
            assert sees_a_rising_window(lane, isinstance(schedule, Hierarchical))


@settings(max_examples=60)
@given(st.one_of(progressive(), replacement(), hierarchical()), st.integers(1, 3))
def test_a_short_stream_is_the_head_of_an_endless_one(
    case: tuple[dict[str, Any], int, int], more: int
) -> None:
    """Invariant 3: what a row is told never depends on how long the stream is."""
    method, chunks, given_chunks = case
    if method["name"] == "clip" or method.get("behaviour") == "released" or method.get("decode") == "whole":
        return  # these need a length, and are about it
    short, endless = (make_method(method, count, given_chunks) for count in (chunks, None))
    longer = make_method(method, chunks + more, given_chunks)
    if short.first_call != endless.first_call or getattr(short, "only", False):
        return  # an opening that is the whole stream
    for index, call in enumerate(all_calls(short), short.first_call):
        assert_head(call, longer.call(index))
        assert_head(call, endless.call(index))


def assert_head(short: Call, long: Call) -> None:
    """Rows that both have are alike; the longer one may have further ones behind them, in a window of another size."""
    for one, other in zip(short.lanes, long.lanes, strict=False):
        mine = [row for row in one.rows if row.frame >= 0]
        theirs = [row for row in other.rows if row.frame >= 0]
        assert mine == theirs[: len(mine)]
    assert short.draw == long.draw


@pytest.mark.parametrize("given_chunks", [0, 1])
def test_lanes_without_frames_are_told_nothing(given_chunks: int) -> None:
    method = {
        "name": "progressive", "steps": 4, "chunk_frames": 2, "cadence": 2,
        "context": {"kind": "recompute", "sink_frames": 0, "recent_frames": 2},
    }  # fmt: skip
    first: Sequence[Row] = make_method(method, 3, given_chunks).call(0).lanes[0].rows
    assert [row.frame for row in first] == [-1] * (4 - 2 * given_chunks) + list(range(2 + 2 * given_chunks))
