"""Progressive noise levels (PA-VDM, arXiv:2410.08151): every chunk of the window one step of the ladder cleaner than the next.

The clean frames behind the window live in the ring. A chunk that became clean rides along once at level 0, which writes its keys
and values; with the noise-causal mask that is exact, because nothing clean ever looked at noise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pyengine.schedule import ScheduleConfig, Step, recache_steps, step_at

__all__ = ["Progressive"]


@dataclass(frozen=True)
class Progressive:
    """The schedule of one stream. `row_counts` are the prepared window sizes."""

    config: ScheduleConfig

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any], chunks: int | None, given_chunks: int) -> Progressive:
        context = settings["context"]
        return cls(
            ScheduleConfig(
                steps=settings["steps"],
                chunk_frames=settings["chunk_frames"],
                cadence=settings["cadence"],
                chunks=chunks,
                warp=settings["warp"],
                context=context.get("kind", "ring"),
                sink_frames=context["sink_frames"],
                recent_frames=context["recent_frames"],
                given_chunks=given_chunks,
                row_counts=tuple(settings["row_counts"]) if settings.get("row_counts") else None,
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
        return self.config.first_call

    @property
    def calls(self) -> int | None:
        return self.config.calls

    def step_at(self, call: int) -> Step:
        return step_at(self.config, call)

    def recache_steps(self, call: int) -> Iterator[Step]:
        """Calls that rewrite the ring before `call`, after the prompt has changed (LongLive's KV-recache)."""
        return recache_steps(self.config, call)
