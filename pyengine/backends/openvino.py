"""OpenVINO on the CPU: the default backend. bf16 where the machine multiplies it (AMX, AVX512-BF16), float32
elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from pyengine.backends.quiet import without_telemetry

with without_telemetry():
    import openvino as ov
    from openvino._pyopenvino import InferRequest as _InferRequest

from pyengine.backends.base import Arrays, Ports, Precision, Symbols
from pyengine.errors import ConfigError, PlanError

_TYPES = {
    "float32": ov.Type.f32,
    "bf16": ov.Type.bf16,
    "int64": ov.Type.i64,
    "uint8": ov.Type.u8,
    "bool": ov.Type.boolean,
}
DEVICE = "CPU"


class OpenVINOEngine:
    """A compiled model and the order of its ports. An imported model reads its weights from `blob`, so that
    must live as long.
    """

    def __init__(self, compiled: ov.CompiledModel, blob: np.ndarray | None = None) -> None:
        self.compiled, self._blob = compiled, blob
        self._inputs = [port.get_names() for port in compiled.inputs]
        self._outputs = [port.get_names() for port in compiled.outputs]

    def bind(self, inputs: Arrays, outputs: Arrays) -> Callable[[], object]:
        request = self.compiled.create_infer_request()
        for index, names in enumerate(self._inputs):
            request.set_input_tensor(index, _tensor(_pick(inputs, names), self.compiled.input(index)))
        for index, names in enumerate(self._outputs):
            request.set_output_tensor(index, _tensor(_pick(outputs, names), self.compiled.output(index)))
        # The pybind method itself: ov.InferRequest.infer would build and copy a dictionary of results at
        # every call.
        return partial(_InferRequest.infer, request, {}, True, False)


class OpenVINO:
    name = "openvino"
    version = ov.__version__
    kind, remote = "cpu", False

    def __init__(self) -> None:
        self.core = ov.Core()
        features = sorted(self.core.get_property(DEVICE, "OPTIMIZATION_CAPABILITIES"))
        self.device = " ".join((self.core.get_property(DEVICE, "FULL_DEVICE_NAME"), *features))

    def prepare(self, cache: Path, report: Callable[[str], object]) -> None:
        pass  # nothing is kept between compilations, and none takes long

    def facts(self) -> dict[str, Any]:
        return {}

    def precision(self, wanted: str) -> Precision:
        if wanted == "auto":
            return "bf16" if "BF16" in self.device else "fp32"
        if wanted == "bf16" or wanted == "fp32":
            return "bf16" if wanted == "bf16" else "fp32"
        raise ConfigError(f"expected precision auto, bf16 or fp32 but got {wanted!r}")

    def compile(
        self,
        model: Path,
        symbols: Symbols,
        inputs: Ports,
        outputs: Ports,
        precision: Precision,
        threads: int | None,
    ) -> OpenVINOEngine:
        try:
            graph = self.core.read_model(model)
            graph.reshape({name: ov.PartialShape(list(port.shape)) for name, port in inputs.items()})
            graph = _with_types(graph, inputs, outputs)
            return OpenVINOEngine(self.core.compile_model(graph, DEVICE, _options(precision, threads)))
        except RuntimeError as error:
            raise PlanError(
                f"OpenVINO {self.version} cannot compile {model.name}: {_first_line(error)}"
            ) from error

    def save(self, engine: OpenVINOEngine, path: Path) -> bool:
        path.write_bytes(engine.compiled.export_model().getbuffer())
        return True

    def load(self, path: Path, precision: Precision, threads: int | None) -> OpenVINOEngine:
        try:
            blob = np.memmap(path, np.uint8, "c")  # a private view: read from disk as needed
            model = self.core.import_model(
                ov.Tensor(blob, shared_memory=True), DEVICE, _options(precision, threads)
            )
            return OpenVINOEngine(model, blob)
        except (RuntimeError, OSError, ValueError) as error:
            raise PlanError(f"OpenVINO {self.version} cannot read {path}: {_first_line(error)}") from error


@cache
def backend() -> OpenVINO:
    """The one OpenVINO core of this process: cores do not share their compiled kernels."""
    return OpenVINO()


def _options(precision: Precision, threads: int | None) -> dict[str, object]:
    options: dict[str, object] = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
        "ENABLE_CPU_PINNING": False,  # our kernels and other streams want the same cores
    }
    if threads:
        options["INFERENCE_NUM_THREADS"] = threads
    return options


def _with_types(graph: ov.Model, inputs: Ports, outputs: Ports) -> ov.Model:
    """Makes the element types of the ports part of the graph, so that nothing is converted outside it."""
    prepost = ov.preprocess.PrePostProcessor(graph)
    for name, port in inputs.items():
        prepost.input(name).tensor().set_element_type(_TYPES[port.dtype])
    for name, port in outputs.items():
        prepost.output(name).tensor().set_element_type(_TYPES[port.dtype])
    return prepost.build()


def _pick(arrays: Arrays, names: set[str]) -> np.ndarray:
    """The array bound to a port, which may go by several names."""
    return next(arrays[name] for name in names if name in arrays)


def _tensor(array: np.ndarray, port: ov.Output) -> ov.Tensor:
    if tuple(array.shape) != tuple(port.shape):
        raise PlanError(
            f"expected an array {list(port.shape)} for {port.any_name} but got {list(array.shape)}; build "
            "the plan again"
        )
    if not array.flags.c_contiguous:
        raise PlanError(f"expected a contiguous array for {port.any_name}")
    return ov.Tensor(array, ov.Shape(array.shape), port.element_type)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
