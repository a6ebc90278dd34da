"""New processes that load a bundle and make their first frame: time to it, and the memory that takes."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from pyengine.bundle.bundle import Bundle
from pyengine.errors import PyEngineError
from pyengine.methods import method_settings
from pyengine.options import EngineOptions

__all__ = ["example_start", "first_frames"]

# A new process, from its start to its first frame. Its peak memory is read after more of the video: a dozen chunks, or a short while.
CHILD = """
import json, sys, time
before = time.perf_counter()
import pyengine
imported = time.perf_counter() - before
options = json.loads(sys.argv[1])
engine = pyengine.load(options["bundle"], **options["load"])
start = None
if options["picture"]:
    from pyengine.measure.first_frame import example_start
    start = example_start(engine.bundle)
with engine.stream(options["prompt"], seed=options["seed"], start=start) as stream:
    clips = stream.clips()
    next(clips)
    first = time.time()
    from pyengine.measure.probe import peak_memory_mb
    building = peak_memory_mb()
    for count, _ in enumerate(clips, 1):
        if count == options["clips"] or time.time() - first > options["seconds"]:
            break
record = {"first": first, "import": imported, "first_frame_mb": building, "peak_mb": peak_memory_mb()}
print(json.dumps(record))
"""
MORE_CLIPS, MORE_SECONDS = 12, 20


def example_start(bundle: Bundle) -> np.ndarray | None:
    """A grey picture for a bundle whose streams cannot begin with a text alone; None for others."""
    video = bundle.video
    if video is None or not method_settings(bundle.method).needs_start:
        return None
    return np.full((1, video.height, video.width, 3), 128, np.uint8)


def first_frames(
    bundle: str | Path, options: EngineOptions, prompt: str, seed: int, warm_starts: int
) -> dict[str, Any]:
    """New processes: one with an empty plan cache, then `warm_starts` that find its plan. Raises PyEngineError."""
    source = str(Path(bundle).resolve()) if Path(bundle).is_dir() else str(bundle)
    with tempfile.TemporaryDirectory(prefix="pyengine-bench-") as cache:
        given = {
            "bundle": source,
            "load": {**asdict(options), "cache_dir": cache},
            "prompt": prompt,
            "seed": seed,
            "picture": example_start(Bundle.load(bundle)) is not None,
            "clips": MORE_CLIPS,
            "seconds": MORE_SECONDS,
        }
        cold, *warm = (_start(given) for _ in range(1 + warm_starts))
    return {
        "first_frame_seconds": {
            "cold": round(cold["seconds"], 3),
            "warm": round(median(start["seconds"] for start in warm), 3),
        },
        "import_seconds": round(median(start["import"] for start in warm), 4),
        "peak_memory_mb": round(median(start["peak_mb"] for start in warm), 1),
        "peak_memory_building_mb": round(cold["first_frame_mb"], 1),
    }


def _start(given: dict[str, Any]) -> dict[str, float]:
    start = time.time()
    done = subprocess.run(
        [sys.executable, "-P", "-c", CHILD, json.dumps(given)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise PyEngineError(f"a new process could not make its first frame: {lines[-1]}")
    record: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return {**record, "seconds": record["first"] - start}
