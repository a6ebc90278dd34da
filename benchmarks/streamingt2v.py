"""One step of StreamingT2V's extractor and denoiser with random weights: `python benchmarks/streamingt2v.py [--json FILE]`.

Both branches of guidance, 16 frames, by default at the released widths and 256 x 256: 2.1 billion parameters, about 12 TFLOP for the plain
step. All contenders run in turns in one process at one precision, on random weights and inputs:

  plan           pyengine: the cached denoiser, compiled
  plain          PyTorch, the networks as the release runs them: condition frames, time embedding, keys and values at every step
  cached         PyTorch, the same cached denoiser that the plan is made of: the bare forward

`plain` against the plan is what a user gains; `cached` against the plan is what the compiled forward gains by itself. Then every thing that
is kept or left out is timed in PyTorch on the work that it is about: how often the release does it per chunk of 50 steps, and how often
it is done here. A prompt and an anchor last for more than one chunk; they are counted as not done at all.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from streamingt2v_case import STEPS, Cached, Case, Plain, Planned, relative_error, savings, seconds_of

from pyengine.measure.probe import cores, machine, peak_memory_mb

GOAL_WITH_CACHES, GOAL_BARE = 1.3, 1.1
PAUSE_SECONDS = 0.2
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def measure(contenders: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of one run, in turns."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for name, run in contenders.items():
        print(f"warming {name}", flush=True)
        run()
    for _ in range(rounds):
        for name, run in contenders.items():
            time.sleep(PAUSE_SECONDS)
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return times


def benchmark(options: argparse.Namespace) -> dict[str, Any]:
    torch.set_grad_enabled(False)
    torch.set_num_threads(cores())
    dtype = DTYPES[options.precision]
    print("making networks", flush=True)
    case = Case.random(options.channels, (options.latent, options.latent), options.frames)
    exact = None
    with tempfile.TemporaryDirectory(prefix="pyengine-streamingt2v-") as scratch:
        folder = Path(scratch)
        print("exporting", flush=True)
        bundle = case.bundle(folder / "bundle")
        if not options.no_errors:
            print("the step in fp32, as what is exact", flush=True)
            exact = Plain(case, torch.float32, False).prediction()
        inputs = case.inputs(torch.float32)
        case.to(dtype)
        print("building", flush=True)
        plan = Planned(inputs, bundle, options.backend, options.precision, folder / "plans")
        contenders: dict[str, Any] = {
            "plan": plan,
            "plain_eager": Plain(case, dtype, False),
            "cached_eager": Cached(case, dtype, False),
        }
        if not options.no_compile:
            contenders["plain_compile"] = Plain(case, dtype, True)
            contenders["cached_compile"] = Cached(case, dtype, True)
        times = measure(contenders, options.rounds)
        errors = {}
        if exact is not None:
            errors = {name: relative_error(runner.prediction(), exact) for name, runner in contenders.items()}
        result = report(options, case, plan, times, errors)
    if not options.no_savings:
        result["savings"] = saved(
            case,
            dtype,
            options.rounds,
            1e-3 * min(result["ms"][n] for n in result["ms"] if n.startswith("plain")),
        )
    result["peak_memory_mb"] = round(peak_memory_mb())
    return result


def report(
    options: argparse.Namespace,
    case: Case,
    plan: Planned,
    times: dict[str, list[float]],
    errors: dict[str, float],
) -> dict[str, Any]:
    middle = {name: median(values) for name, values in times.items()}
    plain, cached = (
        min(seconds for name, seconds in middle.items() if name.startswith(kind))
        for kind in ("plain", "cached")
    )
    # Of each round by itself, so that a disturbance meets both.
    by_round = {
        kind: [
            min(times[n][i] for n in times if n.startswith(kind)) / times["plan"][i]
            for i in range(options.rounds)
        ]
        for kind in ("plain", "cached")
    }
    return {
        "machine": machine(),
        "channels": options.channels,
        "latent": list(case.sizes.latent),
        "frames": case.sizes.frames,
        "parameters": sum(
            p.numel() for part in (case.networks.base_model, case.networks.unet) for p in part.parameters()
        ),
        "precision": options.precision,
        "backend": options.backend,
        "rounds": options.rounds,
        "ms": {name: round(seconds * 1e3, 1) for name, seconds in middle.items()},
        "ms_spread": {
            name: [round(min(values) * 1e3, 1), round(max(values) * 1e3, 1)] for name, values in times.items()
        },
        "times_faster_with_caches": round(plain / middle["plan"], 3),
        "times_faster_bare": round(cached / middle["plan"], 3),
        "times_faster_by_round": {
            kind: [round(value, 3) for value in values] for kind, values in by_round.items()
        },
        "relative_error": {name: float(f"{error:.3g}") for name, error in errors.items()},
        "goals": {"times_faster_with_caches": GOAL_WITH_CACHES, "times_faster_bare": GOAL_BARE},
    }


def saved(case: Case, dtype: torch.dtype, rounds: int, step: float) -> list[dict[str, Any]]:
    """Per chunk, and as a share of the seconds of 50 plain steps of `step` seconds."""
    found = []
    for saving in savings(case, dtype):
        print(f"timing {saving.name}", flush=True)
        seconds = seconds_of(saving.run, rounds)
        instead = 0.0 if saving.instead is None else seconds_of(saving.instead, rounds)
        per_chunk = seconds * (saving.before - saving.after) - instead * saving.before
        found.append(
            {
                "what": saving.name,
                "ms": round(seconds * 1e3, 2),
                "ms_instead": None if saving.instead is None else round(instead * 1e3, 2),
                "times_per_chunk_released": round(saving.before, 2),
                "times_per_chunk_here": saving.before if saving.instead else saving.after,
                "saved_seconds_per_chunk": round(per_chunk, 3),
                "share_of_50_plain_steps": round(per_chunk / (STEPS * step), 4),
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers here")
    parser.add_argument(
        "--channels", type=int, default=320, help="of the first level, a multiple of 64 (default: 320)"
    )
    parser.add_argument(
        "--latent", type=int, default=32, help="rows and columns of latents, a multiple of 8 (default: 32)"
    )
    parser.add_argument("--frames", type=int, default=16, help="of the window (default: 16)")
    parser.add_argument("--precision", choices=DTYPES, default="bf16")
    parser.add_argument("--backend", default="openvino")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument(
        "--no-errors", action="store_true", help="leave out the step in fp32 and what each is off from it"
    )
    parser.add_argument(
        "--no-savings", action="store_true", help="leave out what each thing that is kept saves"
    )
    options = parser.parse_args()
    result = benchmark(options)
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
