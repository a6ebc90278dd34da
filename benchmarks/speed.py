"""The speed table: `python benchmarks/speed.py [--seconds 30] [--output FOLDER]`, on a quiet machine.

The engine and every peer make the same video of the same bundle in turns; figures stand beside their goals.
Writes speed.json (all numbers, each round) and speed.md (the table) to benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyengine.export.peers import NAMES
from pyengine.measure.bench import bench

COMPILED = ("torch_compile", "torch_compile_frozen", "torch_compile_autotune")
LABELS = {
    "torch_eager": "PyTorch eager, ring",
    "torch_compile": "torch.compile, ring",
    "torch_compile_frozen": "torch.compile with freezing, ring",
    "torch_compile_autotune": "torch.compile with freezing and max-autotune, ring",
    "torch_recompute": "PyTorch eager, context recomputed",
    "onnxruntime": "ONNX Runtime, whole graph, float32",
}


@dataclass(frozen=True)
class Goal:
    """A figure that should stay on one side of a bound."""

    what: str
    value: Callable[[dict[str, Any]], float | None]
    bound: float
    at_least: bool
    unit: str = ""

    def row(self, result: dict[str, Any]) -> str:
        value = self.value(result)
        if value is None:
            return f"| {self.what} | not measured | | |"
        met = value >= self.bound if self.at_least else value <= self.bound
        sign = ">=" if self.at_least else "<="
        figures = f"{value:.2f}{self.unit} | {sign} {self.bound:g}{self.unit}"
        return f"| {self.what} | {figures} | {'yes' if met else 'no'} |"


def over_compile(result: dict[str, Any]) -> float | None:
    """Against the fastest of its forms."""
    ratios = [result["times_faster"][name] for name in COMPILED if name in result["times_faster"]]
    return min(ratios) if ratios else None


GOALS = (
    Goal("steady frames/s", lambda r: r["frames_per_second"], 24, True),
    Goal("times faster than torch.compile (its fastest form)", over_compile, 1.5, True, "x"),
    Goal(
        "times faster than plain ONNX Runtime", lambda r: r["times_faster"].get("onnxruntime"), 4, True, "x"
    ),
    Goal("executor overhead outside segments and kernels", lambda r: r["overhead_percent"], 3, False, " %"),
    Goal("the same, with schedule and sampler", lambda r: r["overhead"]["call"], 3, False, " %"),
    Goal("first frame, warm", lambda r: r["first_frame_seconds"]["warm"], 2, False, " s"),
    Goal("first frame, cold", lambda r: r["first_frame_seconds"]["cold"], 15, False, " s"),
)


def markdown(result: dict[str, Any]) -> str:
    """The table."""
    where, call, plan = result["machine"], result["call_ms"], result["plan"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    ours = result["rounds"]["pyengine"]
    lines = [
        f"`{result['bundle']}` on {where['cpu']}, {where['cores']} cores ({where['isa']}), "
        f"{plan['backend']} {plan['precision']}.",
        f"{versions}.",
        "",
        "| | frames/s | min-max | pyengine is faster by |",
        "|---|---:|---:|---:|",
        f"| **pyengine** | **{result['frames_per_second']:.1f}** | {min(ours):.1f}-{max(ours):.1f} | |",
    ]
    for name, fps in result["peers"].items():
        low, high = result["times_faster_spread"][name]
        values = result["rounds"][name]
        label = LABELS[name] if name == "onnxruntime" else f"{LABELS[name]}, {plan['precision']}"
        lines.append(
            f"| {label} | {fps:.1f} | "
            f"{min(values):.1f}-{max(values):.1f} | "
            f"{result['times_faster'][name]:.2f}x ({low:.2f}-{high:.2f}) |"
        )
    lines += [f"| {LABELS[name]} | failed: {why} | | |" for name, why in result["peers_failed"].items()]
    lines += [
        "",
        "| goal | measured | wanted | met |",
        "|---|---:|---:|---|",
        *(goal.row(result) for goal in GOALS),
    ]
    lines += [
        "",
        f"A call takes {call['p50']:.2f} ms (p50), {call['p95']:.2f} ms (p95) over {call['count']} calls. "
        f"Peak memory {result['peak_memory_mb']:.0f} MB, {result['peak_memory_building_mb']:.0f} MB while "
        "a plan is built; "
        f"`import pyengine` takes {result['import_seconds']:.3f} s.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", nargs="?", default="shapes")
    parser.add_argument(
        "--seconds", type=float, default=30.0, help="measuring time per contender (default 30)"
    )
    parser.add_argument("--peers", nargs="*", default=list(NAMES), choices=NAMES, help="default: all")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()

    def report(done: int, total: int, what: str) -> None:
        print(f"[{done}/{total}] {what}", file=sys.stderr, flush=True)

    result = bench(options.bundle, seconds=options.seconds, peers=options.peers, progress=report)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "speed.json").write_text(json.dumps(result, indent=1) + "\n")
    table = markdown(result)
    (options.output / "speed.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
