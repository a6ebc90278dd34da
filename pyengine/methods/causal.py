"""Causal video in chunks (Self-Forcing, CausVid, LongLive; Rolling Forcing with a window of several chunks): `schedule.causal` as calls."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pyengine.bundle.variant import Variant
from pyengine.errors import ConfigError
from pyengine.methods.shared import Count, Frames, WindowSettings
from pyengine.schedule.call import Call, Emit, Lane, Row
from pyengine.schedule.causal import CausalConfig, CleanView, Recache, Writing
from pyengine.schedule.positions import PositionPolicy
from pyengine.schedule.progressive import noise_levels
from pyengine.schedule.ring import EMPTY
from pyengine.schedule.samplers import Sampler, cfg, make_sampler
from pyengine.schedule.unipc import unipc
from pyengine.schedule.warp import resolve_warp

__all__ = ["Causal", "CausalSettings"]


@dataclass(frozen=True, kw_only=True)
class CausalSettings(WindowSettings):
    """The settings of the method, from a manifest or a caller; see `schedule.causal.CausalConfig`.

    ladder        may end below 1, whose latents are pure noise all the same
    sampler       "unipc" needs such a ladder, of 4 steps at most
    known_levels  warped levels that the network knows, where it has tables of them; None = any
    """

    name: Literal["causal"]
    cadence: Count
    visible_frames: Count
    sink_frames: Frames = 0
    clean_view: CleanView = "window"
    first_chunk: Count | None = None
    recache: Recache = "chunks"
    sampler: Literal["euler", "renoise", "unipc"] = "renoise"  # type: ignore[assignment]  # one more than elsewhere
    known_levels: tuple[float, ...] | None = None

    def schedule(self, chunks: int | None, given_chunks: int) -> Causal:
        return Causal.from_settings(self, chunks, given_chunks)

    def make_sampler(self) -> Sampler:
        if self.sampler == "unipc":
            return unipc(noise_levels(self.steps, resolve_warp(self.warp, 0), self.ladder, top=None))
        return make_sampler(self.sampler)

    @property
    def first_chunk_frames(self) -> int:
        return self.chunk_frames if self.first_chunk is None else self.first_chunk

    @property
    def numbering(self) -> tuple[PositionPolicy, int]:
        return self.positions, self.sink_frames

    @property
    def start_chunks(self) -> int:
        return max(1, self.visible_frames // self.chunk_frames)


@dataclass(frozen=True)
class Causal:
    """The schedule of one stream. `remembers`: the sampler keeps something of every latent from one step to the next."""

    config: CausalConfig
    remembers: bool = False

    @classmethod
    def from_settings(cls, settings: CausalSettings, chunks: int | None, given_chunks: int) -> Causal:
        if settings.context is not None:
            raise ConfigError(
                "[method.context] expected none, since method causal says what is visible by visible_frames and sink_frames"
            )
        config = CausalConfig(
            steps=settings.steps,
            chunk_frames=settings.chunk_frames,
            cadence=settings.cadence,
            visible_frames=settings.visible_frames,
            chunks=chunks,
            warp=resolve_warp(settings.warp, 0),
            ladder=settings.ladder,
            sink_frames=settings.sink_frames,
            clean_view=settings.clean_view,
            first_chunk=settings.first_chunk,
            given_chunks=given_chunks,
            recache=settings.recache,
        )
        known = settings.known_levels
        odd = [level for level in config.levels if known is not None and level not in known]
        if odd:
            raise ConfigError(
                "[method.ladder] expected levels that the network has tables for, which are "
                f"{', '.join(f'{level:.6g}' for level in known or ())}, "
                f"but got {odd[-1]:.6g}; choose among these, or export with another --system"
            )
        return cls(config, settings.sampler == "unipc")

    @property
    def first_call(self) -> int:
        return -self.config.given_chunks

    @property
    def calls(self) -> int | None:
        return self.config.calls

    @property
    def chunk_frames(self) -> int:
        return self.config.chunk_frames

    @property
    def given_frames(self) -> int:
        return self.config.start(self.config.given_chunks)

    @property
    def places(self) -> int:
        return self._window * (1 + self.remembers)

    @property
    def _window(self) -> int:
        """Latents that are denoised together at most. What is kept of them lies behind them."""
        return self.config.active_chunks * self.config.chunk_frames

    @property
    def period(self) -> int:
        return self.config.cadence + 1

    @property
    def decoder_sizes(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys((self.config.size(0), self.config.chunk_frames)))

    @property
    def row_counts(self) -> tuple[int, ...]:
        """Prepared numbers of rows, smallest first: a writing call's, a full window's, and a re-cache's where it is one call."""
        counts = {self.config.chunk_frames, self._window}
        if self.config.recache not in ("none", "chunks"):
            counts.add(self.config.visible_frames)
        return tuple(sorted(counts))

    def call(self, index: int) -> Call:
        config, what = self.config, self.config.at(index)
        written = config.written(index)
        if isinstance(what, Writing):
            return self._writing(
                config.frames(what.chunk), config.ring(written, config.size(what.chunk), writes=True)
            )
        rows = [row for chunk in config.active(what.k) for row in self._denoised(chunk, what.k)]
        clean = config.finished(what.k)
        return Call(
            variant=self._variant(len(rows)),
            lanes=(self._lane(rows, config.ring(written, len(rows))),),
            draw=what.k,
            emit=() if clean is None else (Emit(tuple(config.frames(clean))),),
            keeps=self._keeps(written),
        )

    def prepare(self) -> Sequence[Call]:
        return ()

    def recache(self, index: int) -> Iterator[Call]:
        config = self.config
        if config.recache == "none" or (config.calls is not None and index >= config.calls):
            return iter(())
        written = config.written(index)
        if not written:
            return iter(())
        return self._by_chunk(written) if config.recache == "chunks" else self._at_once(written)

    def switched(self, index: int) -> Causal:
        """The schedule of a stream whose prompt changed before call `index`: "replaced" has another sink from then on."""
        if self.config.calls is not None and index >= self.config.calls:
            return self
        config = self._with_sink(self.config.written(index))
        return self if config == self.config else replace(self, config=config)

    def weights(self, guidance: float) -> tuple[float, ...]:
        return (1.0,) if guidance == 1 else tuple(cfg(guidance).tolist())

    def denoisers(self) -> tuple[tuple[Variant, int], ...]:
        return tuple([(self._variant(count), 1) for count in self.row_counts])

    def others(self) -> tuple[Variant, ...]:
        return ()

    def length(self, frames: int | None, frames_per_latent: float) -> int | None:
        return frames

    def _denoised(self, chunk: int, k: int) -> Iterator[Row]:
        """The rows of a chunk in a denoising call."""
        config, window = self.config, self._window
        level, level_next = config.level(chunk, k), config.level(chunk, k + 1)
        is_new = k == config.cadence * (chunk - config.given_chunks)
        for frame in config.frames(chunk):
            yield Row(
                frame,
                level,
                level_next,
                "noise" if is_new else "carried",
                frame % window,
                done=level_next == 0,
                history=window + frame % window if self.remembers else -1,
            )

    def _writing(self, frames: Iterable[int], ring: tuple[int, ...], *, held: int | None = None) -> Call:
        """Clean frames, whose keys and values are written as far as they have a slot when `held` frames are written (None: all)."""
        config = self.config
        rows = [
            Row(
                frame,
                origin="given",
                slot=config.slot(frame) if held is None or config.is_kept(frame, held) else EMPTY,
            )
            for frame in frames
        ]
        return Call(variant=self._variant(len(rows)), lanes=(self._lane(rows, ring),), update=False)

    def _by_chunk(self, written: int) -> Iterator[Call]:
        """Visible chunks, oldest first; each sees those that are rewritten already."""
        config = self.config
        seen = config.ring(written, config.chunk_frames)
        frames = sorted(frame for frame in seen if frame >= 0)
        done: set[int] = set()
        chunk = 0 if not frames else max(0, (frames[0] - config.size(0)) // config.chunk_frames)
        while len(done) < len(frames):
            group = [frame for frame in config.frames(chunk) if frame in frames]
            if group:
                yield self._writing(group, tuple([frame if frame in done else EMPTY for frame in seen]))
            done.update(group)
            chunk += 1

    def _at_once(self, written: int) -> Iterator[Call]:
        rows, ring = self.config.rewritten(written)
        frames = list(rows)
        if self.config.recache == "rewritten" and rows.start > 0:
            frames = [*range(self.config.pinned, self.config.pinned + self.config.sink_frames), *frames]
        yield replace(self, config=self._with_sink(written))._writing(frames, ring, held=written)

    def _with_sink(self, written: int) -> CausalConfig:
        """With the sink that a re-cache behind so many frames leaves."""
        config = self.config
        if config.recache != "replaced" or written <= config.visible_frames:
            return config
        return replace(config, pinned=written - config.visible_frames)

    def _variant(self, rows: int) -> Variant:
        count = next(count for count in self.row_counts if count >= rows)
        return Variant.of("denoiser", frames=count, ring=self.config.ring_frames)

    def _lane(self, rows: list[Row], ring: tuple[int, ...]) -> Lane:
        """Rows at the end of the smallest window that holds them."""
        count = next(count for count in self.row_counts if count >= len(rows))
        return Lane((*[Row()] * (count - len(rows)), *rows), ring)

    def _keeps(self, written: int) -> tuple[int, int]:
        """Clean latents that may be asked for: the sink's, and as many of the newest as a re-cache rewrites."""
        config = self.config
        pinned = config.sink_frames if config.recache in ("chunks", "rewritten") else 0
        return pinned, max(pinned, written - config.visible_frames)
