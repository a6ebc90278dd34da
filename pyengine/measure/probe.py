"""What `pyengine bench` reads off a running stream, this process and this machine."""

from __future__ import annotations

import os
import platform
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from pyengine.bundle.variant import Variant
from pyengine.processor import cores, instruction_set
from pyengine.streaming.state import StreamState
from pyengine.streaming.stream import Stream

__all__ = ["Probe", "machine", "memory_mb", "peak_memory_mb"]

PACKAGES = ("pyengine-video", "numpy", "openvino", "onnxruntime", "torch")


@dataclass
class Probe:
    """Times every call of a stream, and the runs of networks inside it, while it is entered. One stream at a time, one after another."""

    calls: list[float] = field(default_factory=list)  # seconds of each
    wall: float = 0.0
    _spent: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("segments", "ops", "runs", "called"), 0.0)
    )
    _before: dict[str, float] = field(default_factory=dict)
    _entered: float | None = None
    _stream: Stream | None = None
    _caller: int | None = None  # the thread that is in a call; others run the decoder

    def attach(self, stream: Stream) -> None:
        """Measures this stream from now on."""
        driver = stream._driver
        executor, step, run = driver.executor, driver.step, driver.executor.run
        self._stream, self._before = stream, stream.seconds

        def timed_step(streams: Sequence[StreamState]) -> None:
            start, self._caller = time.perf_counter(), threading.get_ident()
            try:
                step(streams)
            finally:
                self._caller = None
                if self._entered is not None:
                    self.calls.append(time.perf_counter() - start)

        def timed_run(variant: Variant) -> None:
            start = time.perf_counter()
            run(variant)
            if self._entered is not None and self._caller == threading.get_ident():
                self._spent["called"] += time.perf_counter() - start

        driver.step, executor.run = timed_step, timed_run  # type: ignore[method-assign]

    def detach(self) -> None:
        """Lets go of the stream before it is closed."""
        self._add_up()
        self._stream = None

    def has_more(self) -> bool:
        """Whether clips of the calls made so far are still to be handed out."""
        return self._stream is not None and bool(self._stream._state.clips)

    def __enter__(self) -> Probe:
        assert self._stream is not None
        self._before, self._entered = self._stream.seconds, time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._entered is not None
        self.wall += time.perf_counter() - self._entered
        self._add_up()
        self._entered = None

    def _add_up(self) -> None:
        """What the stream has spent since the probe was entered, or attached to it."""
        if self._entered is not None and self._stream is not None:
            for key, value in self._stream.seconds.items():
                self._spent[key] += value - self._before[key]

    def call_ms(self) -> dict[str, float]:
        """p50 and p95 of the calls, and how many there were."""
        p50, p95 = np.percentile(self.calls, [50, 95]) * 1e3
        return {"p50": round(float(p50), 3), "p95": round(float(p95), 3), "count": len(self.calls)}

    def overhead(self) -> dict[str, float]:
        """Percent of time outside segments and kernels: `executor` of plan runs, `call` of whole calls;
        `stream`: of wall time, outside calls. Empty on a GPU, where the host only enqueues.
        """
        spent, calls = self._spent, sum(self.calls)
        if not spent["segments"]:
            return {}
        executor = (spent["runs"] - spent["segments"] - spent["ops"]) / spent["runs"]
        call = (calls - (1 - executor) * spent["called"]) / calls
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


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
