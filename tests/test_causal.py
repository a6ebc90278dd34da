"""Method causal: which frames each call has, sees and writes, for any settings. Views of the released systems: test_wan_*loops."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyengine.bundle.manifest import Video
from pyengine.errors import ConfigError
from pyengine.methods import make_method, method_settings
from pyengine.methods.causal import Causal
from pyengine.schedule.call import Call, Row
from pyengine.schedule.causal import CausalConfig, CleanView, Recache, Writing

SELF_FORCING: dict[str, Any] = {
    "name": "causal", "steps": 4, "chunk_frames": 3, "cadence": 4, "warp": 5.0, "visible_frames": 21, "sampler": "renoise",
}  # fmt: skip


@st.composite
def configs(draw: st.DrawFn) -> CausalConfig:
    steps, size = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    cadence = draw(st.integers(1, steps))
    sink = draw(st.integers(0, 5))
    least = sink + max(-(-steps // cadence), 2) * size
    view: CleanView = draw(st.sampled_from(get_args(CleanView)))
    policies: tuple[Recache, ...] = (
        "none",
        "chunks",
        "kept",
        "rewritten",
        *(("replaced",) if view == "window" else ()),
    )
    return CausalConfig(
        steps=steps,
        chunk_frames=size,
        cadence=cadence,
        visible_frames=least + draw(st.integers(0, 9)),
        chunks=draw(st.integers(1, 12)),
        sink_frames=sink,
        clean_view=view,
        first_chunk=draw(st.none() | st.integers(1, size)),
        given_chunks=draw(st.integers(0, 3)),
        recache=draw(st.sampled_from(policies)),
    )


def present(call: Call) -> list[Row]:
    return [row for row in call.lanes[0].rows if row.frame >= 0]


class Ring:
    """What lies in each slot, as the calls leave it."""

    def __init__(self, slots: int) -> None:
        self.frames = [-1] * slots

    def obey(self, call: Call) -> None:
        """No call reads a slot that holds another frame than it believes, nor its own rows."""
        rows, (lane,) = present(call), call.lanes
        for slot, frame in enumerate(lane.ring):
            assert frame in (-1, self.frames[slot])
        seen = [frame for frame in lane.ring if frame >= 0]
        assert len(set(seen)) == len(seen)
        assert not {row.frame for row in rows} & set(seen)
        for row in rows:
            if row.slot >= 0:
                self.frames[row.slot] = row.frame


@given(configs())
def test_every_chunk_gets_its_steps_and_is_written_once(config: CausalConfig) -> None:
    schedule, ring = Causal(config), Ring(config.ring_frames)
    assert schedule.calls is not None
    updates: dict[int, int] = {}
    emitted: list[int] = []
    written: list[int] = []
    for index in range(schedule.first_call, schedule.calls):
        call = schedule.call(index)
        rows, (lane,) = present(call), call.lanes
        ring.obey(call)
        assert len(rows) + sum(frame >= 0 for frame in lane.ring) <= config.visible_frames
        assert len(lane.rows) in schedule.row_counts
        assert [row.frame for row in rows] == list(range(rows[0].frame, rows[0].frame + len(rows)))
        levels = [row.level for row in rows]
        assert levels == sorted(levels)
        if isinstance(config.at(index), Writing):
            assert not call.update
            written += [row.frame for row in rows]
            continue
        assert min(row.level - row.level_next for row in rows) > 0
        for row in rows:
            assert (updates.get(row.frame, 0) == 0) == (row.origin == "noise")
            updates[row.frame] = updates.get(row.frame, 0) + 1
            assert row.done == (updates[row.frame] == config.steps)
        emitted += [frame for emit in call.emit for frame in emit.frames]
    start, end = schedule.given_frames, config.start(config.given_chunks + (config.chunks or 0))
    assert emitted == list(range(start, end))
    assert updates == dict.fromkeys(range(start, end), config.steps)
    assert written == list(range(end - config.size(config.given_chunks + (config.chunks or 0) - 1)))


@given(configs(), st.integers(0, 60))
def test_a_change_of_the_prompt_leaves_a_ring_that_the_calls_expect(config: CausalConfig, at: int) -> None:
    schedule = Causal(config)
    assert schedule.calls is not None
    at = schedule.first_call + at % (schedule.calls - schedule.first_call)
    ring = Ring(config.ring_frames)
    for index in range(schedule.first_call, schedule.calls):
        if index == at:
            for call in schedule.recache(index):
                ring.obey(call)
                assert len(call.lanes[0].rows) in schedule.row_counts
            schedule = schedule.switched(index)
        ring.obey(schedule.call(index))


@given(configs())
def test_a_stream_is_the_head_of_a_longer_one(config: CausalConfig) -> None:
    from dataclasses import replace

    schedule, endless = Causal(config), Causal(replace(config, chunks=None))
    until = config.cadence * ((config.chunks or 0) - 1) + 1  # from here on a finite window drains
    for index in range(schedule.first_call, until):
        assert schedule.call(index) == endless.call(index)


def test_calls_of_self_forcing() -> None:
    """Four denoising calls of three rows and one that writes, at cadence 5; 29 calls of 6 chunks."""
    schedule = make_method(method_settings(SELF_FORCING), 6, 0)
    assert isinstance(schedule, Causal)
    assert (schedule.calls, schedule.period, schedule.row_counts, schedule.config.ring_frames) == (
        29,
        5,
        (3,),
        18,
    )
    levels = [present(schedule.call(index))[0].level for index in range(5)]
    assert np.allclose(levels, [1, 0.9375, 0.8333333, 0.625, 0])


def test_streams_have_no_end() -> None:
    """Far beyond the 1,024 frames of the original's table, and with settings and memory that stay what they were."""
    schedule = make_method(method_settings(SELF_FORCING | {"sink_frames": 3, "visible_frames": 12}), None, 0)
    assert isinstance(schedule, Causal)
    call = schedule.call(5 * 10**9 + 2)
    frames = [row.frame for row in present(call)]
    assert frames == [3 * 10**9 + place for place in range(3)]
    assert sorted(call.lanes[0].ring) == [0, 1, 2, *range(frames[0] - 6, frames[0])]
    assert call.keeps == (3, frames[0] - 12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cadence": 5}, "cadence must be from 1 to the 4 steps"),
        (
            {"visible_frames": 5},
            "visible_frames must hold sink_frames and the chunks of a window, or two, which are 6",
        ),
        ({"cadence": 1, "sink_frames": 3, "visible_frames": 14}, "which are 15 frames"),
        ({"first_chunk": 4}, "first_chunk must be from 1 to chunk_frames 3"),
        ({"visible_frames": 5000}, "at most 4096"),
        ({"clean_view": "all"}, "clean_view"),
        ({"recache": "all"}, "recache"),
        ({"sink_frames": 3, "clean_view": "recent", "recache": "replaced"}, "keeps no sink"),
        ({"ladder": [0, 0.5, 0.4, 0.8, 1]}, "levels must increase"),
        ({"ladder": [0, 0.25, 0.5, 0.75, 1.1]}, "ladder must be 5 levels from 0 up, to 1 at most"),
        ({"context": {"sink_frames": 0, "recent_frames": 3}}, "visible_frames and sink_frames"),
        ({"known_levels": [0, 0.5, 1]}, "levels that the network has tables for, which are 0, 0.5, 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_method(method_settings(SELF_FORCING | changes), 6, 0)


def test_calls_that_a_stream_does_not_have_are_refused() -> None:
    schedule = make_method(method_settings(SELF_FORCING), 2, 1)
    for index in (-2, 9):
        with pytest.raises(ConfigError, match=f"call must be from -1 to 8 but is {index}"):
            schedule.call(index)


def test_a_ladder_that_ends_below_one() -> None:
    ladder = [0, 0.6246874, 0.8330554, 0.93726546, 0.99979985]
    schedule = make_method(method_settings(SELF_FORCING | {"ladder": ladder, "warp": 1.0}), 2, 0)
    assert present(schedule.call(0))[0].level == pytest.approx(0.99979985)


@pytest.mark.parametrize(
    ("video", "first", "later"),
    [
        (Video(8, 8, 16.0, 4, 1), 3, 3),
        (Video(8, 8, 16.0, 4, 1), 1, 3),
        (Video(8, 8, 24.0, 3.4), 5, 5),
        (Video(8, 8, 8.0, 1), 2, 2),
        (Video(8, 8, 8.0, 4), 3, 3),
    ],
)
@pytest.mark.parametrize("given_chunks", [0, 1, 3])
def test_chunks_for_a_length(video: Video, first: int, later: int, given_chunks: int) -> None:
    """The fewest chunks that make as many frames, counted one by one."""
    given = 0 if not given_chunks else first + (given_chunks - 1) * later
    for frames in range(1, 60):
        chunks = 1
        while (
            video.frames(given + (first if not given else later) + (chunks - 1) * later) - video.frames(given)
            < frames
        ):
            chunks += 1
        assert video.chunks(frames, first, later, given) == chunks


def test_frames_in_front_of_a_video() -> None:
    assert [Video(8, 8, 16.0, 4, 1).lead(latent) for latent in (0, 1, 3)] == [3, 0, 0]
    assert Video(8, 8, 24.0, 3.4).lead(0) == 0
