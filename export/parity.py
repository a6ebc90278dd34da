"""Is a bundle the network it was exported from? torch, portable ONNX and every plan, output by output.

    report = bundle_parity(bundle)     # any bundle
    report = parity(bundle, {"denoiser": (module, inputs)})
    print(report)                      # one row per output and runner
    report.check()                     # raises ParityError past tolerance

The measure is the largest error over the largest exact value. What is allowed is twice the error that torch
itself makes at that precision (float32, or bf16 autocast) against float64, plus the rounding of the stored
result. Where a family cannot make its torch modules again from a bundle, the portable ONNX in ONNX Runtime is what plans are
compared with, within fixed bounds.

A ring is one array inside a compiled segment, which serves one stream: where there is one, the inlined form is compared on the first
stream of the example, and the cut form on all of them, each with rings of its own.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pyengine.build.builder import build
from pyengine.bundle.bundle import Bundle, Component
from pyengine.bundle.variant import Variant
from pyengine.options import EngineOptions
from pyengine.plans.plan import Choice
from pyengine.runtime.program import Program

from .examples import example_inputs
from .families import family_of
from .graph import Inputs
from .runs import Arrays, flat, in_dtype, of_streams, run_plan, run_portable, run_torch, sizes_of

FLOOR = {"fp32": 1e-5, "bf16": 2**-8}
LEVEL_FLOOR = 1.01 / 255  # uint8 outputs: a value on the edge may round either way
# Allowed against the portable ONNX, where torch is not there to earn a bound. Seen in the small bundles: at most 1.5e-6 and 1.6e-2.
ALONE = {"fp32": 2e-5, "bf16": 2**-5}


class ParityError(AssertionError):
    """An output is further from torch than the tolerance allows."""


@dataclass(frozen=True)
class Row:
    component: str
    output: str
    runner: str
    precision: str
    max_error: float  # largest |difference|
    error: float  # the same over the largest |exact value|
    torch_error: float | None  # of torch at this precision; None: no torch modules
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # False for NaN

    def __str__(self) -> str:
        verdict = "ok" if self.passed else "FAIL"
        own = f"{'-':>11}" if self.torch_error is None else f"{self.torch_error:>11.2e}"
        return (
            f"{self.component:<25}{self.output:<18}{self.runner:<22}{self.precision:<6}{self.max_error:>11.2e}{self.error:>11.2e}"
            f"{own}{self.tolerance:>11.2e}  {verdict}"
        )


@dataclass(frozen=True)
class Report:
    rows: tuple[Row, ...]
    note: str = ""  # what the reader must know of the comparison

    @property
    def passed(self) -> bool:
        return all(row.passed for row in self.rows)

    def check(self) -> None:
        """Raises ParityError with the rows that fail."""
        failed = [str(row) for row in self.rows if not row.passed]
        if failed:
            raise ParityError(
                "\n".join([f"{len(failed)} of {len(self.rows)} outputs are past tolerance", *failed])
            )

    def __str__(self) -> str:
        numbers = "".join(f"{title:>11}" for title in ("max error", "relative", "torch", "allowed"))
        head = f"{'component':<25}{'output':<18}{'runner':<22}{'':<6}{numbers}"
        return "\n".join([*([self.note] if self.note else []), head, *map(str, self.rows)])


@dataclass(frozen=True)
class Reference:
    """What a component should give. `torch_outputs` by precision; None: `exact` is what the portable ONNX gives."""

    inputs: Arrays
    exact: Arrays
    torch_outputs: Mapping[str, Arrays] | None = None

    def of_streams(self, component: Component, count: int, streams: int) -> Reference:
        """The part of the first so many of `count` streams."""
        outputs = None
        if self.torch_outputs is not None:
            outputs = {
                precision: of_streams(arrays, component.outputs, count, streams)
                for precision, arrays in self.torch_outputs.items()
            }
        inputs = of_streams(self.inputs, component.inputs, count, streams)
        return Reference(inputs, of_streams(self.exact, component.outputs, count, streams), outputs)

    def row(self, component: str, name: str, got: np.ndarray, runner: str, precision: str) -> Row:
        """How far an output is from it, and how far it may be."""
        same = _same(got, self.exact[name])
        want = self.exact[name][same]
        is_image = want.dtype == np.uint8
        scale = 255.0 if is_image else float(np.abs(want).max()) or 1.0
        if self.torch_outputs is None:
            own, allowed = None, ALONE[precision] + (LEVEL_FLOOR if is_image else 0)
        else:
            own = _distance(self.torch_outputs[precision][name][same], want) / scale
            allowed = 2 * own + (LEVEL_FLOOR if is_image else FLOOR[precision])
        error = _distance(got, want)
        return Row(component, name, runner, precision, error, error / scale, own, allowed)


def bundle_parity(
    bundle: Bundle,
    *,
    backend: str = "openvino",
    precisions: Sequence[str] = ("fp32", "bf16"),
    cache_dir: str | Path | None = None,
) -> Report:
    """Compares every component of any bundle: with its family's torch modules, or with its own portable ONNX."""
    rebuild = family_of(bundle).rebuild
    if rebuild is not None:
        return parity(bundle, rebuild(bundle), backend=backend, precisions=precisions, cache_dir=cache_dir)
    references = {}
    for name, component in bundle.components.items():
        inputs = example_inputs(component)
        references[name] = Reference(inputs, run_portable(bundle, component, inputs))
    report = _report(bundle, references, backend, precisions, cache_dir)
    note = (
        f"family {bundle.family} cannot make its torch modules again from a bundle: plans are compared with the portable ONNX, "
        "within fixed bounds"
    )
    return replace(report, note=note)


def parity(
    bundle: Bundle,
    modules: Mapping[str, tuple[nn.Module, Inputs]],
    *,
    backend: str = "openvino",
    precisions: Sequence[str] = ("fp32", "bf16"),
    cache_dir: str | Path | None = None,
) -> Report:
    """Compares every component in `modules` (module and example keyword arguments).

    Plans are built in `cache_dir`, or thrown away without one.
    """
    references = {
        name: _torch_reference(bundle.component(name), module, inputs)
        for name, (module, inputs) in modules.items()
    }
    return _report(bundle, references, backend, precisions, cache_dir)


def _report(
    bundle: Bundle,
    references: Mapping[str, Reference],
    backend: str,
    precisions: Sequence[str],
    cache_dir: str | Path | None,
) -> Report:
    with tempfile.TemporaryDirectory() as scratch:
        given: dict[str, Any] = {"backend": backend, "cache_dir": cache_dir or scratch}
        options = EngineOptions(**given)
        rows = [
            row
            for name, reference in references.items()
            for row in _component_rows(bundle, bundle.component(name), reference, options, precisions)
        ]
    return Report(tuple(rows))


def _torch_reference(component: Component, module: nn.Module, inputs: Inputs) -> Reference:
    names = list(component.outputs)
    wide = copy.deepcopy(module).eval().double()
    exact = run_torch(wide, {key: in_dtype(value, torch.float64) for key, value in inputs.items()}, names)
    outputs = {"fp32": run_torch(module.eval(), inputs, names)}
    with torch.autocast("cpu", torch.bfloat16):
        outputs["bf16"] = run_torch(module, inputs, names)
    return Reference(flat(inputs), exact, outputs)


def _component_rows(
    bundle: Bundle,
    component: Component,
    reference: Reference,
    options: EngineOptions,
    precisions: Sequence[str],
) -> Iterator[Row]:
    count = sizes_of(component, reference.inputs).get("streams", 1)
    choices: list[Choice] = ["cut", "inline"] if component.cut else ["inline"]
    runs: list[tuple[str, str, Arrays, int]] = []
    if reference.torch_outputs is not None:
        runs.append(
            ("onnxruntime portable", "fp32", run_portable(bundle, component, reference.inputs), count)
        )
    for precision in precisions:
        for choice in choices:
            streams = 1 if component.ring and choice == "inline" else count
            inputs = of_streams(reference.inputs, component.inputs, count, streams)
            variant = Variant.of(component.name, **sizes_of(component, inputs))
            plan = build(bundle, variants=[variant], options=options, precision=precision, choice=choice)
            outputs = run_plan(Program(plan), variant, component, inputs)
            runs.append((f"{options.backend} {choice}", precision, outputs, streams))
    for runner, precision, outputs, streams in runs:
        part = reference.of_streams(component, count, streams)
        for name, got in outputs.items():
            yield part.row(component.name, name, got, runner, precision)


def _same(part: np.ndarray, whole: np.ndarray) -> tuple[slice, ...]:
    """What of `whole` is in `part`: all, or the frames that a ring has room for."""
    return tuple(slice(0, size) for size in part.shape) if part.ndim == whole.ndim else ()


def _distance(left: np.ndarray, right: np.ndarray) -> float:
    return float(np.abs(left.astype(np.float64) - right.astype(np.float64)).max())
