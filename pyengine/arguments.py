"""Checks of what a caller passes: whole numbers, finite numbers and lengths, each refused by a sentence that names the argument."""

from __future__ import annotations

import math
import operator
from typing import Any

from pyengine.errors import ConfigError

__all__ = ["check_guidance", "check_length", "check_seed", "finite", "printable", "whole"]

MOST_FRAMES = 2**53  # above it a float no longer tells two frames apart: 12 million years at 24 frames/s
SEEDS = (-(2**63), 2**64 - 1)  # what fits the generator's key


def whole(name: str, value: Any, least: int | None = None, most: int | None = None) -> int:
    """`value` as a Python int; integers of numpy and of other libraries are taken, floats and bools are not.

    Raises ConfigError for anything else, and outside `least` to `most` (both included).
    """
    try:
        # True is an int in Python, but `frames=True` is a mistake.
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise ConfigError(f"{name} must be a whole number but is {_shown(value)}")
    _check_range(name, number, least, most)
    return number


def finite(name: str, value: Any, least: float | None = None, most: float | None = None) -> float:
    """`value` as a Python float. Raises ConfigError for NaN, infinities, text and whatever is no real number."""
    try:
        if isinstance(value, str | bytes | bool):  # float("1") works, but `seconds="1"` is a mistake
            raise TypeError
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(f"{name} must be a finite number but is {_shown(value)}")
    _check_range(name, number, least, most)
    return number


def check_length(frames: Any, seconds: Any, fps: float) -> int | None:
    """Frames to make, None = endless. Raises ConfigError for both at once or a length that is not positive."""
    if frames is not None and seconds is not None:
        raise ConfigError(f"expected frames or seconds but got both, {_shown(frames)} and {_shown(seconds)}")
    if seconds is not None:
        frames = round(finite("seconds", seconds, most=MOST_FRAMES) * fps)
    if frames is None:
        return None
    count = whole("frames", frames)
    if count < 1:
        raise ConfigError(f"expected a length of at least one frame but got {count}")
    if count > MOST_FRAMES:
        raise ConfigError(f"expected a length of at most {MOST_FRAMES} frames but got {_shown(count)}")
    return count


def check_seed(seed: Any) -> int:
    """A seed as a Python int. Raises ConfigError unless it is a whole number that fits 64 bits."""
    return whole("seed", seed, *SEEDS)


def check_guidance(guidance: Any) -> float:
    """A guidance as a Python float. Raises ConfigError unless it is a finite number."""
    # Kernels compute in float32, where more becomes infinite and the video black.
    return finite("guidance", guidance, -1e6, 1e6)


def printable(name: str) -> str:
    """A file's name in one line: as it is, unless it holds line ends or bytes that are no text."""
    return name if name.isprintable() else name.encode("unicode_escape", "surrogatepass").decode()


def _check_range(name: str, number: float, least: float | None, most: float | None) -> None:
    if least is not None and number < least:
        raise ConfigError(f"{name} must be at least {least} but is {_shown(number)}")
    if most is not None and number > most:
        raise ConfigError(f"{name} must be at most {most} but is {_shown(number)}")


def _shown(value: Any) -> str:
    """What came, short enough for a sentence: a value of its type, or the type alone."""
    try:
        text = repr(value)
    except Exception:  # an object whose repr fails, or an int of more digits than Python prints
        return f"a value of type {type(value).__name__}"
    return text if len(text) <= 60 and "\n" not in text else f"a value of type {type(value).__name__}"
