"""The noise level of every frame at every call, as plain records. One formula, no special cases.

    level of chunk i at call k:   sigma[k, i] = tau[S - clip(k - m*i, 0, S)]     0 = tau[0] < ... < tau[S] = 1
    calls for N chunks:           K = m*(N - 1) + S

i counts generated chunks. m = 0 is full-sequence diffusion, 0 < m < S progressive (PA-VDM, arXiv:2410.08151),
m = S strict autoregression; filling and draining of the window fall out of the formula. A Step depends on the
configuration and the call index alone, so a stream resumes at any call and an endless one needs no memory.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Literal, get_args

import numpy as np

from pyengine.errors import ConfigError
from pyengine.schedule.ring import EMPTY, frames_after, slot_of
from pyengine.schedule.step import Step

__all__ = ["Context", "ScheduleConfig", "Step", "noise_levels", "recache_steps", "step_at", "warped"]

Context = Literal["ring", "recompute", "none"]
MOST_ROWS = 4096  # latent frames of a window, and slots of a ring: far more than any memory holds


def warped(level: float, ratio: float) -> float:
    """Timestep warp t' = r t / (1 + (r - 1) t) (Open-Sora 1.2; `shift` of the Wan family)."""
    return ratio * level / (1 + (ratio - 1) * level)


@lru_cache(maxsize=64)
def noise_levels(
    steps: int, warp: float = 1.0, ladder: tuple[float, ...] | None = None, top: float | None = 1.0
) -> tuple[float, ...]:
    """Warped ladder tau[0..steps], lowest first: Python floats that float32 holds exactly. [S + 1]

    Without `ladder` the un-warped levels are l / steps; they are computed in float64 and rounded once. `top`: where a ladder must end,
    None = anywhere up to 1.
    """
    if not 0 < warp < float("inf"):
        raise ConfigError(f"warp must be a positive number but is {warp}")
    if ladder is not None and (
        len(ladder) != steps + 1 or ladder[0] != 0 or ladder[-1] > 1 or ladder[-1] < (top or 0)
    ):
        upwards = "to 1" if top == 1 else "up, to 1 at most,"
        raise ConfigError(f"ladder must be {steps + 1} levels from 0 {upwards} but is {ladder}")
    plain = ladder if ladder is not None else tuple(step / steps for step in range(steps + 1))
    levels = tuple(float(np.float32(warped(level, warp))) for level in plain)
    if any(low >= high for low, high in pairwise(levels)):
        raise ConfigError("levels must increase at every step but in float32 two are equal or out of order")
    return levels


@dataclass(frozen=True)
class ScheduleConfig:
    """All that decides a schedule.

    steps          S, updates that each chunk gets
    chunk_frames   C, latent frames that share a level
    cadence        m, calls from one chunk's birth to the next's; need not divide S
    chunks         N, chunks to generate; None = endless
    warp           r of the timestep warp; 1 = none
    ladder         un-warped levels 0 = l[0] < ... < l[S] = 1; None = uniform
    context        how clean chunks stay visible to later ones:
                   "ring"       a chunk that became clean rides along at level 0 in the next call, which
                                writes its keys and values to the ring; exact under a noise-causal mask
                   "recompute"  clean chunks re-enter every call as rows at level 0 (PA-VDM, bidirectional)
                   "none"       not at all; the ring, if any, stays empty
    sink_frames    clean frames from the start of the stream that stay visible for ever
    recent_frames  newest clean frames that stay visible, the riding chunk among them
    given_chunks   clean chunks that the caller supplies: they are chunks 0..given_chunks-1
    row_counts     prepared numbers of window rows, to share another schedule's plan; None = what is needed
    """

    steps: int
    chunk_frames: int
    cadence: int
    chunks: int | None = None
    warp: float = 1.0
    ladder: tuple[float, ...] | None = None
    context: Context = "ring"
    sink_frames: int = 0
    recent_frames: int = 0
    given_chunks: int = 0
    row_counts: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name, least in [("steps", 1), ("chunk_frames", 1), ("given_chunks", 0)]:
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least} but is {getattr(self, name)}")
        if not 0 <= self.cadence <= self.steps:
            raise ConfigError(f"cadence must be from 0 to the {self.steps} steps but is {self.cadence}")
        if self.chunks is None and self.cadence == 0:
            raise ConfigError(
                "chunks must be a number with cadence 0, which denoises all together, but is None"
            )
        if self.chunks is not None and self.chunks < 1:
            raise ConfigError(f"chunks must be at least 1, or None for endless, but is {self.chunks}")
        noise_levels(self.steps, self.warp, self.ladder)  # refuses a bad ladder or warp
        if self.context not in get_args(Context):
            raise ConfigError(
                f"context must be one of {', '.join(get_args(Context))} but is {self.context!r}"
            )
        for name in ("sink_frames", "recent_frames"):
            frames = getattr(self, name)
            if frames < 0 or frames % self.chunk_frames:
                raise ConfigError(
                    f"{name} must be a multiple of chunk_frames {self.chunk_frames} but is {frames}"
                )
        if self.context != "none" and self.recent_frames < self.chunk_frames:
            raise ConfigError(
                f"context {self.context!r} needs recent_frames of at least chunk_frames {self.chunk_frames}"
                f" but it is {self.recent_frames}; for no context say context='none'"
            )
        if self.context == "none" and self.given_chunks:
            raise ConfigError("given_chunks need a context to be seen in but context is 'none'")
        needed = self._needed_row_counts()[-1]
        if self.row_counts is not None and max(self.row_counts, default=0) < needed:
            raise ConfigError(f"row_counts must offer {needed} rows or more but are {self.row_counts}")
        if self.window_frames > MOST_ROWS:
            how = (
                "raise cadence or lower steps"
                if self.cadence
                else "ask for fewer frames, or choose another method"
            )
            raise ConfigError(
                f"at most {MOST_ROWS} latent frames can be denoised together but these settings ask for {self.window_frames}; {how}"
            )
        if self.ring_frames > MOST_ROWS:
            raise ConfigError(
                f"sink_frames and recent_frames must be at most {MOST_ROWS} together but are {self.ring_frames}"
            )

    @cached_property
    def levels(self) -> tuple[float, ...]:
        """Warped ladder, lowest first. [S + 1]"""
        return noise_levels(self.steps, self.warp, self.ladder)

    @property
    def calls(self) -> int | None:
        """K = m (N - 1) + S, or None when endless; calls that only write given chunks do not count."""
        return None if self.chunks is None else self.cadence * (self.chunks - 1) + self.steps

    @property
    def first_call(self) -> int:
        """Index of the first call: 0, or below for each given chunk but the last, which rides in call 0."""
        return min(0, 1 - self.given_chunks) if self.context == "ring" else 0

    @property
    def ring_frames(self) -> int:
        """R, slots of the ring."""
        return 0 if self.context == "recompute" else self.sink_frames + self.recent_frames

    @property
    def active_chunks(self) -> int:
        """Most chunks ever between birth and level 0 in one call: ceil(S / m), or N when m = 0."""
        return -(-self.steps // self.cadence) if self.cadence else self.chunks or 0

    @cached_property
    def shapes(self) -> tuple[int, ...]:
        """Prepared numbers of window rows, smallest first: a call uses the smallest that holds its frames."""
        return self._needed_row_counts() if self.row_counts is None else tuple(sorted(set(self.row_counts)))

    @property
    def window_frames(self) -> int:
        """Rows of the largest window."""
        return self.shapes[-1]

    def _needed_row_counts(self) -> tuple[int, ...]:
        chunks = {self.active_chunks}
        if self.context == "recompute":
            chunks = {self.active_chunks + (self.sink_frames + self.recent_frames) // self.chunk_frames}
        elif self.context == "ring" and self.cadence:
            chunks.add(self.steps // self.cadence + 1)  # those active when somebody rides, and the rider
        elif self.context == "ring" and self.given_chunks:
            chunks.add(self.active_chunks + 1)
        return tuple([count * self.chunk_frames for count in sorted(chunks)])


def step_at(config: ScheduleConfig, call: int) -> Step:
    """The record of one call, from config.first_call on."""
    if call < config.first_call or (config.calls is not None and call >= config.calls):
        last = "" if config.calls is None else f" to {config.calls - 1}"
        raise ConfigError(f"call must be from {config.first_call}{last} but is {call}")
    before = _chunks_at(config, call - 1) if call > config.first_call else ()
    clean, clean_next = _clean_chunks(config, call), _clean_chunks(config, call + 1)
    riding = range(_clean_chunks(config, call - 1), clean) if config.context == "ring" else range(0)
    if config.context == "ring":
        ring = frames_after(clean * config.chunk_frames, config.sink_frames, config.recent_frames)
    else:
        ring = (EMPTY,) * config.ring_frames
    # A rider's slot is written by this very call, so nobody may read it: the rider is seen as a row instead.
    ring = tuple([EMPTY if frame // config.chunk_frames in riding else frame for frame in ring])
    emit = tuple(range(max(config.given_chunks, clean), clean_next))
    return _lay_out(config, call, _chunks_at(config, call), before, riding, emit, ring)


def recache_steps(config: ScheduleConfig, call: int) -> Iterator[Step]:
    """Calls that rewrite the ring that call `call` will read, to be run before it when the text has changed.

    One clean chunk each, oldest first, in a window of its own that leaves the stream's window alone: every
    present row is `given` (the caller holds the clean latents of the ring's frames). Each sees those written
    before it.
    """
    seen = step_at(config, call).ring_index
    chunks = sorted({frame // config.chunk_frames for frame in seen if frame >= 0})
    for done, chunk in enumerate(chunks):
        visible = tuple([frame if frame // config.chunk_frames in chunks[:done] else EMPTY for frame in seen])
        step = _lay_out(config, call, (chunk,), (), range(chunk, chunk + 1), (), visible)
        rows = tuple([row for row, frame in enumerate(step.frame_index) if frame >= 0])
        clean = (0.0,) * step.frames
        yield replace(step, level=clean, level_next=clean, born=(), given=rows)


def _clean_chunks(config: ScheduleConfig, call: int) -> int:
    """Chunks that are clean when `call` starts. Given chunk j counts from call j - (given_chunks - 1) on."""
    if call < 0:
        return max(0, config.given_chunks + call)
    if config.cadence == 0:
        finished = (config.chunks or 0) if call >= config.steps else 0
    else:
        finished = max(0, (call - config.steps) // config.cadence + 1)
    return config.given_chunks + (finished if config.chunks is None else min(finished, config.chunks))


def _chunks_at(config: ScheduleConfig, call: int) -> tuple[int, ...]:
    """Chunks in the window of `call`, oldest first: context (riding or recomputed), then active."""
    clean = _clean_chunks(config, call)
    born = 0 if call < 0 else call // config.cadence + 1 if config.cadence else config.chunks or 0
    born = born if config.chunks is None else min(born, config.chunks)
    active = range(max(clean, config.given_chunks), config.given_chunks + born)
    if config.context == "ring":
        return (*range(_clean_chunks(config, call - 1), clean), *active)
    if config.context == "none":
        return tuple(active)
    sink, recent = config.sink_frames // config.chunk_frames, config.recent_frames // config.chunk_frames
    return (*range(min(sink, clean)), *range(max(sink, clean - recent), clean), *active)


def _level(config: ScheduleConfig, chunk: int, call: int) -> float:
    """sigma[k, i], the formula; given chunks are clean from the start."""
    if chunk < config.given_chunks:
        return 0.0
    age = call - config.cadence * (chunk - config.given_chunks)
    return config.levels[config.steps - min(max(age, 0), config.steps)]


def _lay_out(
    config: ScheduleConfig,
    call: int,
    chunks: tuple[int, ...],
    before: tuple[int, ...],
    riding: range,
    emit: tuple[int, ...],
    ring_index: tuple[int, ...],
) -> Step:
    """Put chunks into the last rows of the smallest window that fits; `before`: those of the last call.

    Tuples are made of lists here: one made of a generator is allocated for ten and cut, so CPython keeps thousands of spare ones
    of the cut size (its free lists), and the process grew by 48 bytes per frame for the first 10,000 frames.
    """
    size = config.chunk_frames
    frames, frames_before = (
        next(rows for rows in config.shapes if rows >= len(present) * size) for present in (chunks, before)
    )
    absent = frames - len(chunks) * size
    in_rows = (-1,) * absent + tuple([chunk for chunk in chunks for _ in range(size)])  # [F]
    index = (-1,) * absent + tuple([chunk * size + place for chunk in chunks for place in range(size)])  # [F]
    row_before = {chunk: frames_before - (len(before) - place) * size for place, chunk in enumerate(before)}
    new = [row for row, chunk in enumerate(in_rows) if chunk >= 0 and chunk not in row_before]
    level = {chunk: _level(config, chunk, call) for chunk in chunks} | {-1: 0.0}
    level_next = {chunk: _level(config, chunk, call + 1) for chunk in chunks} | {-1: 0.0}
    return Step(
        call=call,
        chunk=in_rows,
        frame_index=index,
        level=tuple([level[chunk] for chunk in in_rows]),
        level_next=tuple([level_next[chunk] for chunk in in_rows]),
        source=tuple(
            [
                row_before[chunk] + frame % size if chunk in row_before else -1
                for chunk, frame in zip(in_rows, index, strict=True)
            ]
        ),
        born=tuple([row for row in new if in_rows[row] >= config.given_chunks]),
        given=tuple([row for row in new if in_rows[row] < config.given_chunks]),
        append_slot=tuple(
            [
                slot_of(frame, config.sink_frames, config.recent_frames) if chunk in riding else -1
                for chunk, frame in zip(in_rows, index, strict=True)
            ]
        ),
        emit=emit,
        ring_index=ring_index,
    )
