"""Rotary positions under the four policies."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyengine.errors import ConfigError
from pyengine.schedule.positions import positions
from pyengine.schedule.progressive import ScheduleConfig, step_at

ROWS, RING = (-1, -1, 20, 21, 22, 23), (0, 1, 18, 19, 16, -1)  # sink 0 and 1


@pytest.mark.parametrize(
    ("policy", "rows", "ring"),
    [
        ("absolute", [-1, -1, 20, 21, 22, 23], [0, 1, 18, 19, 16, -1]),
        ("local", [-1, -1, 20, 21, 22, 23], [0, 1, 18, 19, 16, -1]),
        ("relocated_sink", [-1, -1, 20, 21, 22, 23], [14, 15, 18, 19, 16, -1]),
        ("slot", [-1, -1, 5, 6, 7, 8], [0, 1, 3, 4, 2, -1]),
    ],
)
def test_by_hand(policy, rows, ring):
    got = positions(policy, ROWS, RING, sink_frames=2)
    assert [array.tolist() for array in got] == [rows, ring]
    assert all(array.dtype == np.int64 for array in got)


def test_local_starts_at_the_oldest_visible_frame():
    rows, ring = positions("local", ROWS, (-1, -1, 18, 19, 16, -1))
    assert (rows.tolist(), ring.tolist()) == ([-1, -1, 4, 5, 6, 7], [-1, -1, 2, 3, 0, -1])


@pytest.mark.parametrize("policy", ["absolute", "local", "relocated_sink", "slot"])
def test_nothing_visible_and_only_sink_visible(policy):
    rows, ring = positions(policy, (-1,), (-1, -1), sink_frames=2)
    assert (rows.tolist(), ring.tolist()) == ([-1], [-1, -1])
    rows, ring = positions(policy, (1,), (0, -1), sink_frames=2)
    assert (rows.tolist(), ring.tolist()) == ([1], [0, -1])


@given(st.integers(0, 10**9), st.sampled_from(["local", "relocated_sink", "slot"]))
def test_distances_stay_bounded_for_ever(call, policy):
    config = ScheduleConfig(6, 2, 2, sink_frames=2, recent_frames=4)
    step = step_at(config, call)
    rows, ring = positions(policy, step.frame_index, step.ring_index, sink_frames=2)
    both = np.concatenate([rows, ring])
    seen = np.concatenate([step.frame_index, step.ring_index]) >= 0
    assert np.array_equal(both >= 0, seen)
    assert len(set(both[seen])) == seen.sum()  # no two frames share a position
    if policy != "local":
        assert np.ptp(both[seen]) < len(both)
    if policy == "slot":
        assert both.max() < len(both)


def test_inputs_are_not_changed():
    rows = np.array(ROWS)
    positions("slot", rows, np.array(RING), 2)
    assert rows.tolist() == list(ROWS)


def test_unknown_policy_is_refused():
    with pytest.raises(ConfigError, match=r"policy must be one of absolute, .* but is 'polar'"):
        positions("polar", ROWS, RING)
