"""Does closing an engine give everything back? `python benchmarks/open_close.py [--cycles 10]` loads, streams and closes, again and again.

After every step it records resident memory, threads and open files. Goal: from the second cycle on, all three are after `close()`
what they were a cycle before, memory within 8 MB: OpenVINO alone, importing and freeing the same engines, moves by 6. Writes
open_close.json; exit code 1 where the goal is missed. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import pyengine
from pyengine.measure.probe import machine, memory_mb

PROMPTS = ("a red circle bounces over a blue background", "a green star orbits over a grey background")
GOAL_MB = 8.0


def held() -> dict[str, Any]:
    """What this process holds now: resident MB of 10^6 bytes, threads of the operating system, open files."""
    return {
        "memory_mb": round(memory_mb(), 2),
        "threads": len(os.listdir("/proc/self/task")),
        "files": len(os.listdir("/proc/self/fd")),
    }


def cycle(bundle: str, frames: int, **options: Any) -> dict[str, dict[str, Any]]:
    """One life of an engine with two streams at once, one of which its closing closes."""
    before = held()
    engine = pyengine.load(bundle, **options)
    loaded = held() | {"estimate_mb": round(engine.nbytes / 1e6, 2)}
    with (
        engine.stream(PROMPTS[0], seed=1, frames=frames) as first,
        engine.stream(PROMPTS[1], seed=2) as second,
    ):
        for _ in first:
            next(second)
        streaming = held() | {"estimate_mb": round(engine.nbytes / 1e6, 2)}
        engine.close()
    del engine, first, second
    return {"before": before, "loaded": loaded, "streaming": streaming, "closed": held()}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", nargs="?", default="shapes")
    parser.add_argument("--cycles", type=int, default=10)
    parser.add_argument("--frames", type=int, default=24, help="frames of each stream (default 24)")
    parser.add_argument("--backend", default="openvino")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    cycles = []
    for number in range(arguments.cycles):
        cycles.append(cycle(arguments.bundle, arguments.frames, backend=arguments.backend))
        for step, values in cycles[-1].items():
            shown = "  ".join(f"{name} {value:8}" for name, value in values.items())
            print(f"{number + 1:3}  {step:10}{shown}", flush=True)
    kept = [entry["closed"] for entry in cycles[1:]]
    if not kept:
        raise SystemExit("expected at least two cycles")
    spread = {name: round(max(e[name] for e in kept) - min(e[name] for e in kept), 2) for name in kept[0]}
    met = spread["memory_mb"] <= GOAL_MB and not spread["threads"] and not spread["files"]
    result = {
        "machine": machine(),
        "bundle": arguments.bundle,
        "frames": arguments.frames,
        "goal_mb": GOAL_MB,
    }
    result |= {"spread_after_close_from_cycle_2": spread, "cycles": cycles}
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "open_close.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"after close, from the second cycle on: {spread}, goal {GOAL_MB} MB: {'met' if met else 'missed'}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
