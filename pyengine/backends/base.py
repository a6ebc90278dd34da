"""Graph compilers behind one small protocol. A backend is imported when it is asked for, never by `import
pyengine`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from math import prod
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from pyengine.errors import BackendUnavailable, ConfigError

Precision = Literal["bf16", "fp16", "fp32"]
WORKING = {"bf16": "bf16", "fp16": "float16", "fp32": "float32"}  # dtype of `working` tensors by precision
# (backend, device) -> module, and what to install for it; a backend's first device is its own default.
MODULES = {
    ("openvino", "cpu"): ("openvino", "pyengine-video"),
    ("onnxruntime", "cpu"): ("onnxruntime", "pyengine-video[onnxruntime]"),
    ("onnxruntime", "cuda"): ("onnxruntime_cuda", "pyengine-video[cuda]"),
    ("tensorrt", "cuda"): ("tensorrt", "pyengine-video[tensorrt]"),
}
NAMES = tuple(dict.fromkeys(name for name, _ in MODULES))


@dataclass(frozen=True)
class Port:
    """A named input or output of a graph: its static shape, and the dtype of the array that will be bound to
    it.

    dtype is numpy's name, or `bf16`: a uint16 array of bit patterns. A ring on a GPU may be `float8_e4m3`.
    """

    shape: tuple[int, ...]
    dtype: str

    @property
    def array_dtype(self) -> np.dtype:
        return np.dtype({"bf16": "uint16", "float8_e4m3": "uint8"}.get(self.dtype, self.dtype))

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.array_dtype.itemsize


Ports = Mapping[str, Port]
Symbols = Mapping[str, int]  # `frames` -> 8, and for products `2*frames` -> 16
Arrays = Mapping[str, np.ndarray]


class Engine(Protocol):
    """A compiled graph. Threads may share it; each stream binds its own request."""

    def bind(self, inputs: Arrays, outputs: Arrays) -> Callable[[], object]:
        """A call that runs the graph on these very arrays: nothing is copied and nothing is allocated."""
        ...


class CudaEngine(Protocol):
    """A compiled graph for a GPU. `bind` gives a call that only enqueues."""

    arena_bytes: int  # of device memory for its activations while it runs; lent by the executor
    capturable: bool  # whether its call may be recorded in a CUDA graph
    stream: Any  # the one stream that it can run on, or None for any

    def bind(self, inputs: Any, outputs: Any, stream: Any, arena: Any) -> Callable[[], object]: ...


class Backend(Protocol):
    """A graph compiler, as plans use it."""

    name: str
    version: str
    kind: str  # "cpu" or "cuda": which executor runs its engines
    device: str  # what a plan depends on: the model and features of the processor, or the GPU
    remote: bool  # whether it compiles for a GPU that is not here, so that nothing can be timed

    def prepare(self, cache: Path, report: Callable[[str], object]) -> None:
        """Called before compilations: `cache` may keep what speeds up later ones, `report` hears of their progress."""
        ...

    def facts(self) -> Mapping[str, Any]:
        """Returns what else a plan depends on, for its key in the cache."""
        ...

    def precision(self, wanted: str) -> Precision:
        """Resolves `auto` to the fast precision of this machine. Raises ConfigError for one it cannot run."""
        ...

    def compile(
        self,
        model: Path,
        symbols: Symbols,
        inputs: Ports,
        outputs: Ports,
        precision: Precision,
        threads: int | None,
    ) -> Engine:
        """Compiles an .onnx file for these ports. `symbols` gives each symbolic dim of the file its size."""
        ...

    def save(self, engine: Engine, path: Path) -> bool:
        """Writes the compiled graph to `path`; False where this backend has nothing to save and compiles from
        the bundle again.
        """
        ...

    def load(self, path: Path, precision: Precision, threads: int | None) -> Engine:
        """Reads what `save` wrote."""
        ...


def get(name: str, device: str = "auto", **options: Any) -> Backend:
    """The backend of that name on a device (`auto`: its own). Raises BackendUnavailable with the extra to install,
    ConfigError for an unknown name or an option that it does not have.
    """
    if name not in NAMES:
        raise ConfigError(f"expected a backend out of {', '.join(NAMES)} but got {name!r}")
    devices = [known for backend, known in MODULES if backend == name]
    if device not in ("auto", *devices):
        others = [backend for backend, known in MODULES if known == device]
        remedy = f"; take backend {' or '.join(others)}" if others else ""
        raise ConfigError(f"backend {name} runs on device {' or '.join(devices)} but got {device!r}{remedy}")
    file, install = MODULES[name, devices[0] if device == "auto" else device]
    given = {key: value for key, value in options.items() if value}
    if given and name != "tensorrt":
        needs = "need" if len(given) > 1 else "needs"
        raise ConfigError(f"{' and '.join(sorted(given))} {needs} backend tensorrt but got {name}")
    try:
        module = import_module(f"pyengine.backends.{file}")
    except ImportError as error:
        needed = error.name or name
        raise BackendUnavailable(
            f"backend '{name}' needs the package {needed}: pip install '{install}'"
        ) from error
    backend: Backend = module.backend(**given)
    return backend
