"""DPM-Solver++(2M) as a sampler: one affine update per frame, with the clean latents of the step before (Lu et al. 2022,
arXiv:2211.01095, algorithm 2, in its midpoint form).

    D = (x - s p) / a                                                  what predicted noise p means; a x - s p for velocity
    x' = (s' / s) x + a' (1 - e^-h) (D + (D - D_before) / (2 r))       h = lambda' - lambda, r = (lambda - lambda_before) / h

with a^2 = alpha bar, s^2 = 1 - a^2 and lambda = ln(a / s). The first step has no D before it and is of first order; the last one gives D
itself, so that it ends clean: as DPMSolverMultistepScheduler of diffusers from 0.25 on.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import numpy as np

from pyengine.errors import ConfigError
from pyengine.schedule.samplers import Coefficients, Levels, Multistep, Prediction, Sampler, alphas_cumprod
from pyengine.schedule.timesteps import levels_of

__all__ = ["dpm_solver", "even_timesteps"]


def even_timesteps(steps: int, timesteps: int = 1000) -> np.ndarray:
    """The timesteps of `steps` calls in order, highest first, evenly from the last timestep towards 0, which is left out. [steps] int64

    Spacing "linspace" of diffusers: 50 of 1000 are 999, 979, ..., 20. Raises ConfigError.
    """
    if not 1 <= steps < timesteps:
        raise ConfigError(f"steps must be from 1 to {timesteps - 1} but is {steps}")
    return np.linspace(0, timesteps - 1, steps + 1).round()[:0:-1].astype(np.int64)


@lru_cache(maxsize=16)
def dpm_solver(
    betas: tuple[float, float], steps: int, timesteps: int = 1000, predicts: Prediction = "epsilon"
) -> Sampler:
    """The deterministic solver of so many steps from pure noise. `betas` as of `alphas_cumprod`. Made once: of equal arguments it is the
    same object.
    """
    found = even_timesteps(steps, timesteps)
    levels = levels_of(found, timesteps)[::-1]
    table = alphas_cumprod(*betas, timesteps)
    signal, share = np.sqrt(table[found]), np.sqrt(1 - table[found])
    updates = {
        (round(level * timesteps), round(after * timesteps)): _update(signal, share, step, predicts)
        for step, (level, after) in enumerate(pairwise(levels))
    }
    held = [1.0, 0.0, 0.0, 0.0, 0.0]

    def step_of(level: float, level_next: float) -> list[float]:
        if level == level_next:
            return held
        key = (round(level * timesteps), round(level_next * timesteps))
        if key not in updates:
            raise ConfigError(
                f"levels must be two neighbours of {levels} but go from {level} to {level_next}"
            )
        return updates[key]

    def update(level: Levels, level_next: Levels) -> Multistep:
        rows = [step_of(float(now), float(then)) for now, then in zip(level, level_next, strict=True)]
        sample, prediction, *kept = np.array(rows, np.float32).T
        return Multistep(Coefficients(sample, prediction, np.zeros_like(sample)), *kept)

    def noised(level: float) -> tuple[float, float]:
        bar = table[round(level * timesteps) - 1] if level > 0 else 1.0
        return float(bar**0.5), float((1 - bar) ** 0.5)

    return Sampler(update, noised)


def _update(signal: np.ndarray, share: np.ndarray, step: int, predicts: Prediction) -> list[float]:
    """Factors of x, of the prediction and of D before, and those of x and the prediction in D."""
    a, s = float(signal[step]), float(share[step])
    in_clean = (1 / a, -s / a) if predicts == "epsilon" else (a, -s)
    if step == len(signal) - 1:
        return [*in_clean, 0.0, *in_clean]
    around = slice(max(0, step - 1), step + 2)
    lambdas = np.log(signal[around] / share[around])
    h = float(lambdas[-1] - lambdas[-2])
    clean = float(-signal[step + 1] * np.expm1(-h))
    difference = 0.0 if step == 0 else clean * h / (2 * float(lambdas[1] - lambdas[0]))
    now = clean + difference
    return [float(share[step + 1]) / s + now * in_clean[0], now * in_clean[1], -difference, *in_clean]
