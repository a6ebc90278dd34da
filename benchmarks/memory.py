"""Is memory flat? `python benchmarks/memory.py [--frames 20000]` streams and records resident memory.

Goal: within 1 MB from frame 500 to the last. Writes memory.json and memory.png; exit code 1 where the goal is
missed. Linux only.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import pyengine
from pyengine.measure.probe import machine, memory_mb

PROMPT = "a red circle bounces over a blue background"
FIRST_FRAME, GOAL_MB = 500, 1.0


def record(bundle: str, frames: int, every: int) -> dict[str, Any]:
    """Resident MB every `every` frames."""
    places, sizes = [], []
    start = time.perf_counter()
    with pyengine.load(bundle).stream(PROMPT, seed=7, frames=frames) as stream:
        # Appended to, but 200 entries of 32 bytes: far below a page per reading.
        for count, _ in enumerate(stream, 1):
            if count % every == 0:
                places.append(count)
                sizes.append(memory_mb())
                if count % (10 * every) == 0:
                    speed = count / (time.perf_counter() - start)
                    print(f"frame {count:6}  {sizes[-1]:8.2f} MB  {speed:6.1f} frames/s", flush=True)
    kept = [size for place, size in zip(places, sizes, strict=True) if place >= FIRST_FRAME]
    if not kept:
        raise SystemExit(f"expected more than {FIRST_FRAME} frames but got {frames}")
    return {
        "machine": machine(),
        "frames": frames,
        "from_frame": FIRST_FRAME,
        "spread_mb": round(max(kept) - min(kept), 3),
        "growth_mb": round(kept[-1] - kept[0], 3),
        "goal_mb": GOAL_MB,
        "frame": places,
        "memory_mb": [round(size, 3) for size in sizes],
    }


def plot(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 3.5), layout="constrained")
    axes.plot(result["frame"], result["memory_mb"], linewidth=1.5)
    axes.axvline(FIRST_FRAME, color="grey", linewidth=0.8, linestyle=":")
    middle = sum(result["memory_mb"]) / len(result["memory_mb"])
    axes.set_ylim(middle - 20, middle + 20)  # a leak of 1 MB must be visible, noise must not look like one
    axes.set_xlabel("frame")
    axes.set_ylabel("resident memory, MB")
    axes.set_title(
        f"from frame {FIRST_FRAME}: spread {result['spread_mb']:.2f} MB, growth {result['growth_mb']:+.2f} MB"
    )
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", nargs="?", default="shapes")
    parser.add_argument("--frames", type=int, default=20000)
    parser.add_argument("--every", type=int, default=100, help="frames between readings (default 100)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    result = record(options.bundle, options.frames, options.every)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "memory.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(result, options.output / "memory.png")
    met = result["spread_mb"] <= GOAL_MB
    print(
        f"spread {result['spread_mb']} MB from frame {FIRST_FRAME} on, goal {GOAL_MB} MB: "
        f"{'met' if met else 'missed'}"
    )
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
