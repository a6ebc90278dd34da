"""Schedules of one window that moves along the stream: what the records of `pyengine.schedule` say, as calls."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import chain

from pyengine.bundle.variant import Variant
from pyengine.schedule.call import Call, Emit, Lane, Origin, Row
from pyengine.schedule.ring import slot_of
from pyengine.schedule.samplers import cfg
from pyengine.schedule.step import Step

__all__ = ["Windowed"]


class Windowed(ABC):
    """One lane per call, run by the component `denoiser`. Subclasses say which Step each call is."""

    @property
    @abstractmethod
    def chunk_frames(self) -> int:
        """Latents that share a level and are decoded together."""

    @property
    @abstractmethod
    def row_counts(self) -> tuple[int, ...]:
        """Prepared window sizes, smallest first."""

    @property
    @abstractmethod
    def ring_frames(self) -> int:
        """Slots of the ring."""

    @property
    @abstractmethod
    def first_call(self) -> int: ...

    @property
    @abstractmethod
    def calls(self) -> int | None: ...

    @abstractmethod
    def step_at(self, call: int) -> Step:
        """The record of one call."""

    @abstractmethod
    def recache_steps(self, call: int) -> Iterator[Step]:
        """Records that rewrite the ring before `call`."""

    @property
    @abstractmethod
    def given_frames(self) -> int:
        """Given latents that stay as they are."""

    @property
    def sink_frames(self) -> int:
        """Frames from the start that stay visible for ever."""
        return 0

    @property
    def period(self) -> int:
        return 1

    @property
    def sink_rows(self) -> int:
        """Frames from the start that are rows of every window, not slots of a ring; the others of a window are neighbours."""
        return 0

    @property
    def places(self) -> int:
        return self.row_counts[-1]

    @property
    def decoder_sizes(self) -> tuple[int, ...]:
        return (self.chunk_frames,)

    def call(self, index: int) -> Call:
        step, size = self.step_at(index), self.chunk_frames
        return Call(
            variant=self._variant(step),
            lanes=(self._lane(step),),
            draw=max(step.call, 0),
            emit=tuple([Emit(tuple(range(chunk * size, (chunk + 1) * size))) for chunk in step.emit]),
            keeps=self._keeps(step),
        )

    def prepare(self) -> Sequence[Call]:
        return ()

    def recache(self, index: int) -> Iterator[Call]:
        if self.calls is not None and index >= self.calls:
            return  # every call has been made: nothing reads the ring any more
        for step in self.recache_steps(index):
            yield Call(variant=self._variant(step), lanes=(self._lane(step, fresh=True),), update=False)

    def switched(self, index: int) -> Windowed:
        return self

    def weights(self, guidance: float) -> tuple[float, ...]:
        return (1.0,) if guidance == 1 else tuple(cfg(guidance).tolist())

    def denoisers(self) -> tuple[tuple[Variant, int], ...]:
        return tuple([(self._sized(count), 1) for count in self.row_counts])

    def others(self) -> tuple[Variant, ...]:
        return ()

    def length(self, frames: int | None, frames_per_latent: float) -> int | None:
        return frames

    def _sized(self, frames: int) -> Variant:
        return _denoiser(frames, self.ring_frames)

    def _variant(self, step: Step) -> Variant:
        return self._sized(step.frames)

    def _lane(self, step: Step, *, fresh: bool = False) -> Lane:
        """`fresh`: rows that leave the stream's own latents in flight alone."""
        origin: dict[int, Origin] = dict.fromkeys(step.born, "noise")
        origin.update(dict.fromkeys(step.given, "given"))
        origin.update(dict.fromkeys(step.warmed, "noised"))
        renoised = set(step.renoised)
        rows = [
            Row(
                frame,
                step.level[row],
                step.level_next[row],
                origin.get(row, "carried"),
                -1 if fresh else slot_of(frame, self.sink_rows, self.places - self.sink_rows),
                step.append_slot[row],
                done=step.level_next[row] == 0 < step.level[row],
                renoised=row in renoised,
            )
            if frame >= 0
            else Row()
            for row, frame in enumerate(step.frame_index)
        ]
        return Lane(tuple(rows), step.ring_index)

    def _keeps(self, step: Step) -> tuple[int, int]:
        """Clean frames that a recache or a clip behind may still ask for: what the ring shows, and the window."""
        pinned = self.sink_frames
        seen = chain(step.frame_index, step.ring_index)
        return pinned, min((frame for frame in seen if frame >= pinned), default=0)


@lru_cache(maxsize=64)
def _denoiser(frames: int, ring: int) -> Variant:
    return Variant.of("denoiser", frames=frames, ring=ring)
