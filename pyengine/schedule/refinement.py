"""The second stage of StreamingT2V as pure functions: its noise levels, its solver, and randomized blending.

A long video is noised to level T' at once, so that chunks share the noise of the frames in which they overlap, and is denoised by
Vid2Vid-XL in k steps (Henschel et al. 2024, arXiv:2403.14773, section 4.3, and its released code, which this follows):

    sigmas = vid2vid_sigmas()                                   # s[t] of the 1000 timesteps; alpha = sqrt(1 - s^2)
    grid   = time_grid(sigmas, steps=30, levels=600)            # k-space sigmas of the steps, and integer timesteps
    x      = grid.sigmas[0] * (alpha * x0 + s * noise)          # the noised signal times sigma, as released
    per step i:
        xt = x / sqrt(1 + grid.sigmas[i]**2)                    # what the network is shown, chunk by chunk
        D  = blend([clean_of(xt[chunk], guided(y, u), ...)])    # predictions of the clean latents, blended
        x  = solver_step(grid.sigmas, i).apply(x, D, previous D, noise)

Latents are [..., frames, h, w] here: C, F, h, w, as the second stage has them. Everything in float64 unless said otherwise.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pyengine.errors import ConfigError, ShapeError

__all__ = [
    "SolverStep",
    "TimeGrid",
    "blend",
    "chunk_starts",
    "clean_of",
    "guided",
    "solver_step",
    "split_at",
    "time_grid",
    "vid2vid_sigmas",
]

FRAME_AXIS = -3
_LIMIT = 15.0  # of the log signal-to-noise ratio, at both ends of the cosine schedule
_CLEAN_SCALE, _NOISY_SCALE = 2.0, 4.0  # what the noise is scaled by at the ends, for larger pictures


def vid2vid_sigmas(timesteps: int = 1000) -> np.ndarray:
    """Share of noise s[t] of each timestep; that of the signal is sqrt(1 - s^2). Rises to exactly 1. [timesteps] float64

    A cosine schedule between log signal-to-noise ratios of +-15, shifted by 2 ln(1/2) at the clean and by 2 ln(1/4) at the noisy end,
    then stretched so that the last timestep is pure noise. Computed in float32 as released, whose rounding is 1e-4 of s[0].
    """
    single = np.float32
    u = np.linspace(1, 0, timesteps, dtype=single)
    first, last = np.arctan(np.exp([_LIMIT / 2, -_LIMIT / 2]))
    ratio = single(-2) * np.log(np.tan(single(first) + u * single(last - first)))
    ratio -= single(2) * (u * single(np.log(_CLEAN_SCALE)) + (1 - u) * single(np.log(_NOISY_SCALE)))
    s = np.sqrt(1 / (1 + np.exp(ratio)))
    low, high = s.min(), s.max()
    return (low + (1 - low) * (s - low) / (high - low)).astype(np.float64)


class TimeGrid(NamedTuple):
    """sigmas: k-space sigma s / alpha of each step, and a last 0. [steps + 1]; timesteps: what the network is told. [steps] int64"""

    sigmas: np.ndarray
    timesteps: np.ndarray


def time_grid(sigmas: np.ndarray, steps: int, levels: int) -> TimeGrid:
    """The steps from timestep `levels` - 1 down: even in time, k-space sigmas interpolated in their logarithm.

    The grid has a step more than was asked for, whose last sigma is left out. As released, the number of points is what rounding
    makes of a division: of 600 levels 6, 13, 27, 54 or 55 steps become one more. Raises ConfigError.
    """
    if not 2 <= levels < len(sigmas) or steps < 1:
        raise ConfigError(
            f"expected steps from 1 and levels from 2 to {len(sigmas) - 1} but got {steps} and {levels}"
        )
    width = levels / (steps + 1)
    count = int(np.ceil(levels / width))
    times = (levels - 1) - np.arange(count) * width
    table = sigmas[:levels]
    logarithms = np.log(table / np.sqrt(1 - table**2))
    k_space = np.exp(np.interp(times, np.arange(levels), logarithms))
    return TimeGrid(np.append(k_space[:-1], 0.0), np.rint(times[:-1]).astype(np.int64))


@dataclass(frozen=True)
class SolverStep:
    """x' = sample x + clean D + difference (D - D of the step before) + noise n."""

    sample: float
    clean: float
    difference: float
    noise: float

    def apply(
        self, x: np.ndarray, clean: np.ndarray, before: np.ndarray | None, noise: np.ndarray | None
    ) -> np.ndarray:
        """x' in the dtype of x. `before` and `noise` may be None where their factor is 0."""
        out = x.dtype.type(self.sample) * x + x.dtype.type(self.clean) * clean
        if self.difference:
            assert before is not None
            out += x.dtype.type(self.difference) * (clean - before)
        if self.noise:
            assert noise is not None
            out += x.dtype.type(self.noise) * noise
        return out


def solver_step(sigmas: Sequence[float] | np.ndarray, step: int) -> SolverStep:
    """DPM-Solver++(2M) SDE with eta 1 (Lu et al. 2022, arXiv:2211.01095), midpoint form, on k-space sigmas [steps + 1], the last 0.

    The first step has no prediction before it and is of first order; the last one gives the clean prediction itself.
    """
    grid = np.asarray(sigmas, np.float64)
    if not 0 <= step < len(grid) - 1:
        raise ConfigError(f"step must be from 0 to {len(grid) - 2} but is {step}")
    now, then = grid[step], grid[step + 1]
    if then == 0:
        return SolverStep(0.0, 1.0, 0.0, 0.0)
    h = np.log(now / then)
    share = -np.expm1(-2 * h)
    ratio = np.log(grid[step - 1] / now) / h if step > 0 else np.inf
    return SolverStep(
        float(then / now * np.exp(-h)), float(share), float(0.5 * share / ratio), float(then * share**0.5)
    )


def guided(cond: np.ndarray, uncond: np.ndarray, guidance: float, rescale: float) -> np.ndarray:
    """Guidance, its deviation drawn towards that of the conditional prediction (Lin et al. 2023, arXiv:2305.08891).

    Deviations are over the whole chunk, with divisor N - 1; `rescale` 0 leaves guidance alone, 1 takes the deviation over.
    """
    out = uncond + cond.dtype.type(guidance) * (cond - uncond)
    ratio = cond.std(ddof=1) / (out.std(ddof=1) + 1e-12)
    return out * cond.dtype.type(rescale * ratio + (1 - rescale))


def clean_of(x: np.ndarray, velocity: np.ndarray, share: float) -> np.ndarray:
    """The clean latents that a network's v means: sqrt(1 - s^2) x - s v, in the dtype of x. `share`: s of the timestep."""
    return x.dtype.type((1 - share**2) ** 0.5) * x - x.dtype.type(share) * velocity


def chunk_starts(frames: int, chunk: int, overlap: int) -> tuple[int, ...]:
    """First frame of each chunk. Raises ConfigError where they do not fill the frames exactly: cut those to `whole_frames`."""
    if not 0 <= overlap < chunk:
        raise ConfigError(f"overlap must be from 0 to below the chunk of {chunk} frames but is {overlap}")
    if frames < chunk or (frames - overlap) % (chunk - overlap):
        raise ConfigError(
            f"frames must be {chunk} or {chunk - overlap} more each time but are {frames}; "
            f"{max(chunk, whole_frames(frames, chunk, overlap))} would do"
        )
    return tuple(range(0, frames - overlap, chunk - overlap))


def whole_frames(frames: int, chunk: int, overlap: int) -> int:
    """How many of so many frames whole chunks cover: of 240 in chunks of 24 that overlap by 8, 232."""
    return (frames - overlap) // (chunk - overlap) * (chunk - overlap) + overlap


def split_at(seed: int, step: int, chunk: int, overlap: int) -> int:
    """Which frame of its overlap a chunk takes over from, 0 to `overlap` - 1, a function of (seed, step, chunk) alone.

    So the chunk before keeps frame f of the overlap (from 1) with probability 1 - f / overlap, and a chunk that is computed later, or
    after a resume, splits where it would have split.
    """
    if overlap < 1 or chunk < 1 or step < 0:
        raise ConfigError(
            f"expected an overlap, and chunk and step from 1 and 0, but got {overlap}, {chunk} and {step}"
        )
    key = np.array([seed & (2**64 - 1), chunk], np.uint64)
    # The third counter is that of frame noise: another stream of the same key.
    bits = np.random.Philox(key=key, counter=[0, 0, 0, step + 1])
    return int(np.random.Generator(bits).integers(overlap))


def blend(parts: Sequence[np.ndarray], splits: Sequence[int], overlap: int) -> np.ndarray:
    """Predictions of overlapping chunks as one of all frames.

    parts   of each chunk in order, [..., frames of a chunk, h, w] of one shape
    splits  of each chunk but the first: it has the frames from this one on, and the chunk before it those up to there
    Raises ShapeError.
    """
    if len(splits) != len(parts) - 1 or any(not 0 <= split <= overlap for split in splits):
        raise ShapeError(
            f"[blend] expected {len(parts) - 1} splits from 0 to {overlap} but got {list(splits)}"
        )
    chunk = parts[0].shape[FRAME_AXIS]
    starts = [index * (chunk - overlap) for index in range(len(parts))]
    shape = list(parts[0].shape)
    shape[FRAME_AXIS] = starts[-1] + chunk
    out = np.empty(shape, parts[0].dtype)
    for start, part, split in zip(starts, parts, (0, *splits), strict=True):
        out[..., start + split : start + chunk, :, :] = part[..., split:, :, :]
    return out
