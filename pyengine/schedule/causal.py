"""Causal video in chunks whose clean keys and values are written by a call of their own (Self-Forcing, CausVid, LongLive, Rolling Forcing).

Levels are those of the one formula, tau[S - clip(k - m*i, 0, S)] for chunk i in denoising call k. After the call in which a chunk became
clean comes one more, of that chunk alone at level 0, whose keys and values later chunks see: its view of the past may be another than that
of the denoising calls. So the calls of N chunks are the K = m*(N - 1) + S of the formula and N - 1 writing ones (nobody reads the last
chunk's). With m = S that is cadence S + 1.

What a call sees is a budget: `visible_frames` in all, its own rows and the sink included. A window that drains sees more of the past.

All functions here are of integers; records are made of them in `pyengine.methods.causal`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from pyengine.errors import ConfigError
from pyengine.schedule.progressive import MOST_ROWS, noise_levels
from pyengine.schedule.ring import EMPTY, frames_after, slot_of

__all__ = ["CausalConfig", "CleanView", "Denoising", "Recache", "Writing"]

CleanView = Literal["window", "recent"]
Recache = Literal["none", "chunks", "kept", "rewritten", "replaced"]


class Denoising(NamedTuple):
    """Call k of the formula."""

    k: int


class Writing(NamedTuple):
    """The call that writes the keys and values of a clean chunk."""

    chunk: int


@dataclass(frozen=True)
class CausalConfig:
    """All that decides which frames a call has and sees.

    steps          S, updates that each chunk gets
    chunk_frames   C, latent frames that share a level
    cadence        m, denoising calls from one chunk's birth to the next's, 1 to S
    visible_frames  frames that a call sees at most, its own included
    chunks         N, chunks to generate; None = endless
    sink_frames    frames that stay visible for ever, the first of the stream unless `pinned` says others
    clean_view     what a writing call sees: "window", as the denoising calls of its chunk; "recent", the newest frames alone, so that the
                   sink is among them only while it is recent
    first_chunk    latent frames of chunk 0 where it is shorter; None = C
    given_chunks   clean chunks that the caller supplies: they are chunks 0..given_chunks-1
    recache        how a change of the prompt rewrites what is visible: "none"; "chunks", a call per chunk, oldest first; in one call of
                   the newest frames, that sees no older ones but the sink: "kept", the sink as it is, "rewritten", the sink too;
                   "replaced", the oldest of them being the sink from then on
    pinned         first frame of the sink
    """

    steps: int
    chunk_frames: int
    cadence: int
    visible_frames: int
    chunks: int | None = None
    warp: float = 1.0
    ladder: tuple[float, ...] | None = None
    sink_frames: int = 0
    clean_view: CleanView = "window"
    first_chunk: int | None = None
    given_chunks: int = 0
    recache: Recache = "chunks"
    pinned: int = 0

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("chunk_frames", 1), ("sink_frames", 0), ("given_chunks", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least} but is {getattr(self, name)}")
        if not 1 <= self.cadence <= self.steps:
            raise ConfigError(f"cadence must be from 1 to the {self.steps} steps but is {self.cadence}")
        if self.chunks is not None and self.chunks < 1:
            raise ConfigError(f"chunks must be at least 1, or None for endless, but is {self.chunks}")
        for name, kind in (("clean_view", CleanView), ("recache", Recache)):
            if getattr(self, name) not in get_args(kind):
                raise ConfigError(
                    f"{name} must be one of {', '.join(get_args(kind))} but is {getattr(self, name)!r}"
                )
        if self.first_chunk is not None and not 1 <= self.first_chunk <= self.chunk_frames:
            raise ConfigError(
                f"first_chunk must be from 1 to chunk_frames {self.chunk_frames} but is {self.first_chunk}"
            )
        least = self.sink_frames + max(self.active_chunks, 2) * self.chunk_frames
        if self.visible_frames < least:
            raise ConfigError(
                f"visible_frames must hold sink_frames and the chunks of a window, or two, which are {least} frames, but is "
                f"{self.visible_frames}"
            )
        if self.visible_frames > MOST_ROWS:
            raise ConfigError(f"visible_frames must be at most {MOST_ROWS} but is {self.visible_frames}")
        if self.clean_view == "recent" and self.recache == "replaced" and self.sink_frames:
            raise ConfigError("clean_view 'recent' keeps no sink to be replaced; choose another recache")
        noise_levels(self.steps, self.warp, self.ladder, top=None)  # refuses a bad ladder or warp

    @property
    def levels(self) -> tuple[float, ...]:
        """Warped ladder, lowest first. [S + 1]"""
        return noise_levels(self.steps, self.warp, self.ladder, top=None)

    @property
    def active_chunks(self) -> int:
        """Most chunks ever between birth and level 0 in one call: ceil(S / m)."""
        return -(-self.steps // self.cadence)

    @property
    def recent_frames(self) -> int:
        """Slots of the ring beside the sink's: what a writing call sees."""
        return (
            self.visible_frames - self.chunk_frames - (self.sink_frames if self.clean_view == "window" else 0)
        )

    @property
    def ring_frames(self) -> int:
        """R, slots of the ring."""
        return self.sink_frames + self.recent_frames

    @property
    def calls(self) -> int | None:
        """Calls from 0 on: K of the formula, and a writing one for every chunk but the last. None = endless."""
        if self.chunks is None:
            return None
        return self.cadence * (self.chunks - 1) + self.steps + self.chunks - 1

    def size(self, chunk: int) -> int:
        """Frames of a chunk."""
        return self.first_chunk if chunk == 0 and self.first_chunk is not None else self.chunk_frames

    def start(self, chunk: int) -> int:
        """The first frame of a chunk."""
        return 0 if chunk == 0 else self.size(0) + (chunk - 1) * self.chunk_frames

    def frames(self, chunk: int) -> range:
        return range(self.start(chunk), self.start(chunk) + self.size(chunk))

    def at(self, call: int) -> Denoising | Writing:
        """What a call does. Calls before 0 write the given chunks. Raises ConfigError for one that the stream does not have."""
        if call < -self.given_chunks or (self.calls is not None and call >= self.calls):
            last = "" if self.calls is None else f" to {self.calls - 1}"
            raise ConfigError(f"call must be from {-self.given_chunks}{last} but is {call}")
        if call < 0:
            return Writing(self.given_chunks + call)
        if call < self.steps:
            return Denoising(call)
        round_, part = divmod(call - self.steps, self.cadence + 1)
        if part == 0:
            return Writing(self.given_chunks + round_)
        return Denoising(self.steps + self.cadence * round_ + part - 1)

    def active(self, k: int) -> range:
        """Chunks between birth and level 0 in denoising call k, oldest first."""
        first = max(0, (k - self.steps) // self.cadence + 1)
        end = k // self.cadence + 1
        end = end if self.chunks is None else min(end, self.chunks)
        return range(self.given_chunks + first, self.given_chunks + end)

    def level(self, chunk: int, k: int) -> float:
        """Of a generated chunk before denoising call k."""
        age = k - self.cadence * (chunk - self.given_chunks)
        return self.levels[self.steps - min(max(age, 0), self.steps)]

    def finished(self, k: int) -> int | None:
        """The chunk that becomes clean in denoising call k, None if none does."""
        chunk, rest = divmod(k + 1 - self.steps, self.cadence)
        is_one = rest == 0 and chunk >= 0 and (self.chunks is None or chunk < self.chunks)
        return self.given_chunks + chunk if is_one else None

    def written(self, call: int) -> int:
        """Frames whose keys and values are in the ring, or have been, when a call starts."""
        what = self.at(call)
        return self.start(what.chunk if isinstance(what, Writing) else self.active(what.k)[0])

    def slot(self, frame: int) -> int:
        """The slot that a frame is written to."""
        if self.pinned <= frame < self.pinned + self.sink_frames:
            return frame - self.pinned
        return self.sink_frames + (frame - self.sink_frames) % self.recent_frames

    def ring(self, written: int, rows: int, *, writes: bool = False) -> tuple[int, ...]:
        """The frame in each slot that a call of so many rows behind the written ones may read; EMPTY for no frame. [R]"""
        sink = range(self.pinned, min(written, self.pinned + self.sink_frames))
        if writes and self.clean_view == "recent":
            oldest, sink = written - (self.visible_frames - rows), range(0)
        else:
            oldest = written - (self.visible_frames - rows - self.sink_frames)
        return tuple([frame if frame in sink or frame >= oldest else EMPTY for frame in self._held(written)])

    def rewritten(self, written: int) -> tuple[range, tuple[int, ...]]:
        """The rows of a re-cache in one call, and the ring that it reads. With "rewritten" the sink's frames are rows in front of these."""
        visible, sink = self.visible_frames, self.sink_frames
        nothing = (EMPTY,) * self.ring_frames
        if written <= visible:
            return range(written), nothing
        if self.recache == "replaced":
            return range(written - visible, written), nothing
        rows = range(written - (visible - sink), written)
        if self.recache == "rewritten":
            return rows, nothing
        pinned = range(self.pinned, self.pinned + sink)
        return rows, tuple([frame if frame in pinned else EMPTY for frame in self._held(written)])

    def is_kept(self, frame: int, written: int) -> bool:
        """Whether a frame has a slot of its own when so many are written: of the sink, or one of the newest."""
        return self.pinned <= frame < self.pinned + self.sink_frames or frame >= max(
            self.sink_frames, written - self.recent_frames
        )

    def _held(self, written: int) -> list[int]:
        """The frame in each slot."""
        frames = list(frames_after(written, self.sink_frames, self.recent_frames))
        if self.pinned:
            frames[: self.sink_frames] = range(self.pinned, self.pinned + self.sink_frames)
            for frame in range(self.pinned, self.pinned + self.sink_frames):
                slot = slot_of(frame, self.sink_frames, self.recent_frames)
                if slot >= self.sink_frames and frames[slot] == frame:
                    frames[slot] = EMPTY  # it is in the sink's
        return frames
