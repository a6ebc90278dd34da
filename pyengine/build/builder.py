"""Builds plans: compiles what a bundle ships, times the choices on this machine, keeps the faster, and
remembers it on disk.

plan = build(bundle, variants=[Variant.of("denoiser", frames=8, ring=8), Variant.of("decoder")])
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from pyengine.backends import base as backends
from pyengine.backends.base import Engine
from pyengine.build.progress import Counter, Progress, unheard
from pyengine.build.trial import rows_are_exact, time_choices
from pyengine.bundle.bundle import Bundle, Step
from pyengine.bundle.variant import Variant
from pyengine.errors import BackendUnavailable, ConfigError, PlanError
from pyengine.options import EngineOptions
from pyengine.plans.cache import PlanCache, cache_folder, discard
from pyengine.plans.plan import WORKERS, Choice, Part, Plan, Ring, compile_segment, segments
from pyengine.processor import cores, instruction_set
from pyengine.runtime.open import load_variant
from pyengine.runtime.program import LoadedVariant, Program

__all__ = ["Builder", "Progress", "build"]

log = logging.getLogger("pyengine")


def build(
    bundle: Bundle,
    *,
    variants: Sequence[Variant],
    options: EngineOptions | None = None,
    target: str | None = None,
    progress: Progress | None = None,
    **given: Any,
) -> Plan:
    """Finds or builds the part of every variant. `progress(done, total, what)` is called as engines are
    compiled; `given` are fields of EngineOptions in place of `options`; `target` as of Builder.

    Raises BackendUnavailable, ConfigError, PlanError.
    """
    builder = Builder(
        bundle, EngineOptions(**given) if options is None else replace(options, **given), target
    )
    wanted = list(dict.fromkeys(variants))
    found = {variant: builder.find(variant) for variant in wanted}
    counter = Counter(progress or unheard)
    for variant, part in found.items():
        if part is None:
            counter.expect(variant, builder.count(variant))
    plan = builder.plan
    for variant, part in found.items():
        if part is None:
            part, engines = builder.make(variant, counter)
            if engines is not None:
                plan.loaded[variant] = engines
        plan.parts[variant] = part
    return plan


class Builder:
    """Finds, builds and loads variants of one bundle for one backend, device and set of options. Threads may share it.

    target  builds for a GPU that is not here, as `sm89`: such a plan is only written, for the machine that has one

    Raises BackendUnavailable, ConfigError.
    """

    def __init__(self, bundle: Bundle, options: EngineOptions, target: str | None = None) -> None:
        compiler = backends.get(options.backend, options.device, target=target, refit=options.refit)
        choice = options.choice
        if options.ring == "fp8":
            if compiler.kind != "cuda" or choice == "inline":
                where = f"choice {choice}" if compiler.kind == "cuda" else f"device {compiler.kind}"
                raise ConfigError(
                    f"a ring in fp8 needs device cuda and our kernels (choice cut) but got {where}"
                )
            choice = "cut"  # engines are those of any other ring: they never see it
        self.bundle, self.choice = bundle, choice
        self._backend, self._threads = compiler, options.threads
        self._precision = compiler.precision(options.precision)
        self._ring: Ring = options.ring
        self._cache = PlanCache(cache_folder(options.cache_dir), bundle)
        self._digest = bundle.digest
        self._warned: set[str] = set()

    @property
    def plan(self) -> Plan:
        """A plan of no parts yet."""
        backend = self._backend
        plan = Plan(self.bundle, backend.name, self._precision, self._threads)
        return replace(plan, device=backend.kind, target=backend.device, ring=self._ring)

    def find(self, variant: Variant) -> Part | None:
        """The part on disk; None where there is none that could be used."""
        return self._cache.find(variant, self._facts(variant))

    def is_kept(self, variant: Variant) -> bool:
        """Whether a part is on disk, be it usable or not."""
        return self._cache.has(variant, self._facts(variant))

    def load(self, variant: Variant, counter: Counter) -> LoadedVariant:
        """The variant, ready to run: found, or built. What the backend refuses to load is built again. Raises PlanError."""
        part = self.find(variant)
        if part is not None:
            try:
                return load_variant(self.plan, part)
            except PlanError as error:
                log.warning("%s: building it again", error)
                discard(part.folder)
        part, engines = self.make(variant, counter)
        return load_variant(self.plan, part, engines)

    def count(self, variant: Variant) -> int:
        """How many engines a build of the variant compiles."""
        component = self.bundle.component(variant.component)
        return sum(len(segments(component, choice)) for choice in self._choices(variant))

    def make(self, variant: Variant, counter: Counter) -> tuple[Part, list[Engine] | None]:
        """Builds a variant and keeps it on disk: its part, and the engines unless another process was first with another choice."""
        if not self._backend.remote and self._is_stale(variant):
            self._warn(
                f"the plan of {self.bundle.name} in {self._cache.root} is of another version or machine: building a new one"
            )
        counter.expect(variant, self.count(variant))
        self._backend.prepare(self._cache.root, counter.say)
        candidates = self._candidates(variant, counter)
        seconds: dict[str, float | None] = dict.fromkeys(self._choices(variant))
        if len(candidates) > 1:
            counter.say(f"timing {variant}")
            seconds |= time_choices(self.plan, variant, candidates)
        best = min(candidates, key=lambda choice: seconds[choice] or 0.0)
        engines = candidates[best]

        def save(folder: Path) -> tuple[str | None, ...]:
            names = [f"{index}.engine" for index in range(len(engines))]
            return tuple(
                name if self._backend.save(engine, folder / name) else None
                for name, engine in zip(names, engines, strict=True)
            )

        part = self._cache.publish(Part(variant, best, seconds, (), Path()), self._facts(variant), save)
        self._cache.expire()
        return part, engines if part.choice == best else None

    @property
    def threads(self) -> int | None:
        """Of the backend; None: all cores."""
        return self._threads

    def note_exact(self, alone: Program, few: Variant, together: Program, many: Variant) -> Part:
        """Tries whether each stream of a run gives what it gives alone, and writes it into the plan."""
        part = replace(together.plan.part(many), exact=rows_are_exact(alone, few, together, many))
        self._cache.note(part)
        return part

    def _candidates(self, variant: Variant, counter: Counter) -> dict[Choice, list[Engine]]:
        """The engines of every choice that compiles. Raises the first PlanError where none does."""
        candidates: dict[Choice, list[Engine]] = {}
        failures: list[PlanError] = []
        for choice in self._choices(variant):
            try:
                candidates[choice] = self._compile(variant, choice, counter)
            except PlanError as error:
                failures.append(error)
                log.info("%s cannot be built as %s: %s", variant, choice, error)
        if not candidates:
            raise failures[0]
        return candidates

    def _compile(self, variant: Variant, choice: Choice, counter: Counter) -> list[Engine]:
        plan = self.plan

        def compile_one(step: Step) -> Engine:
            engine = compile_segment(self._backend, plan, variant, choice, step)
            counter.done(f"compiling {step.file}")
            return engine

        with ThreadPoolExecutor(WORKERS) as pool:
            return list(pool.map(compile_one, segments(self.bundle.component(variant.component), choice)))

    def _choices(self, variant: Variant) -> list[Choice]:
        component = self.bundle.component(variant.component)
        if component.cut is None:
            return ["inline"]
        if component.ring and variant.symbols.get("streams", 1) > 1:
            if self.choice == "inline":
                raise ConfigError(
                    f"expected choice auto or cut for {variant}, since a compiled segment cannot find the rings of several streams, "
                    "but got 'inline'"
                )
            return ["cut"]
        if self.choice != "auto":
            return ["cut" if self.choice == "cut" else "inline"]
        if self._backend.remote:
            return ["cut"]  # nothing can be timed here, and our kernels are what the ops are for
        if self._lacks_kernels(variant):
            self._warn(
                "this installation has no CUDA kernels: plans are inlined; install it where nvcc is on the PATH"
            )
            return ["inline"]
        return ["cut", "inline"]

    def _lacks_kernels(self, variant: Variant) -> bool:
        """Whether this installation could not run a cut plan that it would otherwise take into account."""
        here = self._backend.kind == "cuda" and not self._backend.remote and self.choice == "auto"
        return here and self.bundle.component(variant.component).cut is not None and not _has_kernels()

    def _facts(self, variant: Variant) -> dict[str, Any]:
        """Everything that a part depends on."""
        processor = {
            "isa": instruction_set(),
            "cores": cores(),
        }
        return {
            "bundle": self._digest,
            "variant": str(variant),
            "backend": self._backend.name,
            "backend_version": self._backend.version,
            "pyengine": _version(),
            "device": self._backend.device,
            "precision": self._precision,
            "threads": self._threads,
            "choice": self.choice,
            # Engines for a GPU do not depend on the machine around it.
            **(processor if self._backend.kind == "cpu" else {}),
            **self._backend.facts(),
            # A plan of inlined ops is of no use once there are kernels, nor a cut one where there are none.
            **({"kernels": False} if self._lacks_kernels(variant) else {}),
        }

    def _is_stale(self, variant: Variant) -> bool:
        """Whether the cache holds the same plan for another version, bundle or machine."""
        facts = self._facts(variant)
        names = ("backend", "precision", "threads", "choice")
        return any(
            all(known.get(name) == facts[name] for name in names)
            for known in self._cache.facts(variant)
            if known != facts
        )

    def _warn(self, message: str) -> None:
        """Says a thing once, however many variants it is true of."""
        if message not in self._warned:
            self._warned.add(message)
            log.warning("%s", message)


def _has_kernels() -> bool:
    """Whether this installation can run our ops on a GPU."""
    from pyengine.runtime.cuda.ops import kernels

    try:
        kernels()
    except BackendUnavailable:
        return False
    return True


@cache
def _version() -> str:
    try:
        return metadata.version("pyengine-video")
    except metadata.PackageNotFoundError:
        return "source"  # run from a folder that was never installed
