"""Samplers, guidance and noise. Every sampler maps (level, level_next) to one affine update per frame:

    out[f] = sample[f] * x[f] + prediction[f] * p[f] + noise[f] * eps[f] + history[f] * h[f]

where h, of multistep solvers alone, is what was kept of the frame's step before: a sum of x and p then.

So one kernel (DenoiseStep) serves them all, and frames of one window may stand at different levels.
Where the level does not change it is exactly (1, 0, 0): a copy, bit for bit. Level 0 is clean, 1 is noise.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from pyengine.errors import ConfigError, ShapeError

__all__ = [
    "Coefficients",
    "Levels",
    "Multistep",
    "Prediction",
    "Sampler",
    "alphas_cumprod",
    "cfg",
    "ddim",
    "euler",
    "frame_noise",
    "make_sampler",
    "rectified",
    "renoise",
]

Levels = Sequence[float] | np.ndarray
Prediction = Literal["epsilon", "velocity"]
AlphaBar = Callable[[np.ndarray], np.ndarray] | Sequence[float] | np.ndarray


class Coefficients(NamedTuple):
    """Scales of one update, each [F] float32."""

    sample: np.ndarray
    prediction: np.ndarray
    noise: np.ndarray

    @property
    def needs_noise(self) -> bool:
        """True if some frame takes fresh noise."""
        return bool(self.noise.any())


class Multistep(NamedTuple):
    """Scales of one update of a multistep solver, each [F] float32: `history` of what was kept at the step before, `kept_sample` and
    `kept_prediction` (and `kept_history`, of what was kept before) of what is kept for the step after.
    """

    update: Coefficients
    history: np.ndarray
    kept_sample: np.ndarray
    kept_prediction: np.ndarray
    kept_history: np.ndarray | float = 0.0


class Sampler(NamedTuple):
    """How latents go from level to level.

    update  the affine update of every frame from (level, level_next)
    noised  (keep, share) of a clean latent and of noise that together stand at a level
    """

    update: Callable[[Levels, Levels], Coefficients | Multistep]
    noised: Callable[[float], tuple[float, float]]

    def __call__(self, level: Levels, level_next: Levels) -> Coefficients | Multistep:
        return self.update(level, level_next)


def euler(level: Levels, level_next: Levels) -> Coefficients:
    """Euler step of rectified flow, x_t = (1-t) x0 + t eps, v = x0 - eps (Liu et al. 2022, arXiv:2209.03003).

    x += (t - t') v, the difference taken in float32.
    """
    now, then = _levels(level, level_next)
    return _held(now, then, np.ones_like(now), now - then, np.zeros_like(now))


def renoise(level: Levels, level_next: Levels) -> Coefficients:
    """Predict x0, then noise it afresh to the next level (consistency sampling, Song et al. 2023,
    arXiv:2303.01469; CausVid, Self-Forcing, Rolling Forcing). The network predicts v = x0 - eps.

    x0 = x + t v;  x' = (1-t') x0 + t' eps
    """
    now, then = _levels(level, level_next)
    return _held(now, then, 1 - then, (1 - then) * now, then)


def ddim(
    alpha_bar: AlphaBar, eta: float = 0.0, predicts: Prediction = "epsilon"
) -> Callable[[Levels, Levels], Coefficients]:
    """DDIM (Song et al. 2020, arXiv:2010.02502, equations 12 and 16): eta 0 deterministic, 1 DDPM.

    With eta 1 over every timestep, 999 .. 0 and then clean, this is ancestral sampling (Ho et al. 2020, arXiv:2006.11239) exactly.

    alpha_bar  callable level -> alpha bar, or the table [T] of timesteps 0..T-1. Timestep t stands at level
               (t + 1) / T; level 0 is clean, alpha bar 1
    predicts   "epsilon", or "velocity" = sqrt(abar) eps - sqrt(1 - abar) x0 (Salimans & Ho 2022,
               arXiv:2202.00512)
    """
    if eta < 0:
        raise ConfigError(f"eta must not be negative but is {eta}")
    if predicts not in ("epsilon", "velocity"):
        raise ConfigError(f"predicts must be epsilon or velocity but is {predicts!r}")
    at = alpha_bar if callable(alpha_bar) else _table(alpha_bar)

    def step(level: Levels, level_next: Levels) -> Coefficients:
        now, then = (array.astype(np.float64) for array in _levels(level, level_next))
        abar, abar_next = np.asarray(at(now), np.float64), np.asarray(at(then), np.float64)
        held = now == then
        abar_next = np.where(held, abar, abar_next)  # keeps the roots real; `_held` overwrites those frames
        if np.any(abar <= 0) or np.any(abar_next < abar) or np.any(abar_next > 1):
            raise ConfigError("alpha_bar must lie in (0, 1] and not fall from a level to the next lower one")
        # 1 - abar = 0 only for clean frames, which are held.
        share = np.divide(1 - abar_next, 1 - abar, out=np.zeros_like(abar), where=abar < 1)
        sigma = eta * np.sqrt(share * (1 - abar / abar_next))
        direction = np.sqrt(np.maximum(1 - abar_next - sigma**2, 0))  # of eps in the new sample
        a, s, a_next = np.sqrt(abar), np.sqrt(1 - abar), np.sqrt(abar_next)
        if predicts == "epsilon":  # x0 = (x - s eps) / a
            sample, prediction = a_next / a, direction - a_next * s / a
        else:  # x0 = a x - s v;  eps = s x + a v
            sample, prediction = a_next * a + direction * s, direction * a - a_next * s
        return _held(now, then, sample, prediction, sigma)

    return step


def alphas_cumprod(first_beta: float, last_beta: float, timesteps: int = 1000) -> np.ndarray:
    """Alpha bar of betas that are linear in their square root ("scaled linear"; LVDM's yaml says `linear`). [timesteps] float64"""
    betas = np.linspace(first_beta**0.5, last_beta**0.5, timesteps) ** 2
    return np.cumprod(1 - betas)


def make_sampler(
    name: str,
    *,
    alpha_bar: AlphaBar | None = None,
    eta: float = 0.0,
    predicts: Prediction = "epsilon",
) -> Sampler:
    """The sampler that a manifest names: "euler", "renoise" or "ddim" (which alone reads the options)."""
    if name == "euler":
        return Sampler(euler, rectified)
    if name == "renoise":
        return Sampler(renoise, rectified)
    if name == "ddim":
        if alpha_bar is None:
            raise ConfigError("sampler 'ddim' needs alpha_bar but got none")
        at = alpha_bar if callable(alpha_bar) else _table(alpha_bar)

        def noised(level: float) -> tuple[float, float]:
            share = float(at(np.array([level], np.float64))[0])
            return share**0.5, (1 - share) ** 0.5

        return Sampler(ddim(alpha_bar, eta, predicts), noised)
    raise ConfigError(f"sampler must be euler, renoise or ddim but is {name!r}")


def cfg(scale: float) -> np.ndarray:
    """Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598): branches (conditional, null). [2]

    p = p_null + scale (p_cond - p_null), so scale 1 is no guidance.
    """
    return np.array([scale, 1 - scale], np.float32)


def frame_noise(
    seed: int, frame: int, shape: tuple[int, ...], call: int | None = None, out: np.ndarray | None = None
) -> np.ndarray:
    """N(0, 1) noise of one frame, a function of (seed, absolute frame, call) alone. `shape` float32

    call  None for the noise a frame is born with; k >= 0 for the fresh noise that a sampler adds at call k
    So a stream of N frames is the head of a longer one, and a resumed stream draws what it would have drawn.
    """
    counter = 0 if call is None else call + 1
    key = np.array([seed & (2**64 - 1), frame], np.uint64)  # an array, since a list would go through float64
    bits = np.random.Philox(key=key, counter=[0, 0, counter, 0])
    return np.random.Generator(bits).standard_normal(None if out is not None else shape, np.float32, out)


def rectified(level: float) -> tuple[float, float]:
    """x_t = (1 - t) x0 + t eps."""
    now = np.float32(level)
    return float(1 - now), float(now)


def _levels(level: Levels, level_next: Levels) -> tuple[np.ndarray, np.ndarray]:
    now, then = np.asarray(level, np.float32), np.asarray(level_next, np.float32)
    if now.ndim != 1 or now.shape != then.shape:
        raise ShapeError(f"[sampler] expected two arrays [frames] but got {now.shape} and {then.shape}")
    if np.any((then < 0) | (then > now) | (now > 1)):
        raise ConfigError(f"levels must fall and lie in [0, 1] but go from {now.tolist()} to {then.tolist()}")
    return now, then


def _held(
    now: np.ndarray, then: np.ndarray, sample: np.ndarray, prediction: np.ndarray, noise: np.ndarray
) -> Coefficients:
    """Coefficients in float32, exactly (1, 0, 0) where the level does not change."""
    held = now == then
    return Coefficients(
        np.where(held, 1, sample).astype(np.float32),
        np.where(held, 0, prediction).astype(np.float32),
        np.where(held, 0, noise).astype(np.float32),
    )


def _table(alpha_bar: Sequence[float] | np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    table = np.concatenate([[1.0], np.asarray(alpha_bar, np.float64)])  # [T + 1], entry 0 = clean
    return lambda level: table[np.rint(level * (len(table) - 1)).astype(np.int64)]
