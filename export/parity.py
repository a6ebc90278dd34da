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

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor, nn

from pyengine.build.builder import build
from pyengine.bundle.bundle import Bundle, Component, TensorSpec
from pyengine.bundle.variant import Variant
from pyengine.options import EngineOptions
from pyengine.plans.plan import Choice
from pyengine.runtime.executor import APPEND_SLOT, Executor
from pyengine.runtime.program import Program

from .examples import example_inputs
from .families import family_of
from .graph import Inputs

FLOOR = {"fp32": 1e-5, "bf16": 2**-8}
LEVEL_FLOOR = 1.01 / 255  # uint8 outputs: a value on the edge may round either way
ROWS = "branches*streams"
# Allowed against the portable ONNX, where torch is not there to earn a bound. Seen in the small bundles: at most 1.5e-6 and 1.6e-2.
ALONE = {"fp32": 2e-5, "bf16": 2**-5}
Arrays = dict[str, np.ndarray]


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
                precision: _of_streams(arrays, component.outputs, count, streams)
                for precision, arrays in self.torch_outputs.items()
            }
        inputs = _of_streams(self.inputs, component.inputs, count, streams)
        return Reference(inputs, _of_streams(self.exact, component.outputs, count, streams), outputs)

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
        references[name] = Reference(inputs, _run_portable(bundle, component, inputs))
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
        options = EngineOptions(**{"backend": backend, "cache_dir": cache_dir or scratch})
        rows = [
            row
            for name, reference in references.items()
            for row in _component_rows(bundle, bundle.component(name), reference, options, precisions)
        ]
    return Report(tuple(rows))


def _torch_reference(component: Component, module: nn.Module, inputs: Inputs) -> Reference:
    names = list(component.outputs)
    wide = copy.deepcopy(module).eval().double()
    exact = _run_torch(wide, {key: _as(value, torch.float64) for key, value in inputs.items()}, names)
    outputs = {"fp32": _run_torch(module.eval(), inputs, names)}
    with torch.autocast("cpu", torch.bfloat16):
        outputs["bf16"] = _run_torch(module, inputs, names)
    return Reference(_flat(inputs), exact, outputs)


def _component_rows(
    bundle: Bundle,
    component: Component,
    reference: Reference,
    options: EngineOptions,
    precisions: Sequence[str],
) -> Iterator[Row]:
    count = _sizes(component, reference.inputs).get("streams", 1)
    choices: list[Choice] = ["cut", "inline"] if component.cut else ["inline"]
    runs: list[tuple[str, str, Arrays, int]] = []
    if reference.torch_outputs is not None:
        runs.append(
            ("onnxruntime portable", "fp32", _run_portable(bundle, component, reference.inputs), count)
        )
    for precision in precisions:
        for choice in choices:
            streams = 1 if component.ring and choice == "inline" else count
            inputs = _of_streams(reference.inputs, component.inputs, count, streams)
            variant = Variant.of(component.name, **_sizes(component, inputs))
            plan = build(bundle, variants=[variant], options=options, precision=precision, choice=choice)
            outputs = _run_plan(Program(plan), variant, component, inputs)
            runs.append((f"{options.backend} {choice}", precision, outputs, streams))
    for runner, precision, outputs, streams in runs:
        part = reference.of_streams(component, count, streams)
        for name, got in outputs.items():
            yield part.row(component.name, name, got, runner, precision)


def _of_streams(arrays: Arrays, specs: Mapping[str, TensorSpec], count: int, streams: int) -> Arrays:
    """The part of the first so many of `count` streams."""
    if streams == count:
        return arrays
    found = {}
    for name, array in arrays.items():
        axis = specs[name].axis("streams")
        if axis is not None:
            found[name] = array.take(range(streams), axis)
        elif specs[name].axis(ROWS) == 0:
            kept = array.reshape(-1, count, *array.shape[1:])[:, :streams]
            found[name] = kept.reshape(-1, *array.shape[1:])
        else:
            found[name] = array
    return found


def _run_torch(module: nn.Module, inputs: Inputs, names: Sequence[str]) -> Arrays:
    with torch.no_grad():
        outputs = module(**inputs)
    flat: list[Tensor] = []
    for output in (outputs,) if isinstance(outputs, Tensor) else outputs:
        flat += [output] if isinstance(output, Tensor) else output
    plain = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor for tensor in flat)
    return {name: tensor.numpy() for name, tensor in zip(names, plain, strict=True)}


def _run_portable(bundle: Bundle, component: Component, arrays: Arrays) -> Arrays:
    session = ort.InferenceSession(bundle.path(component.portable), providers=["CPUExecutionProvider"])
    return dict(zip(component.outputs, session.run(list(component.outputs), arrays), strict=True))


def _run_plan(program: Program, variant: Variant, component: Component, arrays: Arrays) -> Arrays:
    """Outputs of one run. Those that go to a ring or a state are read there; a ring holds as many as it has
    slots.
    """
    executor = Executor(program)
    state = executor.state()
    for name, array in arrays.items():
        if name in component.state:
            state[f"{component.name}/{name}"] = encode(array, state[f"{component.name}/{name}"].dtype)
        elif name not in component.ring:
            target = executor.input(variant, name)
            target[...] = encode(array, target.dtype)
    executor.load_state(state)
    slots = 0
    rings: list[Mapping[str, np.ndarray]] = []
    if component.ring:
        append = executor.input(variant, APPEND_SLOT)
        streams, frames = append.shape
        slots = min(frames, arrays[next(iter(component.ring))].shape[1])
        append[...] = -1
        append[:, :slots] = np.arange(slots)
        rings = [executor.rings if streams == 1 else executor.new_rings() for _ in range(streams)]
        for stream, ring in enumerate(rings):
            for name in component.ring:
                given = arrays[name].reshape(-1, streams, *arrays[name].shape[1:])[:, stream]
                ring[name][...] = encode(given, ring[name].dtype)
            if streams > 1:
                executor.attach(variant, stream, ring)
    executor.run(variant)
    state = executor.state()
    outputs: Arrays = {}
    for name in component.outputs:
        source = next(
            (key for key, target in {**component.state, **component.ring}.items() if target == name), None
        )
        if source is None:
            outputs[name] = decode(executor.output(variant, name)).copy()
        elif source in component.state:
            outputs[name] = decode(state[f"{component.name}/{source}"])
        elif slots:
            # [branches, streams, ...]
            kept = np.stack([decode(ring[source])[:, :slots] for ring in rings], 1)
            outputs[name] = kept.reshape(-1, *kept.shape[2:])
    executor.close()
    return outputs


def encode(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """float32 as bf16 bit patterns where uint16 is asked for, rounded to nearest even; others are cast."""
    if dtype != np.uint16:
        return array.astype(dtype)
    return torch.from_numpy(np.ascontiguousarray(array, np.float32)).bfloat16().view(torch.uint16).numpy()


def decode(array: np.ndarray) -> np.ndarray:
    """bf16 bit patterns as float32."""
    return (array.astype(np.uint32) << 16).view(np.float32) if array.dtype == np.uint16 else array


def _flat(inputs: Inputs) -> Arrays:
    arrays: Arrays = {}
    for key, value in inputs.items():
        listed = (
            [(key, value)]
            if isinstance(value, Tensor)
            else [(f"{key}.{i}", tensor) for i, tensor in enumerate(value)]
        )
        arrays |= {name: tensor.numpy() for name, tensor in listed}
    return arrays


def _as(value: Tensor | Sequence[Tensor], dtype: torch.dtype) -> Tensor | list[Tensor]:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    return [tensor.to(dtype) for tensor in value]


def _sizes(component: Component, arrays: Arrays) -> dict[str, int]:
    pairs = (
        (dim, size)
        for name, spec in component.inputs.items()
        for dim, size in zip(spec.shape, arrays[name].shape, strict=True)
    )
    return {str(dim): size for dim, size in pairs if dim in component.symbols}


def _same(part: np.ndarray, whole: np.ndarray) -> tuple[slice, ...]:
    """What of `whole` is in `part`: all, or the frames that a ring has room for."""
    return tuple(slice(0, size) for size in part.shape) if part.ndim == whole.ndim else ()


def _distance(left: np.ndarray, right: np.ndarray) -> float:
    return float(np.abs(left.astype(np.float64) - right.astype(np.float64)).max())
