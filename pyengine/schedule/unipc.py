"""UniPC (Zhao et al. 2023, arXiv:2302.04867) of order 2 with B2(h), x0 prediction, on rectified flow: LongLive 2.0's solver.

A step from sigma a to b, with lambda = ln(1 - sigma) - ln(sigma), h = lambda_b - lambda_a, E = exp(-h) - 1 and m = x + sigma v:

    base(y) = (b / a) y - (1 - b) E m
    predicted   base(corrected x) - (1 - b) E D / 2            D: the difference of m to the one before, over its share of h; order 2
    corrected   base(corrected x) - (1 - b) E (rho1 D + rho2 (m_b - m))

The last step gives m. Predicted and corrected x have the same base, so a step is affine in x, v and the two m before: the corrected x is
never kept. Of four steps or fewer one sum of these m is all that is remembered, so a step is a `Multistep`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pyengine.errors import ConfigError
from pyengine.schedule.samplers import Coefficients, Levels, Multistep, Sampler, rectified

__all__ = ["MOST_STEPS", "unipc"]

MOST_STEPS = 4  # beyond, two sums would have to be remembered
_HELD = (1.0, 0.0, 0.0, 0.0, 0.0, 0.0)


def unipc(levels: Sequence[float]) -> Sampler:
    """The sampler of a ladder, 0 first. Raises ConfigError for one that ends at 1, where lambda is infinite, or of more than 4 steps."""
    sigmas = np.asarray(levels, np.float64)[::-1]
    steps = len(sigmas) - 1
    if steps > MOST_STEPS or sigmas[0] >= 1:
        raise ConfigError(
            f"sampler 'unipc' needs a ladder of at most {MOST_STEPS} steps that ends below 1 but it has {steps} up to {sigmas[0]:g}"
        )
    numbers = {float(np.float32(level)): step for step, level in enumerate(sigmas[:-1])}
    followers = [float(np.float32(level)) for level in sigmas[1:]]
    updates = _updates(sigmas)

    def step_of(level: float, level_next: float) -> Sequence[float]:
        if level == level_next:
            return _HELD
        step = numbers.get(level)
        if step is None or followers[step] != level_next:
            raise ConfigError(
                f"levels must be two neighbours of {levels} but go from {level} to {level_next}"
            )
        return updates[step]

    def update(level: Levels, level_next: Levels) -> Multistep:
        now, then = (np.asarray(side, np.float32).tolist() for side in (level, level_next))
        sample, prediction, *kept = np.array(
            [step_of(*pair) for pair in zip(now, then, strict=True)], np.float32
        ).T
        return Multistep(Coefficients(sample, prediction, np.zeros_like(sample)), *kept)

    return Sampler(update, rectified)


def _updates(sigmas: np.ndarray) -> list[tuple[float, ...]]:
    """Of every step: scales of x and v, of what was kept, and of x, v and what was kept in what is kept for the next."""
    steps = len(sigmas) - 1
    sums = [_step(sigmas, step) for step in range(steps)]
    made: list[tuple[float, ...]] = []
    for step, (x, v, before, _) in enumerate(sums):
        # What is kept is m itself at first, then the sum of it and of that before it which the next step reads.
        kept = (0.0, 0.0, 0.0)
        if step == 0:
            kept = (1.0, float(sigmas[0]), 0.0)
        elif step + 1 < steps:
            own, older = sums[step + 1][2:]
            kept = (own, own * float(sigmas[step]), older)
        made.append((x, v, before if step == 1 else float(step > 1), *kept))
    if steps > 1:
        made[-1] = (*made[-1][:2], 0.0, 0.0, 0.0, 0.0)  # the last step reads nothing and leaves nothing
    return made


def _step(sigmas: np.ndarray, step: int) -> tuple[float, float, float, float]:
    """Step `step` as a sum: scales of x, v, the m before and the m before that."""
    steps = len(sigmas) - 1
    # As vectors over (x, v, m before, m before that).
    x, before, older = np.eye(4)[0], np.eye(4)[2], np.eye(4)[3]
    m = np.array([1.0, sigmas[step], 0.0, 0.0])
    if step == steps - 1:
        return _numbers(m)
    corrected = x
    if step:
        shrink, ratio = _shrink(sigmas, step - 1), _ratio(sigmas, step - 1)
        if _order(steps, step - 1) == 1:
            corrected = x - shrink * (m - before) / 2
        else:
            difference = (older - before) / ratio
            first, second = _corrector(sigmas, step - 1, ratio)
            corrected = x + shrink * difference / 2 - shrink * (first * difference + second * (m - before))
    shrink = _shrink(sigmas, step)
    then = sigmas[step + 1] / sigmas[step] * corrected - shrink * m
    if _order(steps, step) == 2:
        then = then - shrink * (before - m) / _ratio(sigmas, step) / 2
    return _numbers(then)


def _order(steps: int, step: int) -> int:
    return min(2, step + 1, steps - step)


def _lambda(sigmas: np.ndarray, step: int) -> float:
    return float(np.log(1 - sigmas[step]) - np.log(sigmas[step]))


def _length(sigmas: np.ndarray, step: int) -> float:
    return _lambda(sigmas, step + 1) - _lambda(sigmas, step)


def _shrink(sigmas: np.ndarray, step: int) -> float:
    """(1 - sigma at its end) E of a step."""
    return float((1 - sigmas[step + 1]) * np.expm1(-_length(sigmas, step)))


def _ratio(sigmas: np.ndarray, step: int) -> float:
    """Where the step before began, in lengths of this one: negative."""
    return (_lambda(sigmas, step - 1) - _lambda(sigmas, step)) / _length(sigmas, step) if step else -1.0


def _corrector(sigmas: np.ndarray, step: int, ratio: float) -> tuple[float, float]:
    """The two weights of the corrector of order 2."""
    length = _length(sigmas, step)
    expm = np.expm1(-length)
    first = expm / -length - 1
    second = first / -length - 0.5
    weights = np.linalg.solve(np.array([[1.0, 1.0], [ratio, 1.0]]), np.array([first, 2 * second]) / expm)
    return float(weights[0]), float(weights[1])


def _numbers(vector: np.ndarray) -> tuple[float, float, float, float]:
    x, v, before, older = (float(value) for value in vector)
    return x, v, before, older
