"""The multistep solver of StreamingT2V's second stage as a sampler: one affine update per frame, with what was kept of the step before.

`schedule.refinement` has it in its released form, on x at k-space sigma. Here latents are what the network is shown, z = x / c with
c = sqrt(1 + sigma^2), so that a call scales nothing. The network predicts v, which means the clean latents D = alpha z - s v:

    z' = (sample c z + (clean + difference) D - difference D_before + noise n) / c'
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pyengine.errors import ConfigError
from pyengine.schedule.refinement import solver_step, time_grid, vid2vid_sigmas
from pyengine.schedule.samplers import Coefficients, Levels, Multistep, Sampler

__all__ = ["Refinement", "refinement"]


class Refinement(NamedTuple):
    """The sampler, and the levels of its steps: from the noisiest down to 0. [steps + 1]"""

    sampler: Sampler
    levels: tuple[float, ...]


def refinement(steps: int, noise_levels: int, timesteps: int = 1000) -> Refinement:
    """DPM-Solver++(2M) SDE from timestep `noise_levels` - 1 down, on Vid2Vid-XL's noise levels. Timestep t stands at (t + 1) / timesteps.

    As released, a few numbers of steps become one more (`time_grid`). Raises ConfigError.
    """
    table = vid2vid_sigmas(timesteps)
    grid = time_grid(table, steps, noise_levels)
    count = len(grid.timesteps)
    index = {int(t): step for step, t in enumerate(grid.timesteps)}
    if len(index) < count:
        raise ConfigError(
            f"expected at most {noise_levels - 1} steps of {noise_levels} levels but got {steps}, which visit some twice"
        )
    levels = (*((int(t) + 1) / timesteps for t in grid.timesteps), 0.0)
    scale = np.sqrt(1 + grid.sigmas**2)
    updates = np.array([_update(table, grid.sigmas, scale, step, int(t)) for t, step in index.items()])
    held = np.array([1, 0, 0, 0, 0, 0], np.float64)
    share = table[noise_levels - 1]
    first = grid.sigmas[0] / scale[0]
    begins = (float(first * (1 - share**2) ** 0.5), float(first * share))

    def step_of(level: float, level_next: float) -> np.ndarray:
        if level == level_next:
            return held
        step = index.get(round(level * timesteps) - 1)
        if step is None or round(level_next * timesteps) != round(levels[step + 1] * timesteps):
            raise ConfigError(
                f"levels must be two neighbours of {levels} but go from {level} to {level_next}"
            )
        return updates[step]

    def update(level: Levels, level_next: Levels) -> Multistep:
        rows = [step_of(float(now), float(then)) for now, then in zip(level, level_next, strict=True)]
        sample, prediction, noise, *kept = np.array(rows, np.float32).T
        return Multistep(Coefficients(sample, prediction, noise), *kept)

    def noised(level: float) -> tuple[float, float]:
        if level != levels[0]:
            raise ConfigError(f"latents are noised to level {levels[0]} alone but {level} was asked for")
        return begins

    return Refinement(Sampler(update, noised), levels)


def _update(
    table: np.ndarray, sigmas: np.ndarray, scale: np.ndarray, step: int, timestep: int
) -> list[float]:
    solver, share = solver_step(sigmas, step), table[timestep]
    signal = (1 - share**2) ** 0.5
    clean = solver.clean + solver.difference
    sums = [solver.sample * scale[step] + clean * signal, -clean * share, solver.noise, -solver.difference]
    return [*(value / scale[step + 1] for value in sums), signal, -share]
