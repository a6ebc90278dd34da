"""The ordinary sampler: all frames of a clip share one level and take its S steps together (m = 0)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pyengine.errors import ConfigError
from pyengine.methods.progressive import Progressive
from pyengine.methods.shared import Count, Positive, WindowSettings
from pyengine.schedule.progressive import ScheduleConfig
from pyengine.schedule.warp import resolve_warp

__all__ = ["RflowSettings", "rflow"]


@dataclass(frozen=True, kw_only=True)
class RflowSettings(WindowSettings):
    """The settings of the method, from a manifest or a caller.

    clip_frames        latent frames, given ones among them, of a stream without a length; None = it needs one
    frames_per_latent  frames of video per latent frame, from which a warp by rule is computed
    """

    name: Literal["rflow"]
    clip_frames: Count | None = None
    frames_per_latent: Positive

    def schedule(self, chunks: int | None, given_chunks: int) -> Progressive:
        return rflow(self, chunks, given_chunks)

    @property
    def clip_latents(self) -> int | None:
        return self.clip_frames


def rflow(settings: RflowSettings, chunks: int | None, given_chunks: int) -> Progressive:
    """The schedule of one clip: `chunks` chunks, by default as many as `clip_frames` has room for behind the given ones.

    Given chunks stay in front at level 0 and are never updated (Open-Sora's mask strategy with values 0 and 1).
    """
    size, context = settings.chunk_frames, settings.context
    count = _chunks(settings, given_chunks) if chunks is None else chunks
    slots = context.recent_frames if context is not None and context.kind == "ring" else 0
    if given_chunks and slots:
        raise ConfigError(
            "a clip that starts from given frames needs a bundle of context 'recompute'; export one"
        )
    frames = round(min((count + given_chunks) * size * settings.frames_per_latent, 2**31))
    config = ScheduleConfig(
        steps=settings.steps,
        chunk_frames=size,
        cadence=0,
        chunks=count,
        warp=resolve_warp(settings.warp, frames),
        ladder=settings.ladder,
        context="recompute" if given_chunks else "none",
        recent_frames=given_chunks * size or slots,
        given_chunks=given_chunks,
    )
    return Progressive(config)


def _chunks(settings: RflowSettings, given_chunks: int) -> int:
    """Chunks that a stream without a length makes."""
    if settings.clip_frames is None:
        raise ConfigError(
            "method rflow makes one clip and needs its length: give frames, seconds or method.clip_frames"
        )
    count = settings.clip_frames // settings.chunk_frames - given_chunks
    if count < 1:
        raise ConfigError(
            f"[method.clip_frames] expected room for a chunk of {settings.chunk_frames} latent frames behind"
            f" {given_chunks} given ones but got {settings.clip_frames}"
        )
    return count
