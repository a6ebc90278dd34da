"""Replacement sampling, the baseline of PA-VDM's table 1: clips whose head is the tail of the one before.

All new frames of a clip share one level and take the S steps of the ordinary sampler together. Without noise
(RN) the head stays clean; with noise (RW) it is re-noised to the common level at every call (Xie et al. 2024,
arXiv:2410.08151; Ho et al. 2022, arXiv:2204.03458).
"""

from dataclasses import dataclass

from pyengine.errors import ConfigError
from pyengine.schedule.progressive import MOST_ROWS, noise_levels
from pyengine.schedule.ring import EMPTY
from pyengine.schedule.step import Step

__all__ = ["ReplacementConfig", "replacement_step_at"]


@dataclass(frozen=True)
class ReplacementConfig:
    """All that decides a replacement schedule.

    steps           S, calls per clip
    chunk_frames    C, latent frames that are decoded together; all other lengths are multiples
    clip_frames     W, rows of every call
    overlap_frames  E, rows taken from the previous clip
    renoised        True: with noise (RW); False: without (RN)
    chunks          N, chunks to generate; None = endless. A last clip that goes beyond is not emitted in full
    given_chunks    clean chunks that the caller supplies: none, or at least the overlap
    ring_frames     R, slots of the ring that the plan has and that stays empty
    """

    steps: int
    chunk_frames: int
    clip_frames: int
    overlap_frames: int
    renoised: bool
    chunks: int | None = None
    warp: float = 1.0
    ladder: tuple[float, ...] | None = None
    given_chunks: int = 0
    ring_frames: int = 0

    def __post_init__(self) -> None:
        for name, least in [("steps", 1), ("chunk_frames", 1), ("given_chunks", 0), ("ring_frames", 0)]:
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least} but is {getattr(self, name)}")
        for name in ("clip_frames", "overlap_frames"):
            frames = getattr(self, name)
            if frames < 1 or frames % self.chunk_frames:
                raise ConfigError(
                    f"{name} must be a multiple of chunk_frames {self.chunk_frames} but is {frames}"
                )
        if max(self.clip_frames, self.ring_frames) > MOST_ROWS:
            raise ConfigError(
                f"clip_frames and ring_frames must be at most {MOST_ROWS} but are {self.clip_frames} and {self.ring_frames}"
            )
        if self.overlap_frames >= self.clip_frames:
            raise ConfigError(
                f"overlap_frames must be below clip_frames {self.clip_frames} but is {self.overlap_frames}"
            )
        if self.chunks is not None and self.chunks < 1:
            raise ConfigError(f"chunks must be at least 1, or None for endless, but is {self.chunks}")
        if 0 < self.given_chunks * self.chunk_frames < self.overlap_frames:
            raise ConfigError(
                f"given_chunks must fill the overlap of {self.overlap_frames} frames or be 0"
                f" but is {self.given_chunks} of {self.chunk_frames} frames"
            )
        noise_levels(self.steps, self.warp, self.ladder)

    @property
    def levels(self) -> tuple[float, ...]:
        """Warped ladder, lowest first. [S + 1]"""
        return noise_levels(self.steps, self.warp, self.ladder)

    @property
    def calls(self) -> int | None:
        """S per clip; None when endless."""
        if self.chunks is None:
            return None
        beyond_first = self.chunks * self.chunk_frames - _new_frames(self, 0)
        return self.steps * (1 + max(0, -(-beyond_first // _new_frames(self, 1))))

    @property
    def shapes(self) -> tuple[int, ...]:
        """Prepared numbers of window rows: the clip."""
        return (self.clip_frames,)


def replacement_step_at(config: ReplacementConfig, call: int) -> Step:
    """The record of one call. Rows of the head have level == level_next: their prediction is discarded."""
    if call < 0 or (config.calls is not None and call >= config.calls):
        raise ConfigError(f"call must be from 0 to below {config.calls} but is {call}")
    clip, step = divmod(call, config.steps)
    rows, size = config.clip_frames, config.chunk_frames
    head = rows - _new_frames(config, clip)  # rows taken from before: 0 or E
    first = config.given_chunks * size - head if clip == 0 else _first_new_frame(config, clip) - head
    level, level_next = config.levels[config.steps - step], config.levels[config.steps - step - 1]
    head_level = level if config.renoised else 0.0
    if step > 0:
        source = tuple(range(rows))
    elif clip > 0:
        source = tuple(range(rows - head, rows)) + (-1,) * (rows - head)
    else:
        source = (-1,) * rows
    index = tuple(range(first, first + rows))
    last_chunk = None if config.chunks is None else config.given_chunks + config.chunks
    done = range((first + head) // size, (first + rows) // size) if step == config.steps - 1 else range(0)
    return Step(
        call=call,
        chunk=tuple(frame // size for frame in index),
        frame_index=index,
        level=(head_level,) * head + (level,) * (rows - head),
        level_next=(head_level,) * head + (level_next,) * (rows - head),
        source=source,
        born=tuple(range(head, rows)) if step == 0 else (),
        given=tuple(range(head)) if call == 0 else (),
        append_slot=(-1,) * rows,
        emit=tuple(chunk for chunk in done if last_chunk is None or chunk < last_chunk),
        ring_index=(EMPTY,) * config.ring_frames,
        renoised=tuple(range(head)) if config.renoised else (),
    )


def _new_frames(config: ReplacementConfig, clip: int) -> int:
    """Frames that a clip generates: all of them if nothing comes before."""
    alone = clip == 0 and config.given_chunks == 0
    return config.clip_frames - (0 if alone else config.overlap_frames)


def _first_new_frame(config: ReplacementConfig, clip: int) -> int:
    """Absolute index of the first frame that a clip after the first generates."""
    return (
        config.given_chunks * config.chunk_frames
        + _new_frames(config, 0)
        + (clip - 1) * _new_frames(config, 1)
    )
