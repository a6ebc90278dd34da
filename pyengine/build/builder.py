"""Builds plans: compiles what a bundle ships, times the choices on this machine, keeps the faster, and
remembers it on disk.

plan = build(bundle, variants=[Variant.of("denoiser", frames=8, ring=8), Variant.of("decoder")])
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from pyengine import _C
from pyengine.backends import base as backends
from pyengine.backends.base import Backend, Engine, Precision
from pyengine.bundle.bundle import Bundle, Step
from pyengine.errors import BackendUnavailable, ConfigError, PlanError
from pyengine.plans import plan
from pyengine.plans.plan import Choice, Part, Plan, Variant
from pyengine.runtime.executor import Executor
from pyengine.runtime.open import load_program

Progress = Callable[[int, int, str], None]
CHOICES = ("auto", "cut", "inline")
RINGS = ("auto", "fp8")
TRIAL_SECONDS = 0.4  # per choice: enough runs to tell a 5 % difference, few enough for a cold start
TRIAL_RUNS = 20
log = logging.getLogger("pyengine")


def build(
    bundle: Bundle,
    *,
    variants: Sequence[Variant],
    backend: str = "openvino",
    device: str = "auto",
    precision: str = "auto",
    choice: str = "auto",
    cache_dir: str | Path | None = None,
    threads: int | None = None,
    target: str | None = None,
    refit: bool = False,
    ring: str = "auto",
    progress: Progress | None = None,
) -> Plan:
    """Finds or builds the part of every variant. `progress(done, total, what)` is called as engines are
    compiled.

    `choice`: `cut` runs our kernels between segments, `inline` lets the backend compile their ONNX bodies,
    `auto` times both. `target` builds for a card that is not here, as `sm89`: such a plan is only written, for the
    machine that has one. `refit` makes engines that take new weights without a rebuild. `ring="fp8"` keeps keys and values in 8 bits,
    which our CUDA kernels alone can read. Raises BackendUnavailable, ConfigError, PlanError.
    """
    if choice not in CHOICES:
        raise ConfigError(f"expected a choice out of {', '.join(CHOICES)} but got {choice!r}")
    if ring not in RINGS:
        raise ConfigError(f"expected a ring out of {', '.join(RINGS)} but got {ring!r}")
    compiler = backends.get(backend, device, target=target, refit=refit)
    if ring == "fp8":
        if compiler.kind != "cuda" or choice == "inline":
            where = f"choice {choice}" if compiler.kind == "cuda" else f"device {compiler.kind}"
            raise ConfigError(f"a ring in fp8 needs device cuda and our kernels (choice cut) but got {where}")
        choice = "cut"  # engines are those of any other ring: they never see it
    builder = _Builder(
        bundle, compiler, compiler.precision(precision), choice, threads, plan.cache_folder(cache_dir)
    )
    made = builder.run(list(dict.fromkeys(variants)), progress or (lambda done, total, what: None))
    made.ring = ring  # type: ignore[assignment]
    return made


@dataclass
class _Builder:
    bundle: Bundle
    backend: Backend
    precision: Precision
    choice: str
    threads: int | None
    cache: Path

    def run(self, variants: list[Variant], progress: Progress) -> Plan:
        result = self._plan({}, {})
        missing = []
        for variant in variants:
            part = self._find(variant)
            if part is None:
                missing.append(variant)
            else:
                result.parts[variant] = part
        if not self.backend.remote and any(self._is_stale(variant) for variant in missing):
            log.warning(
                "the plan of %s in %s is of another version or machine: building a new one",
                self.bundle.name,
                self.cache,
            )
        counter = _Counter(sum(self._count(variant) for variant in missing), progress)
        self.backend.prepare(self.cache, counter.say)
        for variant in missing:
            part, engines = self._build(variant, counter)
            result.parts[variant], result.loaded[variant] = part, engines
        if missing:
            plan.expire(self.cache / self.bundle.name)
        result.parts = {variant: result.parts[variant] for variant in variants}
        return result

    def _plan(self, parts: dict[Variant, Part], loaded: dict[Variant, list[Engine]]) -> Plan:
        return Plan(
            self.bundle,
            self.backend.name,
            self.precision,
            self.threads,
            parts,
            loaded,
            self.backend.kind,
            self.backend.device,
        )

    def _facts(self, variant: Variant) -> dict[str, Any]:
        processor = {
            "isa": _C.cpu_isa(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        }
        return {
            "bundle": self.bundle.digest,
            "variant": str(variant),
            "backend": self.backend.name,
            "backend_version": self.backend.version,
            "pyengine": _version(),
            "device": self.backend.device,
            "precision": self.precision,
            "threads": self.threads,
            "choice": self.choice,
            # Engines for a card do not depend on the machine around it.
            **(processor if self.backend.kind == "cpu" else {}),
            **self.backend.facts(),
            # A plan of inlined ops is of no use once there are kernels, nor a cut one where there are none.
            **({"kernels": False} if self._lacks_kernels(variant) else {}),
        }

    def _lacks_kernels(self, variant: Variant) -> bool:
        """Whether this installation could not run a cut plan that it would otherwise take into account."""
        here = self.backend.kind == "cuda" and not self.backend.remote and self.choice == "auto"
        return here and self.bundle.component(variant.component).cut is not None and not _has_kernels()

    def _folder(self, variant: Variant) -> Path:
        return self.cache / self.bundle.name / f"{variant}-{plan.key(self._facts(variant))}"

    def _find(self, variant: Variant) -> Part | None:
        folder = self._folder(variant)
        if not folder.exists():
            return None
        try:
            return plan.read(variant, folder)
        except PlanError as error:
            log.warning("%s: building it again", error)
            plan.discard(folder)
            return None

    def _is_stale(self, variant: Variant) -> bool:
        """Whether the cache holds the same plan for another version, bundle or machine."""
        facts = self._facts(variant)
        for path in self._folder(variant).parent.glob(f"{variant}-*/{plan.FILE}"):
            try:
                known = json.loads(path.read_text())["facts"]
            except (OSError, ValueError, KeyError, TypeError):
                continue
            if all(known.get(name) == facts[name] for name in ("backend", "precision", "threads", "choice")):
                return True
        return False

    def _choices(self, variant: Variant) -> list[Choice]:
        cut = self.bundle.component(variant.component).cut
        if cut is None:
            return ["inline"]
        if self.choice != "auto":
            return ["cut" if self.choice == "cut" else "inline"]
        if self.backend.remote:
            return ["cut"]  # nothing can be timed here, and our kernels are what the ops are for
        if self._lacks_kernels(variant):
            log.warning(
                "this installation has no CUDA kernels: plans are inlined; install it where nvcc is on the PATH"
            )
            return ["inline"]
        return ["cut", "inline"]

    def _count(self, variant: Variant) -> int:
        component = self.bundle.component(variant.component)
        return sum(
            step.kind == "segment"
            for choice in self._choices(variant)
            for step in plan.graph(component, choice).steps
        )

    def _build(self, variant: Variant, counter: _Counter) -> tuple[Part, list[Engine]]:
        choices = self._choices(variant)
        candidates: dict[Choice, list[Engine]] = {}
        failures: list[PlanError] = []
        for choice in choices:
            try:
                candidates[choice] = self._compile(variant, choice, counter)
            except PlanError as error:
                failures.append(error)
                log.info("%s cannot be built as %s: %s", variant, choice, error)
        if not candidates:
            raise failures[0]
        seconds: dict[str, float | None] = dict.fromkeys(choices)
        if len(candidates) > 1:
            counter.say(f"timing {variant}")
            seconds |= self._time(variant, candidates)
        best = min(candidates, key=lambda choice: seconds[choice] or 0.0)
        return self._publish(variant, best, seconds, candidates[best]), candidates[best]

    def _compile(self, variant: Variant, choice: Choice, counter: _Counter) -> list[Engine]:
        target = self._plan({}, {})
        component = self.bundle.component(variant.component)
        segments = [step for step in plan.graph(component, choice).steps if step.kind == "segment"]

        def compile_one(step: Step) -> Engine:
            engine = plan.compile_segment(self.backend, target, variant, choice, step)
            counter.done(f"compiling {step.file}")
            return engine

        with ThreadPoolExecutor(plan.WORKERS) as pool:
            return list(pool.map(compile_one, segments))

    def _time(self, variant: Variant, candidates: dict[Choice, list[Engine]]) -> dict[str, float]:
        """Median seconds of a run of each choice, on real buffers, taking turns so that a disturbance meets
        both.
        """
        runs = {choice: self._trial(variant, choice, engines) for choice, engines in candidates.items()}
        times: dict[str, list[float]] = {choice: [] for choice in runs}
        for _ in range(2):
            for run in runs.values():
                run()
        deadline = time.perf_counter() + TRIAL_SECONDS * len(runs)
        while len(times["cut"]) < 3 or (len(times["cut"]) < TRIAL_RUNS and time.perf_counter() < deadline):
            for choice, run in runs.items():
                start = time.perf_counter()
                run()
                times[choice].append(time.perf_counter() - start)
        return {choice: float(np.median(values)) for choice, values in times.items()}

    def _trial(self, variant: Variant, choice: Choice, engines: list[Engine]) -> Callable[[], None]:
        part = Part(variant, choice, {}, (), self.cache)
        executor = load_program(self._plan({variant: part}, {variant: engines})).executor()
        _fill(executor, variant)

        def run() -> None:
            executor.run(variant)
            executor.synchronize()

        return run

    def _publish(
        self, variant: Variant, choice: Choice, seconds: dict[str, float | None], engines: list[Engine]
    ) -> Part:
        folder = self._folder(variant)
        try:
            scratch = plan.scratch(folder)
            names = [f"{index}.engine" for index in range(len(engines))]
            files = [
                name if self.backend.save(engine, scratch / name) else None
                for name, engine in zip(names, engines, strict=True)
            ]
            return plan.publish(
                Part(variant, choice, seconds, tuple(files), scratch), self._facts(variant), folder
            )
        except OSError as error:
            # The plan in memory is good; only the next start will be slow.
            log.warning(
                "the plan for %s cannot be kept in %s (%s); set PYENGINE_CACHE to a writable folder",
                variant,
                folder,
                error,
            )
            return Part(variant, choice, seconds, (), folder)


def _has_kernels() -> bool:
    """Whether this installation can run our ops on a card."""
    from pyengine.runtime.cuda.ops import kernels

    try:
        kernels()
    except BackendUnavailable:
        return False
    return True


def _version() -> str:
    try:
        return metadata.version("pyengine-video")
    except metadata.PackageNotFoundError:
        return "source"  # run from a folder that was never installed


class _Counter:
    """Counts compiled engines for the caller's progress bar, which hears from one thread at a time."""

    def __init__(self, total: int, progress: Progress) -> None:
        self._count, self._total, self._progress = 0, total, progress
        self._lock = threading.Lock()

    def done(self, what: str) -> None:
        self._say(1, what)

    def say(self, what: str) -> None:
        self._say(0, what)

    def _say(self, more: int, what: str) -> None:
        with self._lock:
            self._count += more
            self._progress(self._count, self._total, what)


def _fill(executor: Executor, variant: Variant) -> None:
    """Plausible inputs for timing: a full window of frames at rising levels behind a full ring."""
    rng = np.random.default_rng(0)
    for name, array in executor.inputs(variant).items():
        dtype, shape = np.dtype(getattr(array, "host_dtype", array.dtype)), array.shape
        if dtype == np.float32 and len(shape) == 1:
            array[...] = np.linspace(0, 1, array.size, dtype=dtype)
        elif dtype == np.float32:
            array[...] = rng.standard_normal(shape, np.float32)
        elif dtype == np.int64 and name.endswith("_index"):
            array[...] = np.arange(array.size)
        elif dtype in (np.bool_, np.uint8):
            array[...] = np.ones(shape, dtype)
