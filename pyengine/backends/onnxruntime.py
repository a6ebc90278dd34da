"""ONNX Runtime on the CPU: runs portable files as they are, and the peer that every plan is compared with.
float32 only.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from pyengine.backends.base import Arrays, Ports, Precision, Symbols
from pyengine.errors import ConfigError, PlanError


class ONNXRuntimeEngine:
    """A session for fixed shapes."""

    def __init__(self, session: ort.InferenceSession) -> None:
        self.session = session

    def bind(self, inputs: Arrays, outputs: Arrays) -> Callable[[], object]:
        binding = self.session.io_binding()
        # By pointer: the arrays stay the caller's, and an output is written where the next step reads it.
        for port in self.session.get_inputs():
            array = _contiguous(inputs[port.name], port.name)
            binding.bind_input(port.name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        for port in self.session.get_outputs():
            array = _contiguous(outputs[port.name], port.name)
            binding.bind_output(port.name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        return _Run(partial(self.session.run_with_iobinding, binding), (*inputs.values(), *outputs.values()))


class _Run:
    """Keeps the bound arrays alive as long as the call that writes to them."""

    def __init__(self, call: Callable[[], object], arrays: tuple[np.ndarray, ...]) -> None:
        self._call, self._arrays = call, arrays

    def __call__(self) -> object:
        return self._call()


class ONNXRuntime:
    name = "onnxruntime"
    version = ort.__version__
    kind, remote = "cpu", False
    device = platform.processor() or platform.machine()

    def prepare(self, cache: Path, report: Callable[[str], object]) -> None:
        pass  # nothing is kept between compilations, and none takes long

    def facts(self) -> dict[str, Any]:
        return {}

    def precision(self, wanted: str) -> Precision:
        if wanted in ("auto", "fp32"):
            return "fp32"
        raise ConfigError(
            f"ONNX Runtime on the CPU runs precision fp32 but got {wanted!r}; use backend openvino for bf16"
        )

    def compile(
        self,
        model: Path,
        symbols: Symbols,
        inputs: Ports,
        outputs: Ports,
        precision: Precision,
        threads: int | None,
    ) -> ONNXRuntimeEngine:
        options = session_options(symbols, threads)
        try:
            session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exceptions share no base class
            raise PlanError(
                f"ONNX Runtime {self.version} cannot load {model.name}: {str(error).splitlines()[0]}"
            ) from error
        return ONNXRuntimeEngine(session)

    def save(self, engine: ONNXRuntimeEngine, path: Path) -> bool:
        return False  # loading the .onnx file is as fast

    def load(self, path: Path, precision: Precision, threads: int | None) -> ONNXRuntimeEngine:
        raise PlanError(f"ONNX Runtime saves no engines, so it cannot read {path}")


def session_options(symbols: Symbols, threads: int | None) -> ort.SessionOptions:
    """Options of a session for fixed sizes."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if threads:
        options.intra_op_num_threads = threads
    for name, size in symbols.items():
        options.add_free_dimension_override_by_name(name, size)
    return options


@cache
def backend() -> ONNXRuntime:
    return ONNXRuntime()


def _contiguous(array: np.ndarray, name: str) -> np.ndarray:
    if not array.flags.c_contiguous:
        raise PlanError(f"expected a contiguous array for {name}")
    return array
