"""TensorRT 10.14 and later, 11.x, and TensorRT for RTX, through one set of calls.

Networks are strongly typed: precision is written into the graph before it is parsed (`typed_graph.py`, needs onnx, at
build only). TensorRT for RTX compiles for a GPU that is not here: `backend(target="sm89")`. Activations live in memory
that the executor lends; weights can be exchanged without a rebuild where engines were built for that (`refit=True`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from pyengine.backends.base import Ports, Precision, Symbols
from pyengine.backends.engine_cache import EngineCache, describe, link, read_description, write
from pyengine.device.array import DeviceArray
from pyengine.errors import BackendUnavailable, ConfigError, PlanError

# In the order of preference, and the least version.
LIBRARIES = {
    "tensorrt": (10, 14),
    "tensorrt_rtx": (1, 0),
}
INSTALL = "pip install 'pyengine-video[tensorrt]'"
# Tactics are chosen by their times on the GPU, so one build at a time in this process; for RTX nothing is timed.
TIMING = threading.Lock()
log = logging.getLogger("pyengine")


@cache
def library(name: str | None = None) -> ModuleType:
    """TensorRT, or TensorRT for RTX where that is what is installed or PYENGINE_TENSORRT names. Raises BackendUnavailable."""
    name = name or os.environ.get("PYENGINE_TENSORRT")
    if name is not None and name not in LIBRARIES:
        raise ConfigError(f"expected PYENGINE_TENSORRT to be one of {', '.join(LIBRARIES)} but got {name!r}")
    for known in (name,) if name else LIBRARIES:
        try:
            module = import_module(known)
            version = tuple(int(part) for part in module.__version__.split(".")[:2])
        except (ImportError, AttributeError):  # PyPI's `tensorrt` alone is an empty shell
            continue
        if version < LIBRARIES[known]:
            least = ".".join(map(str, LIBRARIES[known]))
            raise BackendUnavailable(
                f"backend 'tensorrt' needs {known} {least} or newer but found {module.__version__}: {INSTALL}"
            )
        return module
    raise BackendUnavailable(f"backend 'tensorrt' needs the package {name or 'tensorrt-rtx'}: {INSTALL}")


def backend(target: str | None = None, refit: bool = False) -> TensorRT:
    """For the GPU of this machine, or for another: `sm89`."""
    return TensorRT(target, refit)


class TensorRT:
    name, kind = "tensorrt", "cuda"

    def __init__(self, target: str | None, refit: bool) -> None:
        if target and refit:
            raise ConfigError(
                "engines that take new weights can only be built beside their GPU, since the compiler needs its driver "
                "for them: leave out target or refit"
            )
        self.trt = trt = library("tensorrt_rtx" if target else None)
        self.remote, self.refit = target is not None, refit
        self.for_rtx = trt.__name__ == "tensorrt_rtx"
        self.version = f"{trt.__name__} {trt.__version__}"
        if target is not None:
            self.device = _check_target(trt, target)
        else:
            from pyengine.device.cuda import runtime

            gpu = runtime()
            # Engines for RTX are finished on the GPU that runs them; others belong to the model they were timed on.
            self.device = gpu.capability if self.for_rtx else f"{gpu.capability} {gpu.name}"
        self._log = _logger(trt)
        self._cache: EngineCache | None = None
        self._report: Callable[[str], object] = lambda what: None
        self._lock = threading.Lock()
        self._timing: Any = None
        self._building: Any = nullcontext() if self.for_rtx else TIMING

    def facts(self) -> dict[str, Any]:
        return {"refit": self.refit}

    def prepare(self, cache: Path, report: Callable[[str], object]) -> None:
        self._cache, self._report = EngineCache(cache / "tensorrt", self.version, self.device), report

    def precision(self, wanted: str) -> Precision:
        if wanted == "auto":
            return "fp16" if self.device.startswith("sm7") else "bf16"
        if wanted == "bf16" or wanted == "fp16" or wanted == "fp32":
            return wanted  # type: ignore[return-value]
        raise ConfigError(f"expected precision auto, bf16, fp16 or fp32 but got {wanted!r}")

    def compile(
        self,
        model: Path,
        symbols: Symbols,
        inputs: Ports,
        outputs: Ports,
        precision: Precision,
        threads: int | None,
    ) -> TensorRTEngine:
        try:
            from pyengine.backends.typed_graph import typed_graph, weights
        except ImportError as error:
            raise BackendUnavailable(
                f"building TensorRT engines needs the package onnx: {INSTALL}"
            ) from error
        try:
            typed = typed_graph(model, symbols, inputs, outputs, precision)
        except (ValueError, KeyError) as error:
            raise PlanError(
                f"{model.name} cannot be given the types of a {precision} plan ({error})"
            ) from error
        graph, content = hashlib.sha256(), hashlib.sha256()
        for name, data in weights(typed):
            content.update(name.encode() + data)
        whole = typed.SerializeToString()
        for tensor in typed.graph.initializer:
            tensor.ClearField("raw_data")
        graph.update(
            typed.SerializeToString(deterministic=True) + json.dumps([self.refit, precision]).encode()
        )
        facts = describe(self.version, self.device, self.refit, inputs, outputs)
        cached = self._cache
        if cached is not None:
            found = cached.find(graph.hexdigest(), content.hexdigest())
            if found is not None:
                return TensorRTEngine(self, None, facts, found)
            other = cached.other_weights(graph.hexdigest()) if self.refit and not self.remote else None
            if other is not None:
                engine = TensorRTEngine(self, None, facts, other)
                engine.refit(whole)
                self._report(f"{model.name}: new weights in a known engine")
                engine.keep(cached.keep(graph.hexdigest(), content.hexdigest(), engine.data))
                return engine
        with self._building:
            data = self._build(model.name, whole, threads)
        engine = TensorRTEngine(self, data, facts, None)
        if cached is not None:
            engine.keep(cached.keep(graph.hexdigest(), content.hexdigest(), data))
        return engine

    def save(self, engine: TensorRTEngine, path: Path) -> bool:
        link(engine.file, path, lambda: engine.data)
        path.with_suffix(".json").write_text(json.dumps(engine.facts, indent=1) + "\n")
        return True

    def load(self, path: Path, precision: Precision, threads: int | None) -> TensorRTEngine:
        facts = read_description(path.with_suffix(".json"))
        if (facts["version"], facts["device"]) != (self.version, self.device):
            raise PlanError(
                f"the engine {path} is for {facts['version']} on {facts['device']} but here is {self.version} on "
                f"{self.device}; build the plan again"
            )
        return TensorRTEngine(self, None, facts, path)

    def _build(self, what: str, model: bytes, threads: int | None) -> bytes:
        trt = self.trt
        builder = trt.Builder(self._log)
        if threads:
            builder.max_threads = threads
        typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # the only kind since 11
        network = builder.create_network(0 if typed is None else 1 << int(typed))
        parser = trt.OnnxParser(network, self._log)
        if not parser.parse(model):
            reason = parser.get_error(0).desc() if parser.num_errors else "no reason given"
            raise PlanError(f"{self.version} cannot parse {what}: {reason.splitlines()[0]}")
        config = builder.create_builder_config()
        config.clear_flag(trt.BuilderFlag.TF32)  # what is marked float32 is meant
        if self.refit:
            config.set_flag(trt.BuilderFlag.REFIT)
        if self.for_rtx:
            # A capability that this version does not list is left to its default, which is portable from 8.0 on.
            capability = trt.ComputeCapability.__members__.get(self.device.upper())
            if capability is not None:
                config.num_compute_capabilities = 1
                config.set_compute_capability(capability, 0)
        config.progress_monitor = monitor = _monitor(trt)(what, self._report)
        self._use_timing_cache(config)
        engine = builder.build_serialized_network(network, config)
        del monitor
        if engine is None:
            raise PlanError(f"{self.version} cannot build {what}: {self._log.last or 'no reason given'}")
        self._keep_timing_cache()
        return bytes(engine)

    def _use_timing_cache(self, config: Any) -> None:
        """One for all builds of this version on this GPU: what was timed once is not timed again."""
        if self._cache is None:
            return
        with self._lock:
            if self._timing is None:
                self._timing = config.create_timing_cache(self._cache.timing())
            config.set_timing_cache(self._timing, False)

    def _keep_timing_cache(self) -> None:
        if self._cache is not None and self._timing is not None:
            with self._lock:
                self._cache.keep_timing(bytes(self._timing.serialize()))


class TensorRTEngine:
    """A serialised engine, loaded when it is first needed: a plan for another GPU is never loaded here. What is on disk is not
    kept in memory as well: the engines of one large model together are as large as the model.
    """

    capturable, stream = True, None

    def __init__(
        self, owner: TensorRT, data: bytes | None, facts: Mapping[str, Any], file: Path | None
    ) -> None:
        self.owner, self._data, self.facts, self.file = owner, data, facts, file
        self._lock = threading.Lock()
        self._loaded: Any = None

    @property
    def data(self) -> bytes:
        if self._data is not None:
            return self._data
        assert self.file is not None
        try:
            return self.file.read_bytes()
        except OSError as error:
            raise PlanError(
                f"the engine {self.file} cannot be read ({error}); build the plan again"
            ) from error

    def keep(self, file: Path | None) -> None:
        """Lets go of the bytes where a file holds them now."""
        self.file, self._data = file, None if file is not None else self.data

    @property
    def arena_bytes(self) -> int:
        return int(self.engine.device_memory_size_v2)

    @property
    def engine(self) -> Any:
        """The ICudaEngine."""
        with self._lock:
            if self._loaded is None:
                self._loaded = self._load()
            return self._loaded

    def bind(
        self,
        inputs: Mapping[str, DeviceArray],
        outputs: Mapping[str, DeviceArray],
        stream: Any,
        arena: DeviceArray | None,
    ) -> Callable[[], None]:
        engine = self.engine
        context = self._context(engine)
        arrays = {**inputs, **outputs}
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            array, shape = arrays[name], tuple(engine.get_tensor_shape(name))
            if shape != array.shape:
                raise PlanError(
                    f"expected an array {list(shape)} for {name} but got {list(array.shape)}; build the plan again"
                )
            context.set_tensor_address(name, array.pointer)
        if arena is not None and self.arena_bytes:
            context.set_device_memory(arena.pointer, arena.nbytes)
        run, handle, failures = context.execute_async_v3, stream.handle, self.owner._log

        def call(held: object = (context, arrays, arena)) -> None:
            if not run(handle):
                raise PlanError(f"[tensorrt] a segment could not run: {failures.last or 'no reason given'}")

        return call

    def refit(self, model: bytes) -> None:
        """Takes the weights of a model with the same graph."""
        trt, engine = self.owner.trt, self.engine
        refitter = trt.Refitter(engine, self.owner._log)
        if not trt.OnnxParserRefitter(refitter, self.owner._log).refit_from_bytes(model):
            raise PlanError(f"[tensorrt] new weights do not fit the engine: {self.owner._log.last}")
        if not refitter.refit_cuda_engine():
            raise PlanError(f"[tensorrt] the engine refused new weights: {self.owner._log.last}")
        config = engine.create_serialization_config()
        include = getattr(trt.SerializationFlag, "INCLUDE_REFIT", None)
        if include is not None:
            config.set_flag(include)  # else the copy could not be refitted again
        self._data, self.file = bytes(engine.serialize_with_config(config)), None

    def _load(self) -> Any:
        runtime = _runtime(self.owner.trt.__name__)
        engine = runtime.deserialize_cuda_engine(self.data)
        if engine is None:
            raise PlanError(
                f"{self.owner.version} cannot load an engine ({self.owner._log.last or 'no reason given'}); "
                "build the plan again"
            )
        return engine

    def _context(self, engine: Any) -> Any:
        """An execution context without memory of its own. TensorRT for RTX finishes kernels here, and keeps them in
        a cache beside the engine, so that the next start is quick.
        """
        trt = self.owner.trt
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if not self.owner.for_rtx:
            return engine.create_execution_context(strategy)
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        store = config.create_runtime_cache()
        path = self.file.with_suffix(".kernels") if self.file else None
        known = path.read_bytes() if path and path.exists() else b""
        if known:
            store.deserialize(known)
        config.set_runtime_cache(store)
        context = engine.create_execution_context(config)
        if path is not None:
            made = bytes(store.serialize())
            if made != known:
                write(path, made)
        return context


def _check_target(trt: ModuleType, target: str) -> str:
    known = [name.lower() for name in trt.ComputeCapability.__members__ if name.startswith("SM")]
    if target not in known:
        raise ConfigError(
            f"{trt.__name__} {trt.__version__} builds for {', '.join(known)} but got target {target!r}"
        )
    return target


@cache
def _logger(trt: ModuleType) -> Any:
    """TensorRT's log as Python's; remembers the last error for messages."""

    class Logger(trt.ILogger):  # type: ignore[name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.last = ""

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.last = message.splitlines()[0]
                log.debug("tensorrt: %s", message)
            elif severity == trt.ILogger.WARNING:
                log.debug("tensorrt: %s", message)

    return Logger()


@cache
def _runtime(name: str) -> Any:
    """The one IRuntime of this process."""
    trt = library(name)
    return trt.Runtime(_logger(trt))


@cache
def _monitor(trt: ModuleType) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[name-defined]
        """Tells how far the phases of a build are."""

        def __init__(self, what: str, report: Callable[[str], object]) -> None:
            trt.IProgressMonitor.__init__(self)
            self._what, self._report = what, report
            self._steps: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self._steps[phase] = steps

        def step_complete(self, phase: str, step: int) -> bool:
            steps = self._steps.get(phase, 0)
            if steps > 1:
                self._report(f"{self._what}: {phase} {step + 1}/{steps}")
            return True

        def phase_finish(self, phase: str) -> None:
            self._steps.pop(phase, None)

    return Monitor
