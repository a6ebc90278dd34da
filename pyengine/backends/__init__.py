"""Graph compilers behind one small protocol. A backend is imported when it is asked for, never by `import
pyengine`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from ..errors import BackendUnavailable, ConfigError

Precision = Literal["bf16", "fp32"]
INSTALL = {"openvino": "pyengine-video", "onnxruntime": "pyengine-video[onnxruntime]"}
NAMES = tuple(INSTALL)


@dataclass(frozen=True)
class Port:
    """A named input or output of a graph: its static shape, and the dtype of the array that will be bound to
    it.

    dtype is numpy's name, or `bf16`: a uint16 array of bit patterns.
    """

    shape: tuple[int, ...]
    dtype: str

    @property
    def array_dtype(self) -> np.dtype:
        return np.dtype("uint16" if self.dtype == "bf16" else self.dtype)


Ports = Mapping[str, Port]
Symbols = Mapping[str, int]  # `frames` -> 8, and for products `2*frames` -> 16
Arrays = Mapping[str, np.ndarray]


class Engine(Protocol):
    """A compiled graph. Threads may share it; each stream binds its own request."""

    def bind(self, inputs: Arrays, outputs: Arrays) -> Callable[[], object]:
        """A call that runs the graph on these very arrays: nothing is copied and nothing is allocated."""
        ...


class Backend(Protocol):
    """What a graph compiler must do for us."""

    name: str
    version: str
    device: str  # what a plan depends on: the model and features of the processor

    def precision(self, wanted: str) -> Precision:
        """`auto` becomes the fast precision of this machine. Raises ConfigError for one it cannot run."""
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


def get(name: str) -> Backend:
    """The backend of that name. Raises BackendUnavailable with the extra to install, ConfigError for an
    unknown name.
    """
    if name not in NAMES:
        raise ConfigError(f"expected a backend out of {', '.join(NAMES)} but got {name!r}")
    try:
        module = import_module(f".{name}", __name__)
    except ImportError as error:
        needed = error.name or name
        raise BackendUnavailable(
            f"backend '{name}' needs the package {needed}: pip install '{INSTALL[name]}'"
        ) from error
    backend: Backend = module.backend()
    return backend
