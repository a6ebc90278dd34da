"""Replacement sampling, the baselines of PA-VDM's table 1: clip after clip, the head of each is the tail of the one before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pyengine.methods.windowed import Windowed
from pyengine.schedule.replacement import ReplacementConfig, replacement_step_at
from pyengine.schedule.step import Step
from pyengine.schedule.warp import resolve_warp

__all__ = ["Replacement"]


@dataclass(frozen=True)
class Replacement(Windowed):
    """The schedule of one stream; the ring stays empty."""

    config: ReplacementConfig

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any], chunks: int | None, given_chunks: int) -> Replacement:
        return cls(
            ReplacementConfig(
                steps=settings["steps"],
                chunk_frames=settings["chunk_frames"],
                clip_frames=settings["clip_frames"],
                overlap_frames=settings["overlap_frames"],
                renoised=settings["renoised"],
                chunks=chunks,
                warp=resolve_warp(settings["warp"], 0),
                given_chunks=given_chunks,
                ring_frames=settings["ring_frames"],
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
