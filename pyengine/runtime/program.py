"""Compiled networks in memory: one loaded variant, and the set of them that an executor binds."""

from __future__ import annotations

import copy
import re
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pyengine.backends.base import Engine
from pyengine.bundle.bundle import Bundle
from pyengine.bundle.variant import Variant
from pyengine.plans.plan import Part, Plan, graph, segments
from pyengine.runtime.executor import Executor

__all__ = ["LoadedVariant", "Program"]

# How an ONNX file says how many bytes of the weights file a tensor takes: an entry of the key `length`.
EXTERNAL_LENGTH = re.compile(rb"\x0a\x06length\x12[\x01-\x14]([0-9]+)")


@dataclass(frozen=True, eq=False)
class LoadedVariant:
    """One variant ready to run: its engines in the order of its segments, and the weights that our ops read. Threads share it.

    nbytes  an estimate of the memory it takes: its engine files and constants. A compiler may hold its weights once more in
            a layout of its own, which no file tells
    """

    part: Part
    engines: Sequence[Engine]
    constants: Mapping[str, Any]
    nbytes: int

    @classmethod
    def load(cls, plan: Plan, part: Part, engines: Sequence[Engine] | None = None) -> LoadedVariant:
        """Loads a part of a plan; `engines` where they are in memory already. Raises PlanError where they cannot be loaded."""
        made = plan.load(part) if engines is None else engines
        constants = {
            name: np.fromfile(
                plan.bundle.path(constant.file),
                constant.dtype,
                int(np.prod(constant.shape, dtype=np.int64)),
                offset=constant.offset,
            ).reshape(constant.shape)
            for name, constant in graph(
                plan.bundle.component(part.variant.component), part.choice
            ).constants.items()
        }
        nbytes = _engine_bytes(plan.bundle, part) + sum(array.nbytes for array in constants.values())
        return cls(part, made, constants, nbytes)


class Program:
    """The variants that a stream runs, with their engines and constants. Threads may share it.

    Variants stay loaded as long as a program that holds them is in use: an executor lets go of its program when it is closed.
    """

    variant_type = LoadedVariant

    def __init__(self, source: Plan, loaded: Mapping[Variant, LoadedVariant] | None = None) -> None:
        """`loaded` has every part of the plan; without it they are loaded here."""
        self.plan, self.bundle = source, source.bundle
        self.variants = tuple(source.parts)
        if loaded is None:
            load = self.variant_type.load
            loaded = {name: load(source, part, source.engines(name)) for name, part in source.parts.items()}
        self._loaded = dict(loaded)
        self._executors: list[weakref.ref[Executor]] = []

    def executor(self) -> Executor:
        """Makes an executor: the buffers of one more stream."""
        return Executor(self)

    def engines(self, variant: Variant) -> Sequence[Engine]:
        return self._loaded[variant].engines

    def constants(self, variant: Variant) -> Mapping[str, Any]:
        return self._loaded[variant].constants

    def bound(self, executor: Executor) -> None:
        """Counts the buffers of one more executor."""
        self._executors = [known for known in self._executors if known() is not None]
        self._executors.append(weakref.ref(executor))

    def emptied(self) -> Program:
        """Returns a program without variants, which a closed executor keeps so that the networks can be dropped."""
        empty = copy.copy(self)
        empty.variants, empty._loaded, empty._executors = (), {}, []
        return empty

    @property
    def buffer_bytes(self) -> int:
        """Bytes of the buffers of its open executors, on the host or the GPU."""
        executors = [known() for known in self._executors]
        return sum(executor.nbytes for executor in executors if executor is not None)


def _engine_bytes(bundle: Bundle, part: Part) -> int:
    """Bytes of the engines of a part: their files or, where a backend keeps none, the graphs with the weights they name."""
    total = 0
    steps = segments(bundle.component(part.variant.component), part.choice)
    files = part.engines or [None] * len(steps)
    for step, file in zip(steps, files, strict=True):
        if file is not None:
            total += _size(part.folder / file)
        else:
            data = bundle.path(str(step.file)).read_bytes()
            total += len(data) + sum(int(length) for length in EXTERNAL_LENGTH.findall(data))
    return total


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0  # removed by another process since it was loaded
