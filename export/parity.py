"""Is a bundle the network it was exported from? torch, portable ONNX and every plan, output by output.

    report = parity(bundle, {"denoiser": (module, inputs)})
    print(report)                      # one row per output and runner
    report.check()                     # raises ParityError past tolerance

The measure is the largest error over the largest exact value. What is allowed is twice the error that torch
itself makes at that precision (float32, or bf16 autocast) against float64, plus the rounding of the stored
result.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor, nn

from pyengine.build.builder import build
from pyengine.bundle.bundle import Bundle, Component
from pyengine.bundle.variant import Variant
from pyengine.runtime.executor import APPEND_SLOT, Executor
from pyengine.runtime.program import Program

from .graph import Inputs

FLOOR = {"fp32": 1e-5, "bf16": 2**-8}
LEVEL_FLOOR = 1.01 / 255  # uint8 outputs: a value on the edge may round either way
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
    torch_error: float  # of torch at this precision
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # False for NaN

    def __str__(self) -> str:
        verdict = "ok" if self.passed else "FAIL"
        return (
            f"{self.component:<14}{self.output:<18}{self.runner:<22}{self.precision:<6}{self.max_error:>11.2e}{self.error:>11.2e}"
            f"{self.torch_error:>11.2e}{self.tolerance:>11.2e}  {verdict}"
        )


@dataclass(frozen=True)
class Report:
    rows: tuple[Row, ...]

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
        head = f"{'component':<14}{'output':<18}{'runner':<22}{'':<6}{numbers}"
        return "\n".join([head, *map(str, self.rows)])


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
    with tempfile.TemporaryDirectory() as scratch:
        rows = [
            row
            for name, (module, inputs) in modules.items()
            for row in _component_rows(
                bundle, bundle.component(name), module, inputs, backend, precisions, cache_dir or scratch
            )
        ]
    return Report(tuple(rows))


def _component_rows(
    bundle: Bundle,
    component: Component,
    module: nn.Module,
    inputs: Inputs,
    backend: str,
    precisions: Sequence[str],
    cache: str | Path,
) -> Iterator[Row]:
    names = list(component.outputs)
    wide = copy.deepcopy(module).eval().double()
    exact = _run_torch(wide, {key: _as(value, torch.float64) for key, value in inputs.items()}, names)
    torch_outputs = {"fp32": _run_torch(module.eval(), inputs, names)}
    with torch.autocast("cpu", torch.bfloat16):
        torch_outputs["bf16"] = _run_torch(module, inputs, names)
    arrays = _flat(inputs)
    variant = Variant.of(component.name, **_sizes(component, arrays))

    def rows(runner: str, precision: str, outputs: Arrays) -> Iterator[Row]:
        for name, got in outputs.items():
            want = exact[name][_same(got, exact[name])]
            own = torch_outputs[precision][name][_same(got, exact[name])]
            scale = 255.0 if want.dtype == np.uint8 else float(np.abs(want).max()) or 1.0
            floor = LEVEL_FLOOR if want.dtype == np.uint8 else FLOOR[precision]
            own_error, max_error = _distance(own, want) / scale, _distance(got, want)
            yield Row(
                component.name,
                name,
                runner,
                precision,
                max_error,
                max_error / scale,
                own_error,
                2 * own_error + floor,
            )

    yield from rows("onnxruntime portable", "fp32", _run_portable(bundle, component, arrays))
    for precision in precisions:
        for choice in ("cut", "inline") if component.cut else ("inline",):
            plan = build(
                bundle,
                variants=[variant],
                backend=backend,
                precision=precision,
                choice=choice,
                cache_dir=cache,
            )
            yield from rows(
                f"{backend} {choice}", precision, _run_plan(Program(plan), variant, component, arrays)
            )


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
        if name in component.state or name in component.ring:
            state[f"{component.name}/{name}"] = encode(array, state[f"{component.name}/{name}"].dtype)
        else:
            target = executor.input(variant, name)
            target[...] = encode(array, target.dtype)
    executor.load_state(state)
    slots = 0
    if component.ring:
        append = executor.input(variant, APPEND_SLOT)
        slots = min(append.size, arrays[next(iter(component.ring))].shape[1])
        append[:slots] = np.arange(slots)
    executor.run(variant)
    state = executor.state()
    outputs: Arrays = {}
    for name in component.outputs:
        source = next(
            (key for key, target in {**component.state, **component.ring}.items() if target == name), None
        )
        if source is None:
            outputs[name] = decode(executor.output(variant, name)).copy()
        elif slots or source in component.state:
            kept = decode(state[f"{component.name}/{source}"])
            outputs[name] = kept[:, :slots] if source in component.ring else kept
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
