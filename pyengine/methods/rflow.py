"""The ordinary sampler: all frames of a clip share one level and take its S steps together (m = 0)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyengine.errors import ConfigError
from pyengine.methods.progressive import Progressive
from pyengine.schedule.progressive import ScheduleConfig
from pyengine.schedule.warp import resolve_warp

__all__ = ["rflow"]


def rflow(settings: Mapping[str, Any], chunks: int | None, given_chunks: int) -> Progressive:
    """The schedule of one clip: `chunks` chunks, by default as many as `clip_frames` of the settings.

    Given chunks stay in front at level 0 and are never updated (Open-Sora's mask strategy with values 0 and 1).
    """
    size = settings["chunk_frames"]
    count = chunks if chunks is not None else settings["clip_frames"] // size - given_chunks
    frames = round((count + given_chunks) * size * settings["frames_per_latent"])
    context = settings.get("context", {})
    slots = context.get("recent_frames", 0) if context.get("kind", "ring") == "ring" else 0
    if given_chunks and slots:
        raise ConfigError(
            "a clip that starts from given frames needs a bundle of context 'recompute'; export one"
        )
    config = ScheduleConfig(
        steps=settings["steps"],
        chunk_frames=size,
        cadence=0,
        chunks=count,
        warp=resolve_warp(settings["warp"], frames),
        context="recompute" if given_chunks else "none",
        recent_frames=given_chunks * size or slots,
        given_chunks=given_chunks,
    )
    return Progressive(config)
