"""What `pyengine bench` reads off a running stream, this process and this machine."""

from __future__ import annotations

import os
import platform
import sys
import time
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from pyengine.plans.plan import Variant
from pyengine.processor import instruction_set
from pyengine.streaming.stream import Stream

__all__ = ["Probe", "cores", "machine", "memory_mb", "peak_memory_mb"]

PACKAGES = ("pyengine-video", "numpy", "openvino", "onnxruntime", "torch")


@dataclass
class Probe:
    """Times every call of a stream, and the denoiser's run inside it, while it is entered."""

    stream: Stream
    calls: list[float] = field(default_factory=list)  # seconds of each
    wall: float = 0.0
    _spent: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("segments", "ops", "runs", "denoiser"), 0.0)
    )
    _before: dict[str, float] = field(default_factory=dict)
    _entered: float | None = None

    def __post_init__(self) -> None:
        window, executor = self.stream._window, self.stream._open()
        advance, run = window.advance, executor.run

        def timed_advance() -> list[tuple[int, np.ndarray]]:
            start = time.perf_counter()
            result = advance()
            if self._entered is not None:
                self.calls.append(time.perf_counter() - start)
            return result

        def timed_run(variant: Variant) -> None:
            start = time.perf_counter()
            run(variant)
            if self._entered is not None and variant.component == "denoiser":
                self._spent["denoiser"] += time.perf_counter() - start

        window.advance, executor.run = timed_advance, timed_run  # type: ignore[method-assign]

    def __enter__(self) -> Probe:
        self._before, self._entered = self.stream.seconds, time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._entered is not None
        self.wall += time.perf_counter() - self._entered
        self._entered = None
        for key, value in self.stream.seconds.items():
            self._spent[key] += value - self._before[key]

    def call_ms(self) -> dict[str, float]:
        """p50 and p95 of the calls, and how many there were."""
        p50, p95 = np.percentile(self.calls, [50, 95]) * 1e3
        return {"p50": round(float(p50), 3), "p95": round(float(p95), 3), "count": len(self.calls)}

    def overhead(self) -> dict[str, float]:
        """Percent of time outside segments and kernels: `executor` of plan runs, `call` of whole calls;
        `stream`: of wall time, outside calls. Empty on a card, where the host only enqueues.
        """
        spent, calls = self._spent, sum(self.calls)
        if not spent["segments"]:
            return {}
        executor = (spent["runs"] - spent["segments"] - spent["ops"]) / spent["runs"]
        call = (calls - (1 - executor) * spent["denoiser"]) / calls
        shares = {"executor": executor, "call": call, "stream": (self.wall - calls) / self.wall}
        return {name: round(100 * share, 3) for name, share in shares.items()}


def machine() -> dict[str, Any]:
    """What the numbers depend on beside the code."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "cpu": _cpu_name(),
        "cores": cores(),
        "isa": instruction_set(),
        "system": platform.platform(),
        "versions": versions,
    }


def peak_memory_mb() -> float:
    """The most memory this process has held so far, in MB of 10^6 bytes."""
    try:
        # Not ru_maxrss: on Linux a new process starts with its parent's.
        lines = Path("/proc/self/status").read_text().splitlines()
        return float(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) * 1024 / 1e6
    except (OSError, StopIteration):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def memory_mb() -> float:
    """The memory this process holds now, in MB of 10^6 bytes. Linux only."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
