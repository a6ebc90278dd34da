"""Speed of one LVDM UNet call beside PyTorch: `python benchmarks/lvdm.py [--configuration sky_pred] [--size small]`.

The same weights in pyengine (bf16 where the processor has it, our kernel cut in or the op inlined, whichever the
build found faster; and with INT8 segments) and in PyTorch eager and torch.compile at the same precision, in turns
in one process, so that a disturbance meets all. A call is one network evaluation with guidance: two rows.

`--size full` is the released configuration (0.55 G parameters; about 10 GB of memory and 10 minutes on two cores), `small` the same
topology at a quarter of the width. `--quick`: two rounds, without torch.compile, nothing written.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pyengine.build.builder import build
from pyengine.bundle.bundle import Bundle
from pyengine.bundle.variant import Variant
from pyengine.export.families.lvdm.components import Denoiser
from pyengine.export.families.lvdm.export import (
    Modules,
    clip_method,
    components,
    export_bundle,
    random_modules,
)
from pyengine.export.families.lvdm.released import configuration
from pyengine.export.quantise import quantise
from pyengine.runtime.executor import Executor
from pyengine.runtime.program import Program

RESULTS = Path(__file__).parent / "results" / "lvdm.json"
ROWS = 2
PAUSE_SECONDS = 0.05  # between contenders: the threads of the one before stop spinning
Runner = Callable[[], np.ndarray]


def small(name: str) -> Modules:
    """The released topology at 64 (text to video: 96) channels on 16x16 latents, every level and block kept."""
    config = configuration(name)
    unet = config.unet | {"model_channels": 96 if config.is_text else 64}
    shrunk = type(config)(
        unet, config.autoencoder, 1.0, 0.0, config.betas, config.clip_frames, config.is_text
    )
    return random_modules({"prediction": shrunk}, (16, 16))


def torch_runner(modules: Modules, precision: str, compiled: bool) -> Runner:
    """The denoiser in PyTorch, constants split off as in the bundle, on the same inputs."""
    module, inputs = components(modules)["prediction"]
    assert isinstance(module, Denoiser)
    call: Any = torch.compile(module) if compiled else module

    @torch.inference_mode()
    def run() -> np.ndarray:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            return call(**inputs).float().numpy()

    return run


def engine_runner(
    bundle: Bundle, modules: Modules, precision: str, cache: Path, choice: str
) -> tuple[Runner, Any]:
    """The compiled denoiser on the same inputs, and the part of the plan that says which choice won."""
    variant = Variant.of("prediction", rows=ROWS)
    plan = build(bundle, variants=[variant], precision=precision, cache_dir=cache, choice=choice)
    executor = Executor(Program(plan))
    inputs = executor.inputs(variant)
    for name, value in components(modules)["prediction"][1].items():
        flat = (
            {name: value}
            if isinstance(value, torch.Tensor)
            else {f"{name}.{i}": v for i, v in enumerate(value)}
        )
        for key, tensor in flat.items():
            array = inputs[key]
            array[...] = (
                tensor.bfloat16().view(torch.uint16) if array.dtype == np.uint16 else tensor
            ).numpy()

    def run() -> np.ndarray:
        executor.run(variant)
        return executor.output(variant, "predicted")

    return run, plan.part(variant)


def in_turns(runners: dict[str, Runner], rounds: int) -> dict[str, list[float]]:
    """Seconds of every runner in every round, two warm-up runs each."""
    for run in runners.values():
        run(), run()
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(rounds):
        for name, run in runners.items():
            time.sleep(PAUSE_SECONDS)
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def measure(
    name: str, size: str, rounds: int, folder: Path, with_int8: bool, with_compile: bool
) -> dict[str, Any]:
    modules = small(name) if size == "small" else random_modules({"prediction": configuration(name)})
    modules.rounded()
    for part in modules.parts():
        part.requires_grad_(False)
    bundle = export_bundle(
        modules, folder / "bundle", f"lvdm-{name}", clip_method(modules, 1.0), only=("prediction",)
    )
    precision = "bf16" if torch.backends.mkldnn.is_available() and _has_bf16() else "fp32"
    runners: dict[str, Runner] = {}
    run, part = engine_runner(bundle, modules, precision, folder / "cache", "auto")
    runners[f"pyengine {precision}"] = run
    if with_int8:
        variant = Variant.of("prediction", rows=ROWS)
        calls = calibration(modules)
        lean = quantise(bundle, "prediction", variant, calls, folder / "int8", cache_dir=folder / "cache")
        runners["pyengine int8"] = engine_runner(lean, modules, precision, folder / "cache", "cut")[0]
    runners[f"torch eager {precision}"] = torch_runner(modules, precision, compiled=False)
    if with_compile:
        runners[f"torch.compile {precision}"] = torch_runner(modules, precision, compiled=True)
    exact = torch_runner(modules, "fp32", compiled=False)()
    seconds = in_turns(runners, rounds)
    scale = float(np.abs(exact).max())
    errors = {label: float(np.abs(run() - exact).max()) / scale for label, run in runners.items()}
    medians = {label: statistics.median(values) for label, values in seconds.items()}
    best = min(value for label, value in medians.items() if label.startswith("torch"))
    return {
        "configuration": name,
        "size": size,
        "choice": part.choice,
        "choice_seconds": dict(part.seconds),
        "median_seconds": medians,
        "rounds": seconds,
        "error_of_max": errors,
        "faster_than_best_torch": {
            label: best / medians[label] for label in medians if label.startswith("pyengine")
        },
        "machine": f"{platform.processor() or platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "torch": torch.__version__,
    }


def calibration(modules: Modules, calls: int = 4) -> list[dict[str, np.ndarray]]:
    """Calls of the denoiser at noise levels from clean to noise."""
    inputs = components(modules)["prediction"][1]
    rng = np.random.default_rng(0)
    made = []
    for index in range(calls):
        flat: dict[str, np.ndarray] = {}
        for name, value in inputs.items():
            flat |= {name: value.numpy()} if isinstance(value, torch.Tensor) else {}
            flat |= {f"{name}.{i}": v.numpy() for i, v in enumerate(value)} if isinstance(value, list) else {}
        flat["latents"] = rng.standard_normal(flat["latents"].shape, np.float32) * (0.5 + 0.5 * index / calls)
        made.append(flat)
    return made


def _has_bf16() -> bool:
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return "amx_bf16" in flags or "avx512_bf16" in flags


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--configuration", default="sky_pred")
    parser.add_argument("--size", choices=("small", "full"), default="small")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--no-int8", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument(
        "--output", type=Path, default=RESULTS, metavar="FILE", help="JSON that the figures are added to"
    )
    arguments = parser.parse_args()
    rounds = 2 if arguments.quick else arguments.rounds
    with tempfile.TemporaryDirectory() as folder:
        result = measure(
            arguments.configuration,
            arguments.size,
            rounds,
            Path(folder),
            not arguments.no_int8,
            not arguments.quick,
        )
    print(json.dumps({key: value for key, value in result.items() if key != "rounds"}, indent=1))
    if arguments.quick:
        return
    known = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    known[f"{arguments.configuration}.{arguments.size}"] = result
    arguments.output.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
