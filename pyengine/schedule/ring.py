"""Slot arithmetic of the ring of clean frames: [sink_frames pinned | recent_frames modulo]. Integers only.

A frame is known by its absolute index 0, 1, 2, ... and keeps its slot as long as it is visible, so keys and
values never move in memory: appending is an indexed write over the oldest recent frame.
"""

__all__ = ["EMPTY", "frames_after", "slot_of"]

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
