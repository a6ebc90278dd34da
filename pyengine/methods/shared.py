"""Settings that several methods have."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np

from pyengine.schedule.call import Schedule
from pyengine.schedule.positions import PositionPolicy
from pyengine.schedule.progressive import Context
from pyengine.schedule.samplers import Sampler, make_sampler
from pyengine.schedule.warp import WarpRule
from pyengine.settings import Range

__all__ = [
    "Beta",
    "ContextSettings",
    "Count",
    "Frames",
    "MethodSettings",
    "Positive",
    "Steps",
    "WindowSettings",
]

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
class MethodSettings(ABC):
    """What the settings of every method say, beside their fields. A method is a frozen dataclass of this kind and the schedule that it
    makes.
    """

    if TYPE_CHECKING:  # fields of every method, or properties
        __dataclass_fields__: ClassVar[dict[str, Any]]

        @property
        def steps(self) -> int: ...

        @property
        def chunk_frames(self) -> int: ...

        @property
        def guidance(self) -> float: ...

    @abstractmethod
    def schedule(self, chunks: int | None, given_chunks: int) -> Schedule:
        """The schedule of one stream. `chunks` to generate, None = endless. Raises ConfigError."""

    @abstractmethod
    def make_sampler(self) -> Sampler:
        """How latents go from level to level."""

    @property
    def first_chunk_frames(self) -> int:
        """Latent frames of the first chunk of a video."""
        return self.chunk_frames

    @property
    def start_chunks(self) -> int:
        """Most given chunks that a stream can begin with; 0 = it makes videos from noise alone."""
        return 0

    @property
    def needs_start(self) -> bool:
        """Whether a stream cannot begin with a text alone."""
        return False

    @property
    def clip_latents(self) -> int | None:
        """Latent frames, given ones among them, of a stream without a length; None = it is endless."""
        return None

    @property
    def numbering(self) -> tuple[PositionPolicy, int]:
        """How frames are numbered for the rotary embedding, and how many of them are pinned at the start of the stream."""
        return "local", 0

    @property
    def reads_pixels(self) -> bool:
        """Whether calls read the pixels of given frames; else the encoder makes latents of them."""
        return False

    def pixels_of(self, start: np.ndarray) -> dict[str, np.ndarray]:
        """What calls read of given frames, uint8 [frames, h, w, 3], under the names that they read. Where `reads_pixels`."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class WindowSettings(MethodSettings):
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
        if self.context is None:
            return 0
        return max(1, (self.context.sink_frames + self.context.recent_frames) // self.chunk_frames)

    @property
    def numbering(self) -> tuple[PositionPolicy, int]:
        return self.positions, self.context.sink_frames if self.context else 0

    def make_sampler(self) -> Sampler:
        return make_sampler(self.sampler)
