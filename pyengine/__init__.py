"""pyengine: a compiled inference engine for streaming, autoregressive long-video diffusion.

engine = pyengine.load("shapes")
with engine.stream("a red circle bounces over a blue background", seconds=5) as stream:
    for frame in stream:  # uint8 [height, width, 3]
        ...
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyengine.bundle.bundle import Bundle
    from pyengine.engine import Engine, load
    from pyengine.errors import (
        BackendUnavailable,
        BundleError,
        ConfigError,
        InputError,
        OutputError,
        PlanError,
        PromptError,
        PyEngineError,
        ShapeError,
        StreamClosed,
    )
    from pyengine.streaming.stream import Stream
    from pyengine.video.reader import read_image, read_video
    from pyengine.video.writer import VideoWriter

# Where each public name lives; imported when first used, so that `import pyengine` costs nothing.
_HOMES = {
    "BackendUnavailable": "errors",
    "Bundle": "bundle.bundle",
    "BundleError": "errors",
    "ConfigError": "errors",
    "Engine": "engine",
    "InputError": "errors",
    "OutputError": "errors",
    "PlanError": "errors",
    "PromptError": "errors",
    "PyEngineError": "errors",
    "ShapeError": "errors",
    "Stream": "streaming.stream",
    "StreamClosed": "errors",
    "VideoWriter": "video.writer",
    "load": "engine",
    "read_image": "video.reader",
    "read_video": "video.reader",
}

__all__ = [
    "BackendUnavailable",
    "Bundle",
    "BundleError",
    "ConfigError",
    "Engine",
    "InputError",
    "OutputError",
    "PlanError",
    "PromptError",
    "PyEngineError",
    "ShapeError",
    "Stream",
    "StreamClosed",
    "VideoWriter",
    "load",
    "read_image",
    "read_video",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pyengine' has no attribute {name!r}")
    return getattr(import_module(f"pyengine.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
