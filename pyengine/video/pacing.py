"""Frames by time: what a video shows at a steady rate, whatever rate and pauses it has itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from pyengine.errors import InputError

__all__ = ["LONGEST", "Shown", "at_rate", "every"]

LONGEST = 24 * 3600.0  # seconds


class Shown(NamedTuple):
    """A frame and when it is on the screen, in seconds."""

    start: float
    duration: float
    picture: Callable[[], np.ndarray]  # uint8 [height, width, 3]


def every(frames: Iterable[Shown]) -> Iterator[np.ndarray]:
    """Each frame once, whatever its time. uint8 [height, width, 3]"""
    for shown in frames:
        yield shown.picture()


def at_rate(frames: Iterable[Shown], fps: float) -> Iterator[np.ndarray]:
    """What is on the screen at (0.5, 1.5, ...) / fps seconds after the first frame appears. uint8 [height, width, 3]

    In the middle of each interval, so that the rounded times of a container neither drop nor double a frame at equal rates.
    Raises InputError for a video that lasts longer than a day.
    """
    given, origin, end = 0, None, 0.0
    current: Shown | None = None
    picture: np.ndarray | None = None
    for shown in frames:
        origin = shown.start if origin is None else origin
        start = shown.start - origin
        if start + shown.duration > LONGEST:
            raise InputError("it must last at most a day but its times go further; cut it first")
        while current is not None and (given + 0.5) / fps < start:
            picture = current.picture() if picture is None else picture
            yield picture
            given += 1
        current, picture, end = shown, None, start + shown.duration
    while current is not None and ((given + 0.5) / fps < end or not given):
        picture = current.picture() if picture is None else picture
        yield picture
        given += 1
