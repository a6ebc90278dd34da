"""Checks of what a caller passes: whole numbers, finite numbers and lengths, each refused by a sentence that names the argument."""

from __future__ import annotations

import math
from typing import Annotated, Any

import numpy as np

from pyengine.errors import ConfigError, ShapeError
from pyengine.settings import Range, read_value, shown

__all__ = ["as_array", "check_guidance", "check_length", "check_seed", "finite", "printable", "whole"]

MOST_FRAMES = 2**53  # above it a float no longer tells two frames apart: 12 million years at 24 frames/s
MOST_SECONDS = 10**12
SEEDS = (-(2**63), 2**64 - 1)  # what fits the generator's key


def whole(name: str, value: Any, least: float = -math.inf, most: float = math.inf) -> int:
    """`value` as a Python int from `least` to `most`. Raises ConfigError."""
    return int(read_value(Annotated[int, Range(least, most)], value, name))


def finite(name: str, value: Any, least: float = -math.inf, most: float = math.inf) -> float:
    """`value` as a finite Python float from `least` to `most`. Raises ConfigError."""
    return float(read_value(Annotated[float, Range(least, most)], value, name))


def as_array(name: str, value: Any) -> np.ndarray:
    """`value` as an array, of whatever shape and dtype. Raises ShapeError for rows of different lengths."""
    try:
        return np.asarray(value)
    except (TypeError, ValueError) as error:
        raise ShapeError(
            f"[{name}] expected an array but got {shown(value)}, which cannot become one"
        ) from error


def check_length(frames: Any, seconds: Any, fps: float) -> int | None:
    """Frames to make, None = endless. Raises ConfigError for both at once or a length that is not positive."""
    if frames is not None and seconds is not None:
        raise ConfigError(f"expected frames or seconds but got both, {shown(frames)} and {shown(seconds)}")
    if seconds is not None:
        frames = round(finite("seconds", seconds, 0, MOST_SECONDS) * fps)
    if frames is None:
        return None
    count = whole("frames", frames)
    if count < 1:
        raise ConfigError(f"expected a length of at least one frame but got {shown(count)}")
    if count > MOST_FRAMES:
        raise ConfigError(f"expected a length of at most {MOST_FRAMES} frames but got {shown(count)}")
    return count


def check_seed(seed: Any) -> int:
    """A seed as a Python int. Raises ConfigError unless it is a whole number that fits 64 bits."""
    return whole("seed", seed, *SEEDS)


def check_guidance(guidance: Any, branches: int = 2) -> float:
    """A guidance as a Python float. Raises ConfigError unless it is a finite number, and 1 where the model has one branch."""
    # Kernels compute in float32, where more becomes infinite and the video black.
    scale = finite("guidance", guidance, -(10**6), 10**6)
    if branches == 1 and scale != 1:
        raise ConfigError(
            f"[guidance] expected 1, since this model has one branch, with no null text to guide away from, but got {scale:g}"
        )
    return scale


def printable(name: str) -> str:
    """A file's name in one line: as it is, unless it holds line ends or bytes that are no text."""
    return name if name.isprintable() else name.encode("unicode_escape", "surrogatepass").decode()
