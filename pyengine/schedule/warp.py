"""The timestep warp of Open-Sora v1.2: more steps at high noise for larger and longer clips.

    t' = r t / (1 + (r - 1) t),   r = sqrt(height * width / 512^2) * sqrt(latent frames)

A method's setting `warp` is r itself, or {"rule": "rflow", "height": 240, "width": 426, "arithmetic": "exact", "frames": 119}.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt
from typing import Annotated, Literal, get_args

import numpy as np

from pyengine.errors import ConfigError
from pyengine.settings import Range

__all__ = ["Arithmetic", "WarpRule", "resolve_warp", "rflow_warp"]

Arithmetic = Literal["exact", "released"]
BASE_AREA = 512 * 512
CHUNK_FRAMES, CHUNK_LATENTS = 17, 5


@dataclass(frozen=True, kw_only=True)
class WarpRule:
    """The warp as a rule. `height` and `width` in pixels; `frames` of video, None = as many as the clip has."""

    rule: Literal["rflow"]
    height: Annotated[float, Range(0, 65536, above=True)]
    width: Annotated[float, Range(0, 65536, above=True)]
    arithmetic: Arithmetic = "exact"
    frames: Annotated[int, Range(0, 2**31)] | None = None


def rflow_warp(height: float, width: float, frames: int, arithmetic: Arithmetic = "exact") -> float:
    """r for a clip of that conditioning size and number of video frames; one frame is an image.

    arithmetic  "exact", or "released": every intermediate result rounded to bf16, as the released sampler computes it when the
                model runs in bf16 (240 x 426 x 119: 3.6875 instead of 3.69466)
    """
    if arithmetic not in get_args(Arithmetic):
        raise ConfigError(f"arithmetic must be {' or '.join(get_args(Arithmetic))} but is {arithmetic!r}")
    if min(height, width, frames) <= 0:
        raise ConfigError(f"warp needs a positive size but got {height} x {width} x {frames} frames")
    rounded: Callable[[float], float] = _bfloat16 if arithmetic == "released" else float
    area = rounded(rounded(height) * rounded(width))
    space = rounded(sqrt(rounded(area / BASE_AREA)))
    latents = 1 if frames == 1 else rounded(rounded(frames) // CHUNK_FRAMES) * CHUNK_LATENTS
    if latents < 1:
        raise ConfigError(f"warp needs 1 frame or at least {CHUNK_FRAMES} but got {frames}")
    return rounded(space * rounded(sqrt(rounded(latents))))


def resolve_warp(setting: float | WarpRule, frames: int) -> float:
    """r of a method's setting; `frames` of video are what the clip has where the setting does not fix them."""
    if not isinstance(setting, WarpRule):
        return float(setting)
    return rflow_warp(setting.height, setting.width, setting.frames or frames, setting.arithmetic)


def _bfloat16(value: float) -> float:
    """The nearest bf16, ties to even."""
    bits = int(np.float32(value).view(np.uint32))
    bits += 0x7FFF + (bits >> 16 & 1)
    return float(np.uint32(bits & 0xFFFF0000).view(np.float32))
