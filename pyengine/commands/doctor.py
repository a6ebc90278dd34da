"""Check what this machine can run, and say what is missing.

Looks at Python, the processor, the installed backends, a GPU, the video encoders, the folder of plans and the bundles that ship, and
says for each that falls short what to do. Exit code 0 if the bundled model can be run, else 1.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from pyengine.bundle.bundle import Bundle, bundled_names
from pyengine.errors import PyEngineError
from pyengine.plans.cache import cache_folder

NEEDED_BYTES = 200 * 2**20  # plans of the bundled models
# backend -> (modules, any of which it takes; what to do where there is none)
BACKENDS = {
    "openvino": (("openvino",), "pip install openvino"),
    "onnxruntime": (("onnxruntime",), "pip install 'pyengine-video[onnxruntime]'"),
    "tensorrt": (
        ("tensorrt", "tensorrt_rtx"),
        "pip install 'pyengine-video[tensorrt]', beside an NVIDIA GPU",
    ),
}


class Finding(NamedTuple):
    """One thing looked at. `state`: ok, missing (something optional), or broken (the bundled model does not run)."""

    what: str
    state: str
    says: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print as JSON")


def run(arguments: argparse.Namespace) -> int:
    findings = list(_findings())
    is_ready = all(finding.state != "broken" for finding in findings)
    if arguments.json:
        print(
            json.dumps({"ready": is_ready, "findings": [finding._asdict() for finding in findings]}, indent=1)
        )
    else:
        for what, state, says in findings:
            print(f"{state:8} {what}: {says}")
        print(
            'ready: try `pyengine generate "a red circle bounces over a blue background"`'
            if is_ready
            else "not ready: see what is broken above"
        )
    return 0 if is_ready else 1


def _findings() -> Iterator[Finding]:
    yield _looked_at(
        "version", lambda: f"pyengine {metadata.version('pyengine-video')}, Python {sys.version.split()[0]}"
    )
    yield _looked_at("processor", _processor)
    yield from _left_out()
    for name, (modules, remedy) in BACKENDS.items():
        found = [module for module in modules if find_spec(module) is not None]
        state = "ok" if found else "broken" if name == "openvino" else "missing"
        yield Finding(f"backend {name}", state, ", ".join(map(_version, found)) or remedy)
    yield _looked_at("GPU", _gpu, "missing")
    yield _looked_at("video files", _encoders, "missing")
    yield _looked_at("plans", _plans, "missing")
    for name in bundled_names():
        yield _looked_at(f"bundle {name}", lambda name=name: f"{len(Bundle.load(name).files)} files, whole")  # type: ignore[misc]


def _looked_at(what: str, look: Callable[[], str], otherwise: str = "broken") -> Finding:
    try:
        return Finding(what, "ok", look())
    except (PyEngineError, OSError, ImportError, metadata.PackageNotFoundError) as error:
        return Finding(what, otherwise, str(error) or type(error).__name__)


def _version(module: str) -> str:
    """Of the distribution that holds the module: onnxruntime-gpu holds onnxruntime."""
    names = metadata.packages_distributions().get(module, [])
    return f"{names[0]} {metadata.version(names[0])}" if names else module


def _processor() -> str:
    from pyengine import _C
    from pyengine.processor import instruction_set

    used = instruction_set()
    return f"{os.cpu_count()} cores, {used} of {', '.join(_C.supported_isas())}"


def _left_out() -> Iterator[Finding]:
    from pyengine import _C

    if left := _C.left_out_isas():
        yield Finding(
            "kernels",
            "missing",
            f"this processor has {left[-1]}, which this build left out; install again with PYENGINE_BUILD_ISAS=all",
        )


def _gpu() -> str:
    from pyengine.device.cuda import runtime
    from pyengine.runtime.cuda.ops import kernels

    found = runtime()
    kernels()
    return f"{found.name} ({found.capability})"


def _encoders() -> str:
    from pyengine.video.writer import ENCODERS, can_encode

    found = {suffix: next(filter(can_encode, names), None) for suffix, names in ENCODERS.items()}
    if lacking := [suffix for suffix, name in found.items() if name is None]:
        raise PyEngineError(f"this build of PyAV has no encoder for {', '.join(lacking)}; use another suffix")
    return ", ".join(f"{suffix} by {name}" for suffix, name in found.items())


def _plans() -> str:
    folder = cache_folder(None)
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    if not os.access(there, os.W_OK | os.X_OK):
        raise PyEngineError(f"{folder} cannot be written, so every start compiles anew; set PYENGINE_CACHE")
    free = shutil.disk_usage(there).free
    if free < NEEDED_BYTES:
        raise PyEngineError(
            f"{folder} has {free / 2**20:.0f} MiB left; free some space or set PYENGINE_CACHE"
        )
    taken = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    return f"{taken / 2**20:.0f} MiB in {folder}"
