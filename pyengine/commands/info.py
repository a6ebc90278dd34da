"""Say what a bundle holds, which bundles ship, and what this machine can run.

Without a bundle: version, processor and instruction sets, backends that are installed, where plans are kept, and the names of the
bundles that ship. With one: also its size, video format, method and components.
"""

from __future__ import annotations

import argparse
import json
from importlib import metadata
from importlib.util import find_spec
from typing import Any

from rich.console import Console

from pyengine import _C
from pyengine.bundle.bundle import Bundle, bundled_names
from pyengine.errors import BackendUnavailable
from pyengine.plans.cache import cache_folder
from pyengine.processor import instruction_set


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "bundle", nargs="?", default=None, help="a bundled name or a folder; none: the machine alone"
    )
    parser.add_argument("--json", action="store_true", help="print as JSON")


def run(arguments: argparse.Namespace) -> int:
    facts: dict[str, Any] = {
        "version": _version("pyengine-video"),
        "processor": {"isa": instruction_set(), "supported": _C.supported_isas(), "threads": _C.threads()},
        "backends": {
            name: _version(name.replace("_", "-")) if find_spec(name) else None
            for name in ("openvino", "onnxruntime", "tensorrt", "tensorrt_rtx")
        },
        "gpu": _gpu(),
        "cache": str(cache_folder(None)),
        "bundles": bundled_names(),
    }
    if arguments.bundle is not None:
        facts["bundle"] = _describe(Bundle.load(arguments.bundle))
    if arguments.json:
        print(json.dumps(facts, indent=1))
    else:
        _print(Console(), facts)
    return 0


def _gpu() -> str:
    """The NVIDIA GPU that plans for device cuda run on, or what is missing."""
    try:
        from pyengine.device.cuda import runtime
        from pyengine.runtime.cuda.ops import kernels

        gpu = runtime()
        kernels()
    except BackendUnavailable as error:
        return str(error)
    driver, library = (f"{version // 1000}.{version % 1000 // 10}" for version in gpu.versions())
    return f"{gpu.name} ({gpu.capability}), driver for CUDA {driver}, runtime {library}"


def _describe(bundle: Bundle) -> dict[str, Any]:
    sizes = {name: bundle.path(name).stat().st_size for name in bundle.files}
    video, latent = bundle.video, bundle.latent
    return {
        "name": bundle.name,
        "family": bundle.family,
        "folder": str(bundle.folder),
        "megabytes": round(sum(sizes.values()) / 1e6, 2),
        "video": None
        if video is None
        else f"{video.width}x{video.height} at {video.fps:g} frames/s, {video.frames_per_latent:g} per latent",
        "latent": None if latent is None else f"{latent.channels} x {latent.height} x {latent.width}",
        "method": dict(bundle.method),
        "components": sorted(bundle.components),
    }


def _print(console: Console, facts: dict[str, Any], indent: str = "", nothing: str = "none") -> None:
    for name, value in facts.items():
        if isinstance(value, dict):
            console.print(f"{indent}{name}:", highlight=False)
            _print(console, value, indent + "  ", "not installed" if name == "backends" else nothing)
        else:
            text = (
                ", ".join(map(str, value)) if isinstance(value, list) else nothing if value is None else value
            )
            console.print(f"{indent}{name}: {text}", highlight=False, markup=False, soft_wrap=True)


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
