"""Slot arithmetic of the ring of clean frames: [sink_frames pinned | recent_frames modulo]. Integers only.

A frame is known by its absolute index 0, 1, 2, ... and keeps its slot as long as it is visible, so keys and
values never move in memory: appending is an indexed write over the oldest recent frame.
"""

from collections.abc import Mapping

import numpy as np

from pyengine.errors import ConfigError

__all__ = ["EMPTY", "Ring", "frames_after", "slot_of"]

EMPTY = -1  # the index of a slot that holds no frame


def slot_of(frame: int, sink_frames: int, recent_frames: int) -> int:
    """Slot of an absolute frame: the first `sink_frames` are pinned, the others go round."""
    return frame if frame < sink_frames else sink_frames + (frame - sink_frames) % recent_frames


def frames_after(count: int, sink_frames: int, recent_frames: int) -> tuple[int, ...]:
    """Absolute frame in each slot once frames 0..count-1 were appended; EMPTY where there is none. [R]"""
    frames = [EMPTY] * (sink_frames + recent_frames)
    for frame in range(min(count, sink_frames)):
        frames[frame] = frame
    for frame in range(max(sink_frames, count - recent_frames), count):
        frames[slot_of(frame, sink_frames, recent_frames)] = frame
    return tuple(frames)


class Ring:
    """Which absolute frame each of `capacity` slots holds.

    capacity     slots in all = sink_frames + recent frames
    sink_frames  the first frames of the stream, never overwritten
    chunk        frames appended together; both parts must be multiples, so no chunk is ever half overwritten
    """

    def __init__(self, capacity: int, sink_frames: int = 0, chunk: int = 1) -> None:
        if chunk < 1:
            raise ConfigError(f"[ring] chunk must be at least 1 frame but is {chunk}")
        if sink_frames < 0 or sink_frames % chunk:
            raise ConfigError(f"[ring] sink_frames must be a multiple of chunk {chunk} but is {sink_frames}")
        if capacity - sink_frames < chunk or capacity % chunk:
            raise ConfigError(
                f"[ring] capacity must be a multiple of chunk {chunk} and hold at least one chunk"
                f" beside the {sink_frames} sink frames but is {capacity}"
            )
        self.capacity = capacity
        self.sink_frames = sink_frames
        self.recent_frames = capacity - sink_frames
        self.chunk = chunk
        self.next_frame = 0
        self._index = np.full(capacity, EMPTY, np.int64)

    @property
    def index(self) -> np.ndarray:
        """Absolute frame in each slot, EMPTY where there is none. [R] int64, a read-only live view."""
        view = self._index.view()
        view.flags.writeable = False
        return view

    def __len__(self) -> int:
        """Number of frames held."""
        return min(self.next_frame, self.capacity)

    def __contains__(self, frame: int) -> bool:
        return 0 <= frame < self.next_frame and int(self._index[self.slot(frame)]) == frame

    def slot(self, frame: int) -> int:
        """Slot that `frame` has, had or will have."""
        return slot_of(frame, self.sink_frames, self.recent_frames)

    def can_append(self, frame: int) -> bool:
        """True if `frame` is the next one: frames enter in order and none is left out."""
        return frame == self.next_frame

    def append(self, frame: int) -> int:
        """Note that `frame` is now held and return its slot, whose former frame is gone."""
        if not self.can_append(frame):
            raise ConfigError(f"[ring] expected frame {self.next_frame} next but got {frame}")
        slot = self.slot(frame)
        self._index[slot] = frame
        self.next_frame += 1
        return slot

    def clear(self) -> None:
        """Forget every frame."""
        self._index.fill(EMPTY)
        self.next_frame = 0

    def export_state(self) -> dict[str, int]:
        """All there is to know, as four integers."""
        return {
            "capacity": self.capacity,
            "sink_frames": self.sink_frames,
            "chunk": self.chunk,
            "next_frame": self.next_frame,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, int]) -> "Ring":
        """The ring that `export_state` described."""
        missing = {"capacity", "sink_frames", "chunk", "next_frame"} - state.keys()
        if missing:
            raise ConfigError(f"[ring] the state lacks {', '.join(sorted(missing))}")
        ring = cls(state["capacity"], state["sink_frames"], state["chunk"])
        if state["next_frame"] < 0:
            raise ConfigError(f"[ring] next_frame must not be negative but is {state['next_frame']}")
        ring.next_frame = state["next_frame"]
        ring._index[:] = frames_after(ring.next_frame, ring.sink_frames, ring.recent_frames)
        return ring
