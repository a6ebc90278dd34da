"""Settings that several methods have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pyengine.schedule.positions import PositionPolicy
from pyengine.schedule.progressive import Context
from pyengine.schedule.warp import WarpRule
from pyengine.settings import Range

__all__ = ["Beta", "ContextSettings", "Count", "Frames", "Positive", "Steps", "WindowSettings"]

# Bounds far beyond anything that runs, so that a slip of the keyboard is a sentence and not a full memory.
MOST = 65536
Steps = Annotated[int, Range(1, MOST)]
Count = Annotated[int, Range(1, MOST)]
Frames = Annotated[int, Range(0, MOST)]
Positive = Annotated[float, Range(0, above=True)]
Beta = Annotated[float, Range(0, 0.999, above=True)]  # of the noise that one timestep adds


@dataclass(frozen=True, kw_only=True)
class ContextSettings:
    """How clean latent frames stay visible, as in `schedule.progressive.ScheduleConfig`.

    sink_frames    latent frames from the start of the stream that stay visible for ever
    recent_frames  newest clean latent frames that stay visible
    """

    kind: Context = "ring"
    sink_frames: Frames
    recent_frames: Frames


@dataclass(frozen=True, kw_only=True)
class WindowSettings:
    """Settings of every method of one window of latent frames.

    steps         S, updates that each chunk gets
    chunk_frames  C, latent frames that share a level and are decoded together
    warp          r of the timestep warp, or the rule that gives it; 1 = none
    ladder        un-warped levels from 0 to 1, steps + 1 of them; None = uniform
    guidance      scale of classifier-free guidance where a stream gives none; 1 = no guidance
    positions     policy of rotary positions, as in `schedule.positions`
    context       how clean latent frames stay visible, None = not at all
    """

    steps: Steps
    chunk_frames: Count
    warp: Positive | WarpRule = 1.0
    ladder: tuple[float, ...] | None = None
    guidance: float = 1.0
    sampler: Literal["euler", "renoise"] = "euler"
    positions: PositionPolicy = "local"
    context: ContextSettings | None = None

    @property
    def start_chunks(self) -> int:
        """Most given chunks that a stream can begin with; 0 = it makes videos from noise alone."""
        if self.context is None:
            return 0
        return max(1, (self.context.sink_frames + self.context.recent_frames) // self.chunk_frames)

    @property
    def needs_start(self) -> bool:
        """Whether a stream cannot begin with a text alone."""
        return False

    @property
    def clip_latents(self) -> int | None:
        """Latent frames, given ones among them, of a stream without a length; None = it is endless."""
        return None
