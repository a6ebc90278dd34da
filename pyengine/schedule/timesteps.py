"""Integer timesteps of diffusion models with a table of training steps, and the levels that they stand at.

Timestep t of T stands at level (t + 1) / T; level 0 is clean. `schedule.samplers` works on levels.
"""

from collections.abc import Callable, Sequence

import numpy as np

from pyengine.errors import ConfigError

__all__ = ["TIMESTEPS", "leading_timesteps", "levels_of", "with_first_alpha"]

TIMESTEPS = 1000


def leading_timesteps(steps: int, timesteps: int = TIMESTEPS, offset: int = 1) -> np.ndarray:
    """The timesteps of `steps` calls in order, highest first: multiples of T // steps, `offset` added. [steps] int64

    Spacing "leading" of diffusers: 50 of 1000 are 981, 961, ..., 1.
    """
    if not 1 <= steps <= timesteps:
        raise ConfigError(f"steps must be from 1 to {timesteps} but is {steps}")
    found = np.arange(steps, dtype=np.int64)[::-1] * (timesteps // steps) + offset
    if found[0] >= timesteps:
        raise ConfigError(f"steps must leave room for the offset {offset} below {timesteps} but is {steps}")
    return found


def levels_of(found: Sequence[int] | np.ndarray, timesteps: int = TIMESTEPS) -> tuple[float, ...]:
    """The ladder of these timesteps, given highest first: lowest level first, 0 in front. [len + 1]"""
    return (0.0, *((int(t) + 1) / timesteps for t in reversed(np.asarray(found))))


def with_first_alpha(alphas: Sequence[float] | np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Level -> alpha bar, where the last step leads to that of timestep 0 rather than to 1 (`set_alpha_to_one` off in diffusers).

    So the last step of a stochastic sampler adds noise too, and what is called clean carries the noise of timestep 0.
    """
    table = np.asarray(alphas, np.float64)
    table = np.concatenate([table[:1], table])
    return lambda level: table[np.rint(np.asarray(level) * (len(table) - 1)).astype(np.int64)]
