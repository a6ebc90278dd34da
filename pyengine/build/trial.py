"""Runs variants on this machine to find out which choice is faster, and whether streams of one run are independent."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pyengine.backends.base import Engine
from pyengine.bundle.manifest import TensorSpec
from pyengine.bundle.variant import Variant
from pyengine.plans.plan import Choice, Part, Plan
from pyengine.runtime.executor import APPEND_SLOT, Executor
from pyengine.runtime.host.memory import Arrays
from pyengine.runtime.open import load_program
from pyengine.runtime.program import Program

__all__ = ["rows_are_exact", "time_choices"]

TRIAL_SECONDS = 0.4  # per choice: enough runs to tell a 5 % difference, few enough for a cold start
TRIAL_RUNS = 20


def time_choices(
    plan: Plan, variant: Variant, candidates: Mapping[Choice, Sequence[Engine]]
) -> dict[str, float]:
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
    return {str(choice): float(np.median(values)) for choice, values in times.items()}


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
        if name != APPEND_SLOT:
            array[...] = _plausible(rng, name, array)
    for ring in executor.rings.values():
        ring[...] = _plausible(rng, "", ring)


def rows_are_exact(alone: Program, few: Variant, together: Program, many: Variant) -> bool:
    """Whether each stream of a run of `many` gives, to the bit, what it gives in a run of `few`, the same network at fewer streams:
    predictions, and what is appended to its ring.
    """
    size, rng = few.symbols["streams"], np.random.default_rng(0)
    with closing(alone.executor()) as one, closing(together.executor()) as other:
        inputs = {
            name: _plausible(rng, name, array)
            for name, array in other.inputs(many).items()
            if name != APPEND_SLOT
        }
        rings = [
            {name: _plausible(rng, "", ring) for name, ring in other.new_rings().items()}
            for _ in range(many.symbols["streams"])
        ]
        expected = []
        specs = alone.bundle.component(few.component).inputs
        for first in range(0, len(rings), size):
            streams = slice(first, first + size)
            part = {name: _streams_of(array, specs[name], streams) for name, array in inputs.items()}
            expected += _run(one, few, part, rings[streams])
        got = _run(other, many, inputs, rings)
    return all(_same(left, right) for left, right in zip(got, expected, strict=True))


def _run(
    executor: Executor, variant: Variant, inputs: Arrays, rings: Sequence[Arrays]
) -> list[dict[str, np.ndarray]]:
    """One run: for every stream its part of the outputs, and its rings afterwards."""
    component = executor.program.bundle.component(variant.component)
    # An inlined plan runs on the executor's own rings.
    is_alone = executor.program.plan.part(variant).choice == "inline"
    for name, array in inputs.items():
        executor.inputs(variant)[name][...] = array
    places = [executor.rings if is_alone else executor.new_rings() for _ in rings]
    for stream, (place, ring) in enumerate(zip(places, rings, strict=True)):
        for name, array in ring.items():
            place[name][...] = array
        if not is_alone:
            executor.attach(variant, stream, place)
    slots = executor.inputs(variant).get(APPEND_SLOT)
    if slots is not None:
        frames, kept = slots.shape[1], next(iter(rings[0].values())).shape[1]
        slots[...] = np.where(np.arange(frames) < kept, np.arange(frames), -1) * np.ones(
            slots.shape, np.int64
        )
    executor.run(variant)
    executor.synchronize()
    written = set(component.ring.values()) | set(component.state.values())
    outputs = {
        name: executor.output(variant, name).copy()
        for name, spec in component.outputs.items()
        if name not in written and spec.axis("streams") is not None
    }
    return [
        {
            name: _streams_of(array, component.outputs[name], slice(stream, stream + 1))
            for name, array in outputs.items()
        }
        | {name: np.array(ring.copy()) for name, ring in places[stream].items()}
        for stream in range(len(rings))
    ]


def _plausible(rng: np.random.Generator, name: str, array: Any) -> np.ndarray:
    """Values such as a network sees, of the shape and dtype of an input or a ring."""
    dtype, shape = np.dtype(getattr(array, "host_dtype", array.dtype)), tuple(array.shape)
    if name == "level":
        return np.linspace(0, 1, shape[-1], dtype=dtype) * np.ones(shape, dtype)
    if dtype == np.int64 and name.endswith("_index"):
        return np.arange(shape[-1]) * np.ones(shape, dtype)
    if dtype == np.uint16:  # bf16 is the upper half of a float32
        return (rng.standard_normal(shape, np.float32).view(np.uint32) >> 16).astype(np.uint16)
    if dtype in (np.float32, np.float16):
        return rng.standard_normal(shape, np.float32).astype(dtype)
    return np.ones(shape, dtype) if dtype in (np.bool_, np.uint8) else np.zeros(shape, dtype)


def _streams_of(array: np.ndarray, spec: TensorSpec, streams: slice) -> np.ndarray:
    axis = spec.axis("streams")
    return array if axis is None else array[(slice(None),) * axis + (streams,)]


def _same(left: Arrays, right: Arrays) -> bool:
    return all(
        np.array_equal(left[name], right[name], equal_nan=left[name].dtype.kind == "f") for name in left
    )
