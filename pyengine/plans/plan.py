"""What `build` makes and the executor runs: a bundle compiled for one backend, device, precision and set of shapes.

A plan is made of parts, one per variant. `pyengine.plans.cache` keeps parts on disk.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pyengine.backends import base as backends
from pyengine.backends.base import Backend, Engine, Port, Precision
from pyengine.bundle.bundle import Bundle, Component, Graph, Step, TensorSpec
from pyengine.bundle.variant import Variant
from pyengine.errors import PlanError

WORKERS = min(4, os.cpu_count() or 1)  # a compiler of small graphs uses about one core
Choice = Literal["cut", "inline"]
Ring = Literal["auto", "fp8"]


@dataclass(frozen=True)
class Part:
    """One variant, compiled.

    seconds  measured time of a run per choice, None where it was not tried or failed
    engines  file of each segment of the choice; None: compiled from the bundle at load
    exact    whether each stream of a run gives, to the bit, what it gives in a run of fewer; None: not tried
    """

    variant: Variant
    choice: Choice
    seconds: Mapping[str, float | None]
    engines: tuple[str | None, ...]
    folder: Path
    exact: bool | None = None


@dataclass
class Plan:
    """A bundle with its parts. `loaded` holds engines that are compiled in this process already."""

    bundle: Bundle
    backend: str
    precision: Precision
    threads: int | None
    parts: dict[Variant, Part] = field(default_factory=dict)
    loaded: dict[Variant, list[Engine]] = field(default_factory=dict, repr=False)
    device: str = "cpu"  # or "cuda"
    target: str = ""  # the processor or GPU that it is compiled for
    ring: Ring = "auto"  # what keys and values are kept in; `auto`: the type of `working` tensors

    def engines(self, variant: Variant) -> list[Engine]:
        """The engines of a variant in the order of its segments, loaded once."""
        if variant not in self.loaded:
            self.loaded[variant] = self.load(self.part(variant))
        return self.loaded[variant]

    def part(self, variant: Variant) -> Part:
        if variant not in self.parts:
            raise PlanError(
                f"this plan has no variant {variant}, only {', '.join(map(str, self.parts)) or 'none'}; "
                "build it first"
            )
        return self.parts[variant]

    def graph(self, variant: Variant) -> Graph:
        """What a run of the variant does."""
        return graph(self.bundle.component(variant.component), self.part(variant).choice)

    def port(self, variant: Variant, spec: TensorSpec) -> Port:
        """The static shape of a tensor, and the dtype that it has in this plan."""
        dtype = backends.WORKING[self.precision] if spec.dtype == "working" else spec.dtype
        return Port(spec.resolve(variant.symbols), dtype)

    def ring_port(self, variant: Variant, spec: TensorSpec) -> Port:
        """The same of a ring of keys or values, which may be kept in less."""
        port = self.port(variant, spec)
        return Port(port.shape, "float8_e4m3") if self.ring == "fp8" else port

    def load(self, part: Part) -> list[Engine]:
        """Engines of a part, in the order of its segments, from its files or the bundle's. Raises PlanError."""
        backend = backends.get(self.backend, self.device)
        steps = segments(self.bundle.component(part.variant.component), part.choice)

        def load(step: Step, file: str | None) -> Engine:
            if file is None:
                return compile_segment(backend, self, part.variant, part.choice, step)
            return backend.load(part.folder / file, step_precision(step, self.precision), self.threads)

        with ThreadPoolExecutor(WORKERS) as pool:
            return list(pool.map(load, steps, part.engines))


def graph(component: Component, choice: Choice) -> Graph:
    """The form of a component that a choice runs."""
    if choice == "inline":
        return component.inline
    if component.cut is None:
        raise PlanError(
            f"component '{component.name}' has none of our ops, so it cannot be cut; use choice 'auto' or "
            "'inline'"
        )
    return component.cut


def segments(component: Component, choice: Choice) -> list[Step]:
    """The steps of a choice that a backend compiles."""
    return [step for step in graph(component, choice).steps if step.kind == "segment"]


def specs(component: Component, choice: Choice) -> dict[str, TensorSpec]:
    """Every tensor that a step of the choice reads or writes, by name."""
    return dict(graph(component, choice).tensors) | dict(component.inputs) | dict(component.outputs)


def compile_segment(backend: Backend, plan: Plan, variant: Variant, choice: Choice, step: Step) -> Engine:
    """Compiles one segment of a variant from the bundle."""
    known = specs(plan.bundle.component(variant.component), choice)
    inputs, outputs = (
        {name: plan.port(variant, known[name]) for name in names} for names in (step.inputs, step.outputs)
    )
    dims = {
        dim for name in (*step.inputs, *step.outputs) for dim in known[name].shape if isinstance(dim, str)
    }
    symbols = {dim: TensorSpec((dim,), "int64").resolve(variant.symbols)[0] for dim in sorted(dims)}
    precision = step_precision(step, plan.precision)
    return backend.compile(
        plan.bundle.path(str(step.file)), symbols, inputs, outputs, precision, plan.threads
    )


def step_precision(step: Step, wanted: Precision) -> Precision:
    return "fp32" if step.precision == "fp32" else wanted
