"""One denoiser call of Open-Sora v1.2 beside PyTorch: `python benchmarks/opensora.py [--quick] [--json FILE]`.

STDiT3 at its real widths with random weights, a full window of PA-VDM (35 latent frames, prompt and null text), at 120x214 and 240x426:
pyengine's bf16 and INT8 plans, the same module in PyTorch eager bf16 and torch.compile bf16, and the bf16 matrix rate, taken in turns in
one process. Two pairs of blocks by default; `--depth 28` is the whole model (by arithmetic about 15 GB; `--no-int8 --steps 0` spares
time). `--quick` is the small size without torch.compile.

  share         products of a call over its time, over the matrix rate: linear layers alone, the better of PyTorch and OpenVINO
  error         relative L2 of the velocity to the float32 plan
  frames_psnr   decibels between decoded frames of a clip sampled with guidance 7, and those of the float32 plan
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from opensora_case import (
    CHUNK,
    NOISY,
    Case,
    PlanRunner,
    TorchRunner,
    cached_context_error,
    export_case,
    random_model,
    sample,
)
from torch import Tensor
from wide import measure, openvino_products, torch_products
from wide_case import relative_error

from pyengine.bundle.bundle import Bundle
from pyengine.bundle.variant import Variant
from pyengine.export.families.opensora import VideoAutoencoder
from pyengine.export.quantise import quantise
from pyengine.measure.probe import cores, machine, peak_memory_mb

SIZES = ((120, 214), (240, 426))
WORDS = 120
MATRIX_ROWS = 8192  # enough for the full rate
CALIBRATION_FRAMES, CALIBRATION_CALLS = 6, 3
DECODED = 2  # frames of the clip that are compared
GOALS = {"times_faster": 1.2, "share": 0.88, "int8_times_faster": 1.6}


def rounded(error: float) -> float:
    return float(f"{error:.3g}")


class Decoder:
    """The autoencoder of the release (`quick`: at a quarter of its width) with random weights, last layer scaled to pixels; a few
    frames of a chunk in float32.
    """

    def __init__(self, quick: bool) -> None:
        torch.manual_seed(0)
        narrow: dict[str, Any] = {
            "spatial": {"block_out_channels": (32, 64, 128, 128)},
            "temporal": {"filters": 32},
        }
        self.vae = VideoAutoencoder(**narrow if quick else {}).eval().requires_grad_(False)
        self._gain: float | None = None

    def __call__(self, latents: Tensor) -> Tensor:
        vae = self.vae
        planes = vae.decode_time(vae.denormalised(latents.transpose(0, 1)[None]), 17)[:, :, :: 17 // DECODED][
            :, :, :DECODED
        ]
        pixels = vae.decode_frames(planes)
        self._gain = self._gain or 0.5 / float(pixels.std())
        return (pixels * self._gain).clamp(-1, 1)


def psnr(frames: Tensor, exact: Tensor) -> float:
    """Decibels; pixels are in [-1, 1]."""
    return round(float(10 * torch.log10(4 / (frames - exact).square().mean())), 1)


def int8_bundle(case: Case, bundle: Bundle, folder: Path) -> Bundle:
    small = Variant.of("denoiser", frames=CALIBRATION_FRAMES)
    calls = case.calls(CALIBRATION_FRAMES, CALIBRATION_CALLS)
    return quantise(bundle, "denoiser", small, calls, folder / "int8", cache_dir=folder / "plans")


def benchmark(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="pyengine-opensora-") as scratch:
        folder = Path(scratch)
        say(case, "exporting")
        bundle = export_case(case, folder / "bundle")
        frames = (NOISY + CHUNK, CHUNK) if options.steps else (NOISY + CHUNK,)

        def plan(source: Bundle, precision: str, choice: str) -> PlanRunner:
            say(case, f"building {source.name} {precision} {choice}")
            return PlanRunner(case, source, folder / "plans", frames, precision=precision, choice=choice)

        def outcome(runner: PlanRunner) -> tuple[np.ndarray, Tensor | None]:
            clip = sample(runner, options.steps) if options.steps else None
            return runner.velocity(), clip

        runner = plan(bundle, "fp32", "cut")
        results = {"fp32": outcome(runner)}
        del runner
        gc.collect()
        runners: dict[str, Any] = {"pyengine_bf16": plan(bundle, "bf16", options.choice)}
        if options.int8:
            say(case, "quantising")
            runners["pyengine_int8"] = plan(int8_bundle(case, bundle, folder), "bf16", "cut")
        results |= {name: outcome(runner) for name, runner in runners.items()}
        runners["torch_eager_bf16"] = TorchRunner(case, None)
        if options.compile:
            runners["torch_compile_bf16"] = TorchRunner(case, "frozen")
        shapes = [(min(m, MATRIX_ROWS), k, n) for m, k, n in case.products()]
        matrix = {"matrix_torch": torch_products(shapes), "matrix_openvino": openvino_products(shapes)}
        say(case, "measuring")
        before = runners["pyengine_bf16"].executor.seconds
        contenders: dict[str, Callable[[], None]] = {**runners, **matrix}
        times = measure(contenders, options.rounds)
        after = runners["pyengine_bf16"].executor.seconds
        spent = {key: (after[key] - before[key]) / (options.rounds + 1) * 1e3 for key in after}
        result = report(case, times, shapes, runners["pyengine_bf16"].part)
        result["segments_ms"], result["ops_ms"] = round(spent["segments"], 1), round(spent["ops"], 1)
        exact, clip = results.pop("fp32")
        velocities = {name: velocity for name, (velocity, _) in results.items()}
        velocities |= {n: r.velocity() for n, r in runners.items() if isinstance(r, TorchRunner)}
        result["error"] = {n: rounded(relative_error(value, exact)) for n, value in velocities.items()}
    runners.clear()
    gc.collect()
    if clip is not None:
        say(case, "decoding")
        decoder = Decoder(options.quick)
        frames_exact = decoder(clip)
        result["frames_psnr"] = {
            n: psnr(decoder(other), frames_exact) for n, (_, other) in results.items() if other is not None
        }
    if options.context:
        say(case, "cached context")
        result["cached_context_error_by_stage"] = {
            stage: rounded(error) for stage, error in cached_context_error(case)
        }
    result["peak_memory_mb"] = round(peak_memory_mb())
    return result


def report(
    case: Case, times: dict[str, list[float]], shapes: list[tuple[int, int, int]], part: Any
) -> dict[str, Any]:
    middle = {name: median(values) for name, values in times.items()}
    flops = sum(2.0 * m * k * n for m, k, n in shapes)
    rates = {
        name.removeprefix("matrix_"): flops / s / 1e12
        for name, s in middle.items()
        if name.startswith("matrix_")
    }
    runners = {name: seconds for name, seconds in middle.items() if not name.startswith("matrix_")}
    ours = runners["pyengine_bf16"]
    best_torch = min(seconds for name, seconds in runners.items() if name.startswith("torch"))
    rate = max(rates.values())

    def share(name: str, seconds: float) -> float:
        return round(case.flops(shared_first=name.startswith("pyengine")) / seconds / 1e12 / rate, 3)

    result = {
        "size": list(case.size),
        "depth": case.model.config.depth,
        "tokens": (NOISY + CHUNK) * case.tokens,
        "tflop": round(case.flops(shared_first=False) / 1e12, 3),
        "ms": {name: round(seconds * 1e3, 1) for name, seconds in runners.items()},
        "ms_spread": {
            name: [round(min(times[name]) * 1e3, 1), round(max(times[name]) * 1e3, 1)] for name in runners
        },
        "choice": part.choice,
        "choice_ms": {name: value and round(value * 1e3, 1) for name, value in part.seconds.items()},
        "matrix_tflops": {name: round(value, 3) for name, value in rates.items()},
        "share": {name: share(name, seconds) for name, seconds in runners.items()},
        "times_faster_than_best_torch": round(best_torch / ours, 3),
    }
    if "pyengine_int8" in runners:
        result["int8_times_faster_than_bf16"] = round(ours / runners["pyengine_int8"], 3)
        result["int8_times_faster_than_best_torch"] = round(best_torch / runners["pyengine_int8"], 3)
    return result


def table(result: dict[str, Any]) -> str:
    height, width = result["size"]
    psnrs = result.get("frames_psnr", {})
    lines = [
        f"{height}x{width}, {result['depth']} + {result['depth']} blocks, {result['tokens']} tokens twice, {result['tflop']} TFLOP, "
        f"matrix rate {max(result['matrix_tflops'].values())} TFLOP/s",
        f"{'':<22}{'ms':>10}{'share':>9}{'error':>10}{'PSNR dB':>10}",
    ]
    for name, ms in result["ms"].items():
        error, decibels = result["error"].get(name, ""), psnrs.get(name, "")
        lines.append(f"{name:<22}{ms:>10}{result['share'][name]:>9}{error:>10}{decibels:>10}")
    lines.append(f"{result['times_faster_than_best_torch']} times as fast as the better PyTorch")
    return "\n".join(lines)


def say(case: Case, what: str) -> None:
    print(f"{case.size[0]}x{case.size[1]}: {what}", flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers here")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="120x214 only, three rounds, no torch.compile, a 4-step clip, a narrow autoencoder",
    )
    parser.add_argument(
        "--size", action="append", help="height x width; may be repeated (default: 120x214 and 240x426)"
    )
    parser.add_argument("--depth", type=int, default=2, help="pairs of blocks; the released model has 28")
    parser.add_argument(
        "--words", type=int, default=WORDS, help="prompt tokens, all of them words (default: 120)"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--steps", type=int, default=30, help="of the clip whose frames are compared; 0 = leave that out"
    )
    parser.add_argument("--choice", default="auto", help="auto (default), cut or inline")
    for name, what in (
        ("compile", "torch.compile"),
        ("int8", "quantisation"),
        ("context", "the cached context"),
    ):
        parser.add_argument(f"--no-{name}", dest=name, action="store_false", help=f"leave out {what}")
    options = parser.parse_args()
    if options.quick:
        options.size, options.rounds, options.steps = options.size or ["120x214"], 3, 4
        options.compile = False
        options.context = False
    return options


def main() -> None:
    options = parse()
    torch.set_grad_enabled(False)
    torch.set_num_threads(cores())
    model = random_model(options.depth)
    sizes = [tuple(map(int, text.split("x"))) for text in options.size] if options.size else SIZES
    results = []
    for size in sizes:
        results.append(benchmark(Case(model, (size[0], size[1]), options.words), options))
        torch._dynamo.reset()
        print(table(results[-1]), flush=True)
    summary = {"machine": machine(), "words": options.words, "goals": GOALS, "results": results}
    print(json.dumps(summary, indent=1))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    main()
