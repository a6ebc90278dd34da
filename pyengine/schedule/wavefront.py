"""Overlapping chunks of a long video, denoised in an order in which the first are done before the last ones exist.

In whole-video order every chunk makes step 0, then every chunk step 1, and so on. A step of a chunk reads no other frames than those of
the chunk itself, as the step before left them, and so of the chunks that it overlaps with. Therefore a wavefront gives the same numbers:

    round j    chunk j makes step 0, then chunk j - m step 1, chunk j - 2m step 2, ...
    m          how many chunks a chunk overlaps with on each side: ceil(overlap / hop), hop = chunk - overlap

From round m (steps - 1) on, one chunk leaves per round, and m (steps - 1) + 1 are in flight. Calls are numbered round by round, with
one for each step, so that call i is step i % steps of round i // steps; before the first and behind the last chunk there is none.

**Randomized blending** (arXiv:2403.14773, section 4.3): at every step each chunk but the first draws which frame of its overlap it takes
over from. A frame has one latent, which the chunk that has taken it over updates; other chunks read it. The next chunk still reads the
frames of the overlap at a step that they have been updated from, so a frame has two places, for odd and even steps.

What the paper compares it with: chunks that denoise copies of their own of the overlap, from the same noise ("shared") or each from its
own ("independent"). Then no chunk waits for another (m = 0), and the later chunk's frames of an overlap are shown.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

from pyengine.errors import ConfigError
from pyengine.schedule.refinement import split_at

__all__ = ["Blending", "ChunkStep", "Wavefront"]

Blending = Literal["randomized", "shared", "independent"]


@dataclass(frozen=True)
class ChunkStep:
    """One step of one chunk, as frames of the video.

    frames   of the chunk
    fresh    those that begin here, at step 0
    updated  those whose latents this step changes; the chunk reads the others
    done     of them, those that are finished and not shown by a later chunk
    leaving  finished frames that no later chunk reads, in order
    """

    chunk: int
    step: int
    frames: range
    fresh: range
    updated: range
    done: range
    leaving: range


@dataclass(frozen=True)
class Wavefront:
    """All steps of all chunks, as a function of the number of the call.

    chunk, overlap  frames of a chunk, and how many of them it has in common with the next
    chunks          None: there is no end
    seed            of the draws of randomized blending
    """

    steps: int
    chunk: int
    overlap: int
    chunks: int | None
    blending: Blending = "randomized"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.blending not in get_args(Blending):
            raise ConfigError(
                f"blending must be one of {', '.join(get_args(Blending))} but is {self.blending!r}"
            )
        if self.steps < 1 or (self.chunks is not None and self.chunks < 1):
            raise ConfigError(f"steps and chunks must be from 1 but are {self.steps} and {self.chunks}")
        if not 0 <= self.overlap < self.chunk:
            raise ConfigError(
                f"overlap must be from 0 to below the chunk of {self.chunk} frames but is {self.overlap}"
            )

    @property
    def hop(self) -> int:
        """Frames that each further chunk adds."""
        return self.chunk - self.overlap

    @cached_property
    def reach(self) -> int:
        """How many chunks on each side a chunk has to wait for."""
        return -(-self.overlap // self.hop) if self.blending == "randomized" else 0

    @property
    def chunks_in_flight(self) -> int:
        """Chunks that have begun and are not finished, at most."""
        return self.reach * (self.steps - 1) + 1

    @property
    def frames_in_flight(self) -> int:
        """Frames of the chunks in flight, at most."""
        return self.hop * (self.chunks_in_flight - 1) + self.chunk

    @property
    def places(self) -> int:
        """Latents in flight: of each frame two, and what the solver keeps of the step before; of a chunk's own copies one less."""
        return 3 * self.frames_in_flight if self._blends else 2 * self.chunk

    def place(self, frame: int, at: ChunkStep) -> tuple[int, int, int]:
        """Where a frame's latent lies before a step, where it lies after it, and where what the solver keeps of it."""
        if not self._blends:
            row = frame - at.frames.start
            return row, row, self.chunk + row
        room = self.frames_in_flight
        slot = frame % room
        return slot + room * (at.step % 2), slot + room * ((at.step + 1) % 2), slot + 2 * room

    @property
    def calls(self) -> int | None:
        """Numbers of calls, those included at which there is nothing to do."""
        return None if self.chunks is None else (self.chunks + self.chunks_in_flight - 1) * self.steps

    @property
    def frames(self) -> int | None:
        """Of the video."""
        return None if self.chunks is None else self.start(self.chunks) + self.overlap

    def start(self, chunk: int) -> int:
        """First frame of a chunk."""
        return chunk * self.hop

    def needs(self, call: int) -> int:
        """How many frames of the video have to be there before a call is made."""
        newest = call // self.steps
        if self.chunks is not None:
            newest = min(newest, self.chunks - 1)
        return self.start(newest) + self.chunk

    def first_in_flight(self, call: int) -> int:
        """The first frame of the oldest chunk that a call, or one after it, works on."""
        return self.start(max(0, call // self.steps - self.chunks_in_flight + 1))

    def first_open(self, call: int) -> int:
        """The first frame that is not finished before a call."""
        finished = call // self.steps - self.chunks_in_flight
        if finished < 0:
            return 0
        last = finished if self.chunks is None else min(finished, self.chunks - 1)
        return self._next_taken_over(last, self.steps - 1)

    def step_at(self, call: int) -> ChunkStep | None:
        """What call number `call` does. None: nothing."""
        newest, step = divmod(call, self.steps)
        chunk = newest - self.reach * step
        if chunk < 0 or (self.chunks is not None and chunk >= self.chunks):
            return None
        first, is_last = self.start(chunk), chunk + 1 == self.chunks
        frames = range(first, first + self.chunk)
        left = frames if is_last else range(first, first + self.hop)
        updated, shared = (self._owned(chunk, step), self.overlap) if self._blends else (frames, 0)
        fresh = range(first + shared if chunk else first, frames.stop)
        none, ends = range(first, first), step == self.steps - 1
        return ChunkStep(
            chunk,
            step,
            frames,
            fresh if step == 0 else none,
            updated,
            (updated if self._blends else left) if ends else none,
            left if ends else none,
        )

    def __iter__(self) -> Iterator[ChunkStep]:
        """Every step in order."""
        call = 0
        while self.calls is None or call < self.calls:
            found = self.step_at(call)
            if found is not None:
                yield found
            call += 1

    @property
    def _blends(self) -> bool:
        return self.blending == "randomized"

    def _taken_over(self, chunk: int, step: int) -> int:
        """The first frame that a chunk updates."""
        if chunk == 0 or not self._blends or not self.overlap:
            return self.start(chunk)
        return self.start(chunk) + split_at(self.seed, step, chunk, self.overlap)

    def _owned(self, chunk: int, step: int) -> range:
        """The frames that a chunk has taken over and that no later one has."""
        first = self._taken_over(chunk, step)
        return range(first, max(first, self._next_taken_over(chunk, step)))

    def _next_taken_over(self, chunk: int, step: int) -> int:
        """The first frame that a later chunk updates; where there is none, the end of this one."""
        later = range(chunk + 1, chunk + max(self.reach, 1) + 1)
        there = [other for other in later if self.chunks is None or other < self.chunks]
        end = self.start(chunk) + self.chunk
        return min([end, *(self._taken_over(other, step) for other in there)])
