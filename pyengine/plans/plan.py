"""What `build` writes and the executor reads: a bundle compiled for one backend, device, precision and set of
shapes.

A plan is made of parts, one per variant (a component with sizes for its symbols). A part is a folder in the
cache, `plan.json` and the compiled engines, named by a hash of everything that went into it; so a plan that
no longer fits is simply not found.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pyengine.backends import base as backends
from pyengine.backends.base import Backend, Engine, Port, Precision
from pyengine.bundle.bundle import Bundle, Component, Graph, Step, TensorSpec, sha256
from pyengine.bundle.variant import Variant
from pyengine.errors import PlanError

FORMAT = 1
FILE = "plan.json"
KEPT_DAYS = 60  # a part that no stream has asked for in so long is deleted by the next build
WORKERS = min(4, os.cpu_count() or 1)  # a compiler of small graphs uses about one core
Choice = Literal["cut", "inline"]
Ring = Literal["auto", "fp8"]


@dataclass(frozen=True)
class Part:
    """One variant, compiled. `seconds` holds the measured time of a run per choice, None where it was not
    tried or failed.
    """

    variant: Variant
    choice: Choice
    seconds: Mapping[str, float | None]
    engines: tuple[
        str | None, ...
    ]  # file of each segment of the choice; None: compiled from the bundle at load
    folder: Path


@dataclass
class Plan:
    """A bundle with its parts. `loaded` holds engines that are compiled in this process already."""

    bundle: Bundle
    backend: str
    precision: Precision
    threads: int | None
    parts: dict[Variant, Part]
    loaded: dict[Variant, list[Engine]] = field(default_factory=dict, repr=False)
    device: str = "cpu"  # or "cuda"
    target: str = ""  # the processor or card that it is compiled for
    ring: Ring = "auto"  # what keys and values are kept in; `auto`: the type of `working` tensors

    def engines(self, variant: Variant) -> list[Engine]:
        """The engines of a variant in the order of its segments, loaded once."""
        if variant not in self.loaded:
            self.loaded[variant] = self._load(self.part(variant))
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

    def _load(self, part: Part) -> list[Engine]:
        backend = backends.get(self.backend, self.device)
        segments = [step for step in self.graph(part.variant).steps if step.kind == "segment"]

        def load(step: Step, file: str | None) -> Engine:
            if file is None:
                return compile_segment(backend, self, part.variant, part.choice, step)
            return backend.load(part.folder / file, step_precision(step, self.precision), self.threads)

        with ThreadPoolExecutor(WORKERS) as pool:
            return list(pool.map(load, segments, part.engines))


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


def cache_folder(given: str | Path | None) -> Path:
    """Where plans live: the argument, else PYENGINE_CACHE, else the user's cache folder."""
    if folder := given or os.environ.get("PYENGINE_CACHE"):
        return Path(folder)
    import platformdirs  # here, so that a machine that names its folder can do without

    return Path(platformdirs.user_cache_dir("pyengine"))


def key(facts: Mapping[str, Any]) -> str:
    """The name of a part: a hash of everything that it depends on."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:20]


def scratch(folder: Path) -> Path:
    """A new folder beside `folder` to build in: nobody sees a part before it is whole."""
    path = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    path.mkdir(parents=True)
    return path


def publish(part: Part, facts: Mapping[str, Any], folder: Path) -> Part:
    """Completes the part in its scratch folder and renames it to `folder`. Of two builders the first wins,
    and both have a plan.
    """
    record = {
        "format": FORMAT,
        "facts": dict(facts),
        "choice": part.choice,
        "seconds": dict(part.seconds),
        "engines": [file and {"file": file, "sha256": sha256(part.folder / file)} for file in part.engines],
    }
    (part.folder / FILE).write_text(json.dumps(record, indent=1) + "\n")
    try:
        part.folder.rename(folder)
    except OSError:
        shutil.rmtree(part.folder, ignore_errors=True)  # another process was first
        return read(part.variant, folder)
    return Part(part.variant, part.choice, part.seconds, part.engines, folder)


def read(variant: Variant, folder: Path) -> Part:
    """The part in `folder`, every engine checked against its hash. Raises PlanError where it is damaged."""
    try:
        record = json.loads((folder / FILE).read_text())
        for entry in record["engines"]:
            if entry and sha256(folder / entry["file"]) != entry["sha256"]:
                raise PlanError(
                    f"the plan in {folder} is corrupt: the sha256 of {entry['file']} is not the recorded one"
                )
        files = tuple(entry["file"] if entry else None for entry in record["engines"])
        with contextlib.suppress(OSError):  # a cache that others own may be read-only
            os.utime(folder / FILE)  # `expire` keeps what is used
        return Part(variant, record["choice"], record["seconds"], files, folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PlanError(f"the plan in {folder} is corrupt ({error})") from error


def discard(folder: Path) -> None:
    """Removes a damaged part, also while another process removes it."""
    try:
        doomed = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
        folder.rename(doomed)
    except FileNotFoundError:
        return
    shutil.rmtree(doomed, ignore_errors=True)


def expire(folder: Path, days: float = KEPT_DAYS) -> list[Path]:
    """Removes the parts in `folder` that nobody read for `days`: those of earlier versions and other settings."""
    oldest = time.time() - days * 86400
    stale = [path.parent for path in folder.glob(f"*/{FILE}") if path.stat().st_mtime < oldest]
    for part in stale:
        discard(part)
    return stale
