"""Times the choices of a variant on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from pyengine.backends.base import Engine
from pyengine.bundle.variant import Variant
from pyengine.plans.plan import Choice, Part, Plan
from pyengine.runtime.executor import Executor
from pyengine.runtime.open import load_program

__all__ = ["time_choices"]

TRIAL_SECONDS = 0.4  # per choice: enough runs to tell a 5 % difference, few enough for a cold start
TRIAL_RUNS = 20


def time_choices(
    plan: Plan, variant: Variant, candidates: Mapping[Choice, Sequence[Engine]]
) -> dict[Choice, float]:
    """Median seconds of a run of each choice, on real buffers, taking turns so that a disturbance meets both.

    plan  what the engines were compiled for; its parts do not matter
    """
    runs = {choice: _trial(plan, variant, choice, engines) for choice, engines in candidates.items()}
    times: dict[Choice, list[float]] = {choice: [] for choice in runs}
    for _ in range(2):
        for run in runs.values():
            run()
    deadline = time.perf_counter() + TRIAL_SECONDS * len(runs)
    for count in range(TRIAL_RUNS):
        if count >= 3 and time.perf_counter() >= deadline:
            break
        for choice, run in runs.items():
            start = time.perf_counter()
            run()
            times[choice].append(time.perf_counter() - start)
    return {choice: float(np.median(values)) for choice, values in times.items()}


def _trial(plan: Plan, variant: Variant, choice: Choice, engines: Sequence[Engine]) -> Callable[[], None]:
    part = Part(variant, choice, {}, (), Path())
    executor = load_program(replace(plan, parts={variant: part}, loaded={variant: list(engines)})).executor()
    _fill(executor, variant)

    def run() -> None:
        executor.run(variant)
        executor.synchronize()

    return run


def _fill(executor: Executor, variant: Variant) -> None:
    """Plausible inputs for timing: a full window of frames at rising levels behind a full ring."""
    rng = np.random.default_rng(0)
    for name, array in executor.inputs(variant).items():
        dtype, shape = np.dtype(getattr(array, "host_dtype", array.dtype)), array.shape
        if name == "level":
            array[...] = np.linspace(0, 1, shape[-1], dtype=dtype) * np.ones(shape, dtype)
        elif dtype == np.float32:
            array[...] = rng.standard_normal(shape, np.float32)
        elif dtype == np.int64 and name.endswith("_index"):
            array[...] = np.arange(shape[-1]) * np.ones(shape, dtype)
        elif dtype in (np.bool_, np.uint8):
            array[...] = np.ones(shape, dtype)
    for ring in executor.rings.values():
        if np.dtype(getattr(ring, "host_dtype", ring.dtype)) == np.float32:
            ring[...] = rng.standard_normal(tuple(ring.shape), np.float32)
