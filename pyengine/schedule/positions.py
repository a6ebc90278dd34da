"""Rotary positions of the frames of one call, as integers: a pure function of what is visible."""

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from pyengine.errors import ConfigError

__all__ = ["PositionPolicy", "positions"]

PositionPolicy = Literal["absolute", "local", "relocated_sink", "slot"]


def positions(
    policy: PositionPolicy,
    frame_index: Sequence[int] | np.ndarray,
    ring_index: Sequence[int] | np.ndarray,
    sink_frames: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Positions of window rows and ring slots under a policy, -1 where there is no frame. ([F], [R]) int64

    absolute        the frame's own index (Self-Forcing, MAGI-1)
    local           relative to the oldest visible frame (PA-VDM, arXiv:2410.08151; SkyReels-V2)
    relocated_sink  absolute, but the first `sink_frames` sit right before the oldest other visible frame, so
                    that no distance outgrows those seen in training (Rolling Forcing)
    slot            rank among the visible frames, sink first (LongLive)

    frame_index [F] and ring_index [R] hold absolute frames, -1 = absent row or empty slot. Angles come from
    integers that the kernel re-bases, never from a float that grows, so a stream can run for ever.
    """
    if policy not in get_args(PositionPolicy):
        raise ConfigError(f"policy must be one of {', '.join(get_args(PositionPolicy))} but is {policy!r}")
    rows = np.array(frame_index, np.int64)  # a copy
    ring = np.array(ring_index, np.int64)
    both = np.concatenate([rows, ring])  # [F + R]
    seen = both >= 0
    if policy == "absolute" or not seen.any():
        return rows, ring
    if policy == "local":
        both[seen] -= both[seen].min()
    elif policy == "relocated_sink":
        sink, others = seen & (both < sink_frames), seen & (both >= sink_frames)
        if others.any():
            both[sink] += both[others].min() - sink_frames
    else:
        both[seen] = np.searchsorted(np.unique(both[seen]), both[seen])
    return both[: len(rows)], both[len(rows) :]
