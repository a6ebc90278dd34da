"""Progressive noise levels (PA-VDM, arXiv:2410.08151): every chunk of the window one step of the ladder cleaner than the next.

Clean frames behind the window live in the ring, which is exact for models that were trained noise-causally; or they re-enter every call
as rows at level 0 (`context` "recompute"), as PA-VDM runs a bidirectional model. `opening` "rflow" makes the first chunk with the ordinary
sampler when none is given, for models that need a clean chunk in front (Open-Sora).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from pyengine.errors import ConfigError
from pyengine.methods.shared import ContextSettings, Count, Frames, Positive, WindowSettings
from pyengine.methods.windowed import Windowed
from pyengine.schedule.progressive import ScheduleConfig, Step, recache_steps, step_at
from pyengine.schedule.warp import WarpRule, resolve_warp

__all__ = ["Progressive", "ProgressiveSettings"]


@dataclass(frozen=True, kw_only=True)
class ProgressiveSettings(WindowSettings):
    """The settings of the method, from a manifest or a caller.

    cadence       m, calls from one chunk's birth to the next's
    opening       "rflow": the first chunk is made by the ordinary sampler when none is given; "warm": a stream that is given
                  chunks begins with a full window, whose chunks are the last given ones noised to their levels and made again
    opening_warp  warp of the opening; None = `warp`
    row_counts    prepared numbers of window rows, to share another schedule's plan; None = what is needed
    """

    name: Literal["progressive"]
    cadence: Frames
    context: ContextSettings
    opening: Literal["rflow", "warm"] | None = None
    opening_warp: Positive | WarpRule | None = None
    row_counts: tuple[Count, ...] | None = None

    def schedule(self, chunks: int | None, given_chunks: int) -> Progressive:
        return Progressive.from_settings(self, chunks, given_chunks)

    @property
    def start_chunks(self) -> int:
        return super().start_chunks + self.remade_chunks

    @property
    def remade_chunks(self) -> int:
        """The last given chunks, those that a "warm" opening noises and makes again: all of a full window but the newest."""
        if self.opening != "warm" or not self.cadence:
            return 0
        return -(-self.steps // self.cadence) - 1


@dataclass(frozen=True)
class Progressive(Windowed):
    """The schedule of one stream. `row_counts` are the prepared window sizes.

    opening  schedule of chunk 0 alone, in calls -S..-1 before those of `config`, which then takes it as given; None = no such calls
    only     True: `opening` is the whole stream
    warm     True: the stream begins with a full window. The chunks behind `config.given_chunks` that it has by then are given too,
             noised to their levels and denoised again (PA-VDM's algorithm 1 with a fixed window; FIFO-Diffusion)
    """

    config: ScheduleConfig
    opening: ScheduleConfig | None = None
    only: bool = False
    warm: bool = False

    @classmethod
    def from_settings(
        cls, settings: ProgressiveSettings, chunks: int | None, given_chunks: int
    ) -> Progressive:
        context, size, row_counts = settings.context, settings.chunk_frames, settings.row_counts or None
        opens = settings.opening == "rflow" and not given_chunks
        warm = settings.opening == "warm" and given_chunks > 0
        if warm:
            given_chunks -= settings.remade_chunks
            if given_chunks < 1:
                raise ConfigError(
                    f"expected a start of {settings.remade_chunks + 1} chunks or more, which fill the window of opening 'warm', "
                    f"but got {given_chunks + settings.remade_chunks}; give a longer start"
                )
        config = ScheduleConfig(
            steps=settings.steps,
            chunk_frames=size,
            cadence=settings.cadence,
            chunks=max(1, chunks - 1) if opens and chunks is not None else chunks,
            warp=resolve_warp(settings.warp, 0),
            ladder=settings.ladder,
            context=context.kind,
            sink_frames=context.sink_frames,
            recent_frames=context.recent_frames,
            given_chunks=1 if opens else given_chunks,
            row_counts=row_counts,
        )
        if settings.opening != "rflow":
            return cls(config, warm=warm)
        # One set of prepared sizes whether or not a chunk is given, so that both kinds of stream share their plans.
        config = replace(
            config,
            row_counts=row_counts or tuple(sorted({size, *config.shapes})),
        )
        first = replace(
            config,
            cadence=0,
            chunks=1,
            context="none",
            given_chunks=0,
            sink_frames=0,
            recent_frames=config.ring_frames,
            warp=resolve_warp(settings.warp if settings.opening_warp is None else settings.opening_warp, 0),
        )
        return cls(config, first if opens else None, only=chunks == 1)

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
    def sink_frames(self) -> int:
        return self.config.sink_frames

    @property
    def sink_rows(self) -> int:
        return self.config.sink_frames if self.config.context == "recompute" else 0

    @property
    def given_frames(self) -> int:
        return self.config.given_chunks * self.chunk_frames

    @property
    def period(self) -> int:
        return self.config.cadence or 1

    @property
    def first_call(self) -> int:
        if self.opening is not None:
            return -self.opening.steps
        if self.warm:
            return self.config.cadence * (self.config.active_chunks - 1)
        return self.config.first_call

    @property
    def calls(self) -> int | None:
        return 0 if self.opening is not None and self.only else self.config.calls

    def step_at(self, call: int) -> Step:
        if self.opening is not None and call < 0:
            return replace(step_at(self.opening, call + self.opening.steps), call=call)
        step = step_at(self.config, call)
        if self.warm and call == self.first_call:
            return _warmed(step, self.config)
        return step

    def recache_steps(self, call: int) -> Iterator[Step]:
        """Calls that rewrite the ring before `call`, after the prompt has changed (LongLive's KV-recache)."""
        if self.opening is not None and call < 0:
            return iter(())
        return recache_steps(self.config, call)


def _warmed(step: Step, config: ScheduleConfig) -> Step:
    """The first call of a stream that begins with a full window: what it would have moved up it noises instead."""
    carried = [row for row, source in enumerate(step.source) if source >= 0]
    clean = tuple(row for row in carried if step.chunk[row] < config.given_chunks)
    return replace(
        step,
        source=(-1,) * step.frames,
        given=tuple(sorted((*step.given, *clean))),
        warmed=tuple(row for row in carried if row not in clean),
    )
