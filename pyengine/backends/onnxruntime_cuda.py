"""ONNX Runtime with its CUDA provider: the whole engine on a GPU without TensorRT.

Sessions read and write the executor's own device memory and run on one stream that we give them, so nothing crosses
to the host. They allocate and look things up as they run, so their calls are not captured in CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import onnxruntime as ort

from pyengine.backends.base import Ports, Precision, Symbols
from pyengine.backends.onnxruntime import session_options
from pyengine.device.array import DeviceArray
from pyengine.device.cuda import Stream, runtime
from pyengine.errors import BackendUnavailable, ConfigError, PlanError

PROVIDER = "CUDAExecutionProvider"
DEVICE = "cuda"
# dtype -> the number that ONNX gives it
ELEMENTS = {"float32": 1, "uint8": 2, "int32": 6, "int64": 7, "bool": 9, "float16": 10, "bfloat16": 16}


class ONNXRuntimeCudaEngine:
    """A session for fixed shapes on one stream."""

    arena_bytes = 0  # the provider has an arena of its own, shared by all sessions
    capturable = False

    def __init__(self, session: ort.InferenceSession, stream: Stream) -> None:
        self.session, self.stream = session, stream
        self._options = ort.RunOptions()
        # The run returns once its work is enqueued; our stream orders it before whatever reads the outputs.
        self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def bind(
        self,
        inputs: Mapping[str, DeviceArray],
        outputs: Mapping[str, DeviceArray],
        stream: Stream,
        arena: DeviceArray | None,
    ) -> Callable[[], object]:
        if stream.handle != self.stream.handle:
            raise PlanError("[onnxruntime] expected the stream that the session was made for but got another")
        binding = self.session.io_binding()
        for port in self.session.get_inputs():
            binding.bind_input(port.name, DEVICE, 0, *_place(inputs[port.name]))
        for port in self.session.get_outputs():
            binding.bind_output(port.name, DEVICE, 0, *_place(outputs[port.name]))
        return partial(self._run, binding, (*inputs.values(), *outputs.values()))

    def _run(self, binding: Any, held: object) -> None:
        try:
            self.session.run_with_iobinding(binding, self._options)
        except Exception as error:  # its exceptions share no base class
            raise PlanError(f"[onnxruntime] a segment could not run: {str(error).splitlines()[0]}") from error


class ONNXRuntimeCuda:
    name, kind, remote = "onnxruntime", "cuda", False
    version = ort.__version__

    def __init__(self) -> None:
        if PROVIDER not in ort.get_available_providers():
            raise BackendUnavailable(
                f"backend 'onnxruntime' on device cuda needs {PROVIDER}, which this onnxruntime {ort.__version__} was built "
                "without: pip uninstall onnxruntime, then pip install 'pyengine-video[cuda]'"
            )
        cuda = runtime()
        if hasattr(ort, "preload_dlls"):
            ort.preload_dlls()  # finds CUDA and cuDNN of NVIDIA's wheels
        self.device = f"{cuda.capability} {cuda.name}"
        self._stream = cuda.stream()

    def facts(self) -> dict[str, Any]:
        return {}

    def prepare(self, cache: Path, report: Callable[[str], object]) -> None:
        pass  # nothing is kept between sessions

    def precision(self, wanted: str) -> Precision:
        # Not bf16: its CUDA provider lacks convolutions in it.
        if wanted == "auto":
            return "fp16" if _typed_graph() else "fp32"
        if wanted == "fp16" or wanted == "fp32":
            return wanted  # type: ignore[return-value]
        raise ConfigError(
            f"ONNX Runtime on CUDA runs precision fp16 or fp32 but got {wanted!r}; bf16 needs tensorrt"
        )

    def compile(
        self,
        model: Path,
        symbols: Symbols,
        inputs: Ports,
        outputs: Ports,
        precision: Precision,
        threads: int | None,
    ) -> ONNXRuntimeCudaEngine:
        typed = _typed_graph()
        halves = any(port.dtype == "float16" for port in (*inputs.values(), *outputs.values()))
        if typed is None and (precision != "fp32" or halves):
            raise BackendUnavailable(
                "precision fp16 on backend 'onnxruntime' needs the package onnx: pip install onnx, or take precision fp32"
            )
        options = session_options(symbols, threads)
        # TF32 would round what is marked float32.
        provider = {"device_id": "0", "user_compute_stream": str(self._stream.handle), "use_tf32": "0"}
        try:
            graph: Any = model
            if typed is not None:  # fixed sizes, so that what only computes shapes folds away
                graph = typed(model, symbols, inputs, outputs, precision).SerializeToString()
            session = ort.InferenceSession(graph, options, providers=[(PROVIDER, provider)])
        except Exception as error:  # its exceptions share no base class
            raise PlanError(
                f"ONNX Runtime {self.version} cannot load {model.name}: {str(error).splitlines()[0]}"
            ) from error
        if PROVIDER not in session.get_providers():
            raise BackendUnavailable(
                f"ONNX Runtime {self.version} could not start {PROVIDER} (are CUDA and cuDNN there?): "
                "pip install 'onnxruntime-gpu[cuda,cudnn]'"
            )
        return ONNXRuntimeCudaEngine(session, self._stream)

    def save(self, engine: ONNXRuntimeCudaEngine, path: Path) -> bool:
        return False  # loading the .onnx file is as fast

    def load(self, path: Path, precision: Precision, threads: int | None) -> ONNXRuntimeCudaEngine:
        raise PlanError(f"ONNX Runtime saves no engines, so it cannot read {path}")


@cache
def backend() -> ONNXRuntimeCuda:
    """The one of this process: its sessions share a stream."""
    return ONNXRuntimeCuda()


def _typed_graph() -> Callable[..., Any] | None:
    """What writes fp16 into a graph, where onnx is installed."""
    try:
        from pyengine.backends.typed_graph import typed_graph
    except ImportError:
        return None
    return typed_graph


def _place(array: DeviceArray) -> tuple[Any, tuple[int, ...], int]:
    return ELEMENTS[array.dtype], array.shape, array.pointer
