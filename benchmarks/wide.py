"""A larger denoiser of the `shapes` family with random weights: `python benchmarks/wide.py [--json FILE]`.

Width 1152 (16 heads of 72), 4 spatial and 4 temporal attention blocks, 105 tokens per frame, a window of 30
active frames before a ring of 5 clean ones, both guidance branches. The bundle is exported, partitioned and
built like any other. Its plan is compared with the bf16 matrix rate of this machine, measured in the same
rounds on the same shapes, with PyTorch, and with an INT8 plan.

  dense TFLOP/s  products in the segments (linear layers, spatial and text attention) over their time
  matrix rate    the linear layers alone, one after another: the better of PyTorch and OpenVINO
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import openvino as ov
import torch
from openvino import opset13 as ops
from torch.nn import functional as F
from wide_case import RING, Case, PlanRunner, TorchRunner, WideConfig, export_bundle, relative_error

from pyengine.bundle.variant import Variant
from pyengine.export.quantise import quantise
from pyengine.measure.probe import cores, machine, peak_memory_mb

CALIBRATION_FRAMES, CALIBRATION_CALLS = 6, 3
GOAL_MATRIX, GOAL_INT8, GOAL_MEMORY_MB = 0.9, 1.5, 12000
PAUSE_SECONDS = 0.2


def torch_products(shapes: list[tuple[int, int, int]]) -> Callable[[], None]:
    """Linear layers of these shapes in PyTorch bf16, one after another."""
    pairs = [(torch.randn(m, k).bfloat16(), torch.randn(n, k).bfloat16()) for m, k, n in shapes]

    def run() -> None:
        for x, weight in pairs:
            F.linear(x, weight)

    return run


def openvino_products(shapes: list[tuple[int, int, int]]) -> Callable[[], None]:
    """The same in OpenVINO, each a compiled model of its own with constant weights."""
    core, requests = ov.Core(), []
    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": "bf16",
        "ENABLE_CPU_PINNING": False,
    }
    for m, k, n in shapes:
        x = ops.parameter([m, k], ov.Type.bf16)
        weight = ops.constant(np.random.default_rng(0).standard_normal((k, n), np.float32))
        product = ops.matmul(ops.convert(x, "f32"), weight, False, False)
        model = ov.Model([ops.result(ops.convert(product, "bf16"))], [x], "product")
        request = core.compile_model(model, "CPU", options).create_infer_request()
        request.infer()
        requests.append(request)

    def run() -> None:
        for request in requests:
            request.infer()

    return run


def measure(contenders: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of one run, in turns."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for run in contenders.values():
        run()
    for _ in range(rounds):
        for name, run in contenders.items():
            time.sleep(PAUSE_SECONDS)
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return times


def benchmark(config: WideConfig, frames: int, rounds: int, compiled: bool, int8: bool) -> dict[str, Any]:
    torch.set_grad_enabled(False)
    torch.set_num_threads(cores())
    case = Case.random(config, frames)
    with tempfile.TemporaryDirectory(prefix="pyengine-wide-") as scratch:
        folder = Path(scratch)
        cache = folder / "plans"
        print("exporting", flush=True)
        bundle = export_bundle(case, folder / "bundle")
        print("building", flush=True)
        runners: dict[str, Any] = {
            "pyengine_bf16": PlanRunner(case, bundle, cache, precision="bf16", choice="auto")
        }
        exact = PlanRunner(case, bundle, cache, precision="fp32", choice="cut").velocity()
        if int8:
            print("quantising", flush=True)
            sizes = {"branches": 2, "streams": 1, "ring": RING}
            small = Variant.of("denoiser", frames=min(CALIBRATION_FRAMES, frames), **sizes)
            calls = case.calls(small.symbols["frames"], CALIBRATION_CALLS)
            lean = quantise(bundle, "denoiser", small, calls, folder / "int8", cache_dir=cache)
            runners["pyengine_int8"] = PlanRunner(case, lean, cache, precision="bf16", choice="cut")
        print("PyTorch", flush=True)
        # The module becomes bf16, and is shared by both.
        runners["torch_eager_bf16"] = TorchRunner(case, None)
        if compiled:
            runners["torch_compile_bf16"] = TorchRunner(case, "frozen")
        shapes = case.products()[: len(case.products()) // config.depth]
        matrix = {"torch": torch_products(shapes), "openvino": openvino_products(shapes)}
        # Only the cut form separates dense algebra from attention over the ring.
        cut = runners["pyengine_bf16"]
        if cut.part.choice != "cut":
            cut = runners["pyengine_bf16_cut"] = PlanRunner(
                case, bundle, cache, precision="bf16", choice="cut"
            )
        before = cut.executor.seconds
        products = {f"matrix_{name}": run for name, run in matrix.items()}
        times = measure({**runners, **products}, rounds)
        after = cut.executor.seconds
        spent = {key: (after[key] - before[key]) / (rounds + 1) for key in after}
        errors = {name: relative_error(runner.velocity(), exact) for name, runner in runners.items()}
        part = runners["pyengine_bf16"].part
        return report(case, part, times, spent, errors, shapes)


def report(
    case: Case,
    part: Any,
    times: dict[str, list[float]],
    spent: dict[str, float],
    errors: dict[str, float],
    shapes: list[tuple[int, int, int]],
) -> dict[str, Any]:
    middle = {name: median(values) for name, values in times.items()}
    flops = sum(2.0 * m * k * n for m, k, n in shapes)
    rates = {
        name.removeprefix("matrix_"): flops / seconds / 1e12
        for name, seconds in middle.items()
        if name.startswith("matrix_")
    }
    runners = {name: seconds for name, seconds in middle.items() if not name.startswith("matrix_")}
    ours = runners["pyengine_bf16"]
    dense = case.dense_flops() / spent["segments"] / 1e12
    result: dict[str, Any] = {
        "machine": machine(),
        "width": case.config.width,
        "depth": case.config.depth,
        "frames": case.frames,
        "ring": RING,
        "choice": part.choice,
        "choice_ms": {name: value and round(value * 1e3, 1) for name, value in part.seconds.items()},
        "ms": {name: round(seconds * 1e3, 1) for name, seconds in runners.items()},
        "ms_spread": {
            name: [round(min(times[name]) * 1e3, 1), round(max(times[name]) * 1e3, 1)] for name in runners
        },
        "times_faster": {
            name: round(seconds / ours, 3) for name, seconds in runners.items() if name != "pyengine_bf16"
        },
        "segments_ms": round(spent["segments"] * 1e3, 1),
        "ops_ms": round(spent["ops"] * 1e3, 1),
        "dense_tflops": round(dense, 3),
        "matrix_tflops": {name: round(rate, 3) for name, rate in rates.items()},
        "dense_share_of_matrix_rate": round(dense / max(rates.values()), 3),
        "relative_error": {name: float(f"{error:.3g}") for name, error in errors.items()},
        "peak_memory_mb": round(peak_memory_mb()),
        "goals": {
            "dense_share_of_matrix_rate": GOAL_MATRIX,
            "int8_times_faster_than_bf16": GOAL_INT8,
            "peak_memory_mb": GOAL_MEMORY_MB,
        },
    }
    if "pyengine_int8" in runners:
        result["int8_times_faster_than_bf16"] = round(ours / runners["pyengine_int8"], 3)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers here")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--frames", type=int, default=30, help="active frames (default 30)")
    parser.add_argument(
        "--width", type=int, default=1152, help="smaller ones are for a quick look; heads stay 16"
    )
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument("--no-int8", action="store_true", help="leave out quantisation")
    options = parser.parse_args()
    config = replace(WideConfig(), width=options.width, depth=options.depth)
    result = benchmark(config, options.frames, options.rounds, not options.no_compile, not options.no_int8)
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
