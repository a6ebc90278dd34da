"""Rotary positions of the frames of one call, as integers: a pure function of what is visible."""

from collections.abc import Mapping, Sequence
from itertools import chain
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
    # Plain integers: a window and a ring are so few that numpy's overhead would be most of the work, in every call.
    rows, ring = _listed(frame_index), _listed(ring_index)
    seen = [frame for frame in chain(rows, ring) if frame >= 0]
    if policy == "absolute" or not seen:
        return np.array(rows, np.int64), np.array(ring, np.int64)
    if policy == "local":
        oldest = min(seen)
        places = {frame: frame - oldest for frame in seen}
    elif policy == "relocated_sink":
        others = [frame for frame in seen if frame >= sink_frames]
        shift = min(others) - sink_frames if others else 0
        places = {frame: frame + shift if frame < sink_frames else frame for frame in seen}
    else:
        places = {frame: rank for rank, frame in enumerate(sorted(set(seen)))}
    return _placed(rows, places), _placed(ring, places)


def _listed(index: Sequence[int] | np.ndarray) -> list[int]:
    return index.tolist() if isinstance(index, np.ndarray) else list(index)


def _placed(index: Sequence[int], places: Mapping[int, int]) -> np.ndarray:
    return np.array([places.get(frame, -1) for frame in index], np.int64)
