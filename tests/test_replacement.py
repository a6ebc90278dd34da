"""Replacement sampling: clips with a head taken from the clip before."""

from dataclasses import replace
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyengine.errors import ConfigError
from pyengine.schedule.replacement import ReplacementConfig, replacement_step_at

RN_O = ReplacementConfig(
    steps=30, chunk_frames=5, clip_frames=15, overlap_frames=5, renoised=False, chunks=84, given_chunks=1
)


def replacement_steps(config, start=0):
    """Every call in order, from call `start`."""
    call = start
    while config.calls is None or call < config.calls:
        yield replacement_step_at(config, call)
        call += 1


@st.composite
def configs(draw):
    size = draw(st.integers(1, 3))
    overlap = draw(st.integers(1, 3))
    given_chunks = draw(st.sampled_from([0, overlap, overlap + 1]))
    return ReplacementConfig(
        steps=draw(st.integers(1, 6)),
        chunk_frames=size,
        clip_frames=size * (overlap + draw(st.integers(1, 4))),
        overlap_frames=size * overlap,
        renoised=draw(st.booleans()),
        chunks=draw(st.integers(1, 9)),
        given_chunks=given_chunks,
    )


def test_rn_o_takes_the_papers_1260_calls_and_18900_latent_frames():
    record = list(replacement_steps(RN_O))
    assert len(record) == RN_O.calls == 1260
    assert sum(step.present for step in record) == 18900
    assert 5 + 5 * sum(len(step.emit) for step in record) == 425


@given(configs())
def test_every_frame_is_updated_s_times_and_emitted_once(config):
    updates, emitted, before = {}, [], None
    for step in replacement_steps(config):
        assert step.frames == step.present == config.clip_frames
        assert list(step.frame_index) == list(range(step.frame_index[0], step.frame_index[0] + step.frames))
        for row, frame in enumerate(step.frame_index):
            assert (step.source[row] >= 0) + (row in step.born) + (row in step.given) == 1
            if step.source[row] >= 0:
                assert before.frame_index[step.source[row]] == frame
            updates[frame] = updates.get(frame, 0) + (step.level_next[row] < step.level[row])
        emitted += step.emit
        before = step
    first = config.given_chunks * config.chunk_frames
    assert emitted == list(range(config.given_chunks, config.given_chunks + config.chunks))
    assert all(count == (0 if frame < first else config.steps) for frame, count in updates.items())
    assert set(range(first, first + config.chunks * config.chunk_frames)) <= updates.keys()
    assert step.call == config.calls - 1


@given(configs())
def test_new_frames_share_one_level_and_the_head_is_clean_or_at_that_level(config):
    for step in replacement_steps(config):
        head = [row for row in range(step.frames) if step.level[row] == step.level_next[row]]
        new = [row for row in range(step.frames) if row not in head]
        assert head == list(range(len(head)))
        assert len(head) in (0, config.overlap_frames)
        common = config.levels[config.steps - step.call % config.steps]
        assert {step.level[row] for row in new} == {common}
        assert {step.level[row] for row in head} <= {common if config.renoised else 0.0}
        assert step.renoised == (tuple(head) if config.renoised else ())


def test_the_head_is_the_tail_of_the_clip_before():
    step = replacement_step_at(RN_O, 30)
    assert step.source == (10, 11, 12, 13, 14) + (-1,) * 10
    assert step.frame_index == tuple(range(10, 25))
    assert step.born == tuple(range(5, 15))


def test_without_given_frames_the_first_clip_is_all_new():
    config = replace(RN_O, given_chunks=0)
    first, second = replacement_step_at(config, 0), replacement_step_at(config, 30)
    assert (first.given, first.born, first.frame_index[0]) == ((), tuple(range(15)), 0)
    assert (second.source[:5], second.frame_index[0]) == ((10, 11, 12, 13, 14), 10)


@given(configs(), st.integers(1, 5))
def test_a_shorter_stream_is_the_head_of_a_longer_one(config, more):
    """Calls that both have are equal, but for the emissions that the shorter one does not want."""
    longer = replacement_steps(replace(config, chunks=config.chunks + more))
    endless = replacement_steps(replace(config, chunks=None))
    last = config.given_chunks + config.chunks
    for short, long, unending in zip(replacement_steps(config), longer, endless, strict=False):
        assert replace(short, emit=()) == replace(long, emit=()) == replace(unending, emit=())
        assert short.emit == tuple(chunk for chunk in long.emit if chunk < last)


def test_resumes_at_any_call_with_an_empty_ring():
    config = replace(RN_O, ring_frames=8)
    every = list(islice(replacement_steps(config), 70))
    assert list(islice(replacement_steps(config, start=45), 25)) == every[45:]
    assert {step.ring_index for step in every} == {(-1,) * 8}
    assert {slot for step in every for slot in step.append_slot} == {-1}
    assert config.shapes == (15,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be at least 1 but is 0"),
        ({"clip_frames": 14}, "clip_frames must be a multiple of chunk_frames 5 but is 14"),
        ({"overlap_frames": 0}, "overlap_frames must be a multiple"),
        ({"overlap_frames": 15}, "overlap_frames must be below clip_frames 15 but is 15"),
        ({"overlap_frames": 10}, "given_chunks must fill the overlap of 10 frames or be 0 but is 1"),
        ({"chunks": 0}, "chunks must be at least 1"),
        ({"warp": -1}, "warp must be a positive number"),
    ],
)
def test_nonsense_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        replace(RN_O, **changes)
    with pytest.raises(ConfigError, match="call must be from 0 to below 1260 but is 1260"):
        replacement_step_at(RN_O, 1260)
