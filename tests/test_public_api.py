"""What `import pyengine` offers, and what it must not cost."""

from __future__ import annotations

import subprocess
import sys

import pyengine

NAMES = [
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
HEAVY = (
    *("torch", "onnx", "openvino", "onnxruntime", "av", "pyengine.export", "export"),
    *("pyengine.serve", "starlette", "uvicorn", "websockets", "msgspec", "prometheus_client"),
)


def test_public_names_are_exactly_these() -> None:
    assert pyengine.__all__ == sorted(NAMES)
    assert all(getattr(pyengine, name).__module__.startswith("pyengine.") for name in NAMES)


def test_import_is_light() -> None:
    code = f"import pyengine, sys; print([name for name in {HEAVY} if name in sys.modules])"
    assert (
        subprocess.run(
            [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )


def test_running_needs_no_torch_and_no_onnx(tmp_path) -> None:
    """Load, build a plan and make a frame with both packages made impossible to import."""
    code = (
        "import sys; sys.modules['torch'] = sys.modules['onnx'] = sys.modules['onnxruntime'] = None\n"
        f"import pyengine; engine = pyengine.load('shapes', cache_dir={str(tmp_path)!r})\n"
        "with engine.stream('a red circle bounces over a blue background', frames=1) as stream: print(next(stream).shape)"
    )
    assert (
        subprocess.run(
            [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "(64, 64, 3)"
    )
