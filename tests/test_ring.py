"""The ring: frames never move, the sink and the newest are kept, and four integers are its whole state."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyengine.errors import ConfigError
from pyengine.schedule.ring import EMPTY, Ring, frames_after, slot_of

# Chunk, sink chunks, recent chunks.
sizes = st.tuples(st.integers(1, 4), st.integers(0, 3), st.integers(1, 4))


def make(size):
    chunk, sink, recent = size
    return Ring((sink + recent) * chunk, sink * chunk, chunk)


@given(sizes, st.integers(0, 60))
def test_holds_the_sink_and_the_newest_frames_and_nothing_else(size, count):
    ring = make(size)
    for frame in range(count):
        assert ring.append(frame) == ring.slot(frame)
    kept = {
        frame for frame in range(count) if frame < ring.sink_frames or frame >= count - ring.recent_frames
    }
    assert {int(frame) for frame in ring.index if frame != EMPTY} == kept
    assert len(ring) == len(kept) <= ring.capacity
    assert [frame for frame in range(-2, count + 2) if frame in ring] == sorted(kept)


@given(sizes, st.integers(1, 60))
def test_a_frame_never_moves_while_it_is_held(size, count):
    ring, slots = make(size), {}
    for frame in range(count):
        before = ring.index.copy()
        slot = ring.append(frame)
        slots[frame] = slot
        assert np.flatnonzero(ring.index != before).tolist() == [slot]  # one write and no other
        assert all(ring.index[slots[held]] == held for held in slots if held in ring)


@given(sizes, st.integers(0, 60))
def test_sink_is_never_overwritten_and_the_oldest_recent_frame_is(size, count):
    ring = make(size)
    for frame in range(count):
        evicted = int(ring.index[ring.slot(frame)])
        ring.append(frame)
        if evicted != EMPTY:
            assert evicted == frame - ring.recent_frames
            assert evicted >= ring.sink_frames


@given(sizes, st.integers(1, 20))
def test_frames_of_one_chunk_lie_side_by_side(size, chunks):
    ring = make(size)
    for first in range(0, chunks * ring.chunk, ring.chunk):
        slots = [ring.slot(frame) for frame in range(first, first + ring.chunk)]
        assert slots == list(range(slots[0], slots[0] + ring.chunk))
        assert slots[0] % ring.chunk == 0


@given(sizes, st.integers(0, 60))
def test_closed_form_equals_appending(size, count):
    ring = make(size)
    for frame in range(count):
        ring.append(frame)
    assert frames_after(count, ring.sink_frames, ring.recent_frames) == tuple(ring.index)


@given(sizes, st.integers(0, 60))
def test_state_is_small_integers_and_restores(size, count):
    ring = make(size)
    for frame in range(count):
        ring.append(frame)
    state = ring.export_state()
    assert all(type(value) is int for value in state.values())
    restored = Ring.from_state(state)
    assert restored.index.tolist() == ring.index.tolist()
    assert restored.append(count) == ring.append(count)
    assert restored.export_state() == ring.export_state()


def test_a_refused_append_changes_nothing():
    ring = Ring(4)
    ring.append(0)
    before = ring.index.copy()
    for wrong in (0, 2, -1):
        assert not ring.can_append(wrong)
        with pytest.raises(ConfigError, match=f"expected frame 1 next but got {wrong}"):
            ring.append(wrong)
    assert ring.index.tolist() == before.tolist()
    assert ring.next_frame == 1


def test_index_is_a_live_read_only_view():
    ring = Ring(2)
    view = ring.index
    ring.append(0)
    assert view.tolist() == [0, EMPTY]
    assert view.dtype == np.int64
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 5


def test_clear_empties():
    ring = Ring(2)
    ring.append(0)
    ring.clear()
    assert len(ring) == 0
    assert ring.index.tolist() == [EMPTY, EMPTY]
    assert ring.append(0) == 0


def test_slots_by_hand():
    assert [slot_of(frame, 2, 4) for frame in range(9)] == [0, 1, 2, 3, 4, 5, 2, 3, 4]


@pytest.mark.parametrize("arguments", [(0,), (2, 2), (2, -1), (4, 1, 2), (5, 2, 2), (4, 0, 0), (-2, 0, 1)])
def test_impossible_sizes_are_refused(arguments):
    with pytest.raises(ConfigError, match=r"^\[ring\] .* but is "):
        Ring(*arguments)


def test_a_damaged_state_is_refused():
    state = Ring(4, 2, 2).export_state()
    with pytest.raises(ConfigError, match="lacks next_frame"):
        Ring.from_state({name: value for name, value in state.items() if name != "next_frame"})
    with pytest.raises(ConfigError, match="next_frame must not be negative"):
        Ring.from_state(state | {"next_frame": -1})
