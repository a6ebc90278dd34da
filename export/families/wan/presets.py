"""How each released system is sampled: steps, levels and what is visible, as data of a manifest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from pyengine.bundle.bundle import Cleaning
from pyengine.errors import ConfigError
from pyengine.schedule.progressive import noise_levels

from .causal_wan import TIMESTEPS

FPS, FRAMES_PER_LATENT, FIRST_FRAMES = 16.0, 4, 1
CLEANING = Cleaning(rules="whitespace")
EXAMPLE = (
    "A red fox trots across a snowy clearing at dawn, its breath visible in the cold air. The camera follows it from the side; pine "
    "trees pass in soft focus, and low sun throws long blue shadows over the snow."
)
TABLE = 1000  # entries of the original's table of noise levels


@dataclass(frozen=True)
class System:
    """What a checkpoint was trained for. Frames are latent frames.

    ladder    un-warped levels from 0 up; `warp` is the original's timestep shift
    timesteps  what the network is shown at those levels, lowest first; None = 1000 times the warped level
    visible   frames that a call sees, its own included
    clean_view, recache, positions, mask: see pyengine.methods.causal, schedule.positions and our op
    """

    ladder: tuple[float, ...]
    warp: float
    visible: int
    sink: int = 0
    chunk: int = 3
    cadence: int | None = None
    timesteps: tuple[float, ...] | None = None
    positions: Literal["absolute", "relocated_sink", "slot"] = "absolute"
    clean_view: Literal["window", "recent"] = "window"
    recache: Literal["none", "chunks", "kept", "rewritten", "replaced"] = "chunks"
    mask: Literal["noise_causal", "bidirectional"] = "noise_causal"

    @property
    def steps(self) -> int:
        return len(self.ladder) - 1

    @property
    def levels(self) -> tuple[float, ...]:
        """Warped, lowest first."""
        return noise_levels(self.steps, self.warp, self.ladder)

    @property
    def shown(self) -> tuple[float, ...]:
        """The timestep of each level."""
        return self.timesteps or tuple(TIMESTEPS * level for level in self.levels)

    def method(self) -> dict[str, Any]:
        """The manifest's `method`."""
        return {
            "name": "causal",
            "steps": self.steps,
            "chunk_frames": self.chunk,
            "cadence": self.cadence or self.steps,
            "warp": self.warp,
            "ladder": list(self.ladder),
            "known_levels": list(self.levels),
            "guidance": 1.0,
            "sampler": "renoise",
            "positions": self.positions,
            "visible_frames": self.visible,
            "sink_frames": self.sink,
            "clean_view": self.clean_view,
            "recache": self.recache,
        }


def _nearest(timestep: float, shift: float) -> float:
    """The level of the original's table entry whose timestep is nearest, which it takes for the timestep's own."""
    raw = np.float32(1) - np.arange(TABLE, dtype=np.float32) / np.float32(TABLE)
    levels = np.float32(shift) * raw / (1 + np.float32(shift - 1) * raw)
    return float(levels[np.abs(levels * TABLE - timestep).argmin()])


_QUARTERS = (0.0, 0.25, 0.5, 0.75, 1.0)
_FIFTHS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)

SYSTEMS: dict[str, System] = {
    "self-forcing": System(_QUARTERS, 5.0, visible=21),
    # Timesteps are taken as they are; their levels are the nearest of the table of shift 8.
    "causvid": System(
        (0.0, _nearest(522, 8.0), _nearest(757, 8.0), 1.0),
        1.0,
        visible=21,
        timesteps=(0.0, 522.0, 757.0, 1000.0),
    ),
    "rolling-forcing": System(
        _FIFTHS,
        5.0,
        visible=21,
        sink=3,
        cadence=1,
        positions="relocated_sink",
        clean_view="recent",
        recache="none",
        mask="bidirectional",
    ),
    "longlive": System(_QUARTERS, 5.0, visible=12, sink=3, recache="kept"),
}


def system(name: str) -> System:
    """A system by name. Raises ConfigError."""
    if name not in SYSTEMS:
        raise ConfigError(f"expected a system out of {', '.join(SYSTEMS)} but got {name!r}")
    return SYSTEMS[name]
