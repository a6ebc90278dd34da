"""Replacement sampling, the baselines of PA-VDM's table 1: clip after clip, the head of each is the tail of the one before."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pyengine.methods.shared import Count, Frames, WindowSettings
from pyengine.methods.windowed import Windowed
from pyengine.schedule.replacement import ReplacementConfig, replacement_step_at
from pyengine.schedule.step import Step
from pyengine.schedule.warp import resolve_warp

__all__ = ["Replacement", "ReplacementSettings"]


@dataclass(frozen=True, kw_only=True)
class ReplacementSettings(WindowSettings):
    """The settings of the method, from a manifest or a caller. `context` says how many given frames a stream takes.
    Lengths are in latent frames.

    clip_frames     rows of every call
    overlap_frames  rows taken from the clip before
    renoised        True: with noise (RW); False: without (RN)
    ring_frames     slots of the ring that the plan has and that stays empty
    """

    name: Literal["replacement"]
    clip_frames: Count
    overlap_frames: Count
    renoised: bool
    ring_frames: Frames

    def schedule(self, chunks: int | None, given_chunks: int) -> Replacement:
        return Replacement.from_settings(self, chunks, given_chunks)


@dataclass(frozen=True)
class Replacement(Windowed):
    """The schedule of one stream; the ring stays empty."""

    config: ReplacementConfig

    @classmethod
    def from_settings(
        cls, settings: ReplacementSettings, chunks: int | None, given_chunks: int
    ) -> Replacement:
        return cls(
            ReplacementConfig(
                steps=settings.steps,
                chunk_frames=settings.chunk_frames,
                clip_frames=settings.clip_frames,
                overlap_frames=settings.overlap_frames,
                renoised=settings.renoised,
                chunks=chunks,
                warp=resolve_warp(settings.warp, 0),
                ladder=settings.ladder,
                given_chunks=given_chunks,
                ring_frames=settings.ring_frames,
            )
        )

    @property
    def chunk_frames(self) -> int:
        return self.config.chunk_frames

    @property
    def row_counts(self) -> tuple[int, ...]:
        return self.config.shapes

    @property
    def ring_frames(self) -> int:
        return self.config.ring_frames

    @property
    def given_frames(self) -> int:
        return self.config.given_chunks * self.config.chunk_frames

    @property
    def first_call(self) -> int:
        return 0

    @property
    def calls(self) -> int | None:
        return self.config.calls

    def step_at(self, call: int) -> Step:
        return replacement_step_at(self.config, call)

    def recache_steps(self, call: int) -> Iterator[Step]:
        """None: there is no ring, and a new prompt shows at once."""
        return iter(())
