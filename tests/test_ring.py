"""Slots of the ring: frames never move, and the sink and the newest are kept."""

from hypothesis import given
from hypothesis import strategies as st

from pyengine.schedule.ring import EMPTY, frames_after, slot_of

# Chunk, sink frames, recent frames.
sizes = st.tuples(st.integers(1, 4), st.integers(0, 3), st.integers(1, 4)).map(
    lambda size: (size[0], size[0] * size[1], size[0] * size[2])
)


@given(sizes, st.integers(0, 60))
def test_holds_the_sink_and_the_newest_frames_and_nothing_else(size, count):
    _, sink, recent = size
    held = frames_after(count, sink, recent)
    assert len(held) == sink + recent
    kept = [frame for frame in range(count) if frame < sink or frame >= count - recent]
    assert sorted(frame for frame in held if frame != EMPTY) == kept
    assert all(slot_of(frame, sink, recent) == slot for slot, frame in enumerate(held) if frame != EMPTY)


@given(sizes, st.integers(0, 60))
def test_a_frame_is_one_write_over_the_oldest_recent_one(size, count):
    """So no frame moves while it is held, and the sink is never overwritten."""
    _, sink, recent = size
    before, after = frames_after(count, sink, recent), frames_after(count + 1, sink, recent)
    slot = slot_of(count, sink, recent)
    assert [at for at in range(sink + recent) if before[at] != after[at]] == [slot]
    assert after[slot] == count
    if before[slot] != EMPTY:
        assert before[slot] == count - recent >= sink


@given(sizes, st.integers(1, 20))
def test_frames_of_one_chunk_lie_side_by_side(size, chunks):
    chunk, sink, recent = size
    for first in range(0, chunks * chunk, chunk):
        slots = [slot_of(frame, sink, recent) for frame in range(first, first + chunk)]
        assert slots == list(range(slots[0], slots[0] + chunk))
        assert slots[0] % chunk == 0


def test_slots_by_hand():
    assert [slot_of(frame, 2, 4) for frame in range(9)] == [0, 1, 2, 3, 4, 5, 2, 3, 4]
    assert frames_after(0, 2, 4) == (EMPTY,) * 6
    assert frames_after(9, 2, 4) == (0, 1, 6, 7, 8, 5)
