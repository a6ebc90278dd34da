"""What lies ahead of a stream, read off its schedule: nothing is computed and nothing changes."""

from __future__ import annotations

from pyengine.bundle.bundle import Video
from pyengine.streaming.state import StreamState

__all__ = ["calls_to_full", "first_unbegun"]

MOST_CALLS = 4096  # that are looked at


def first_unbegun(state: StreamState, video: Video) -> int | None:
    """The first frame whose denoising has not begun, as `Stream.first_unbegun` gives it."""
    schedule, number = state.schedule, state.call
    while (schedule.calls is None or number < schedule.calls) and number < state.call + MOST_CALLS:
        lanes = schedule.call(number).lanes
        if len(lanes) > 1:
            return None
        born = [row.frame for lane in lanes for row in lane.rows if row.origin == "noise"]
        if born:
            given = schedule.given_frames
            return video.frames(min(born)) - (video.frames(given) if given else 0)
        number += 1
    return None


def calls_to_full(state: StreamState) -> int:
    """How many calls there are until the context is as full as it gets."""
    schedule = state.schedule

    def empty(number: int) -> int:
        call = schedule.call(number if schedule.calls is None else min(number, schedule.calls - 1))
        return sum(lane.ring.count(-1) for lane in call.lanes)

    number, period = state.call, schedule.period
    steady = [empty(number + MOST_CALLS * period + phase) for phase in range(period)]
    while [empty(number + phase) for phase in range(period)] != steady and number < state.call + MOST_CALLS:
        number += period
    return number + period - state.call
