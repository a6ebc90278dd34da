"""Speed of ART-V frame by frame beside PyTorch: `python benchmarks/artv.py [--bundle shapes-artv]`.

The network of the bundled model, trained or not, in pyengine (bf16 where the processor has it) and in PyTorch eager and torch.compile at
the same precision, with the same loop: text and anchor once, the adapter once per frame, S guided steps, one decode. Contenders take turns
in one process, frame by frame, so that a disturbance meets all. Then what a frame is made of: adapter, one step and decode, each alone.
Adds its figures to results/artv.json. `--quick`: a few frames, without torch.compile, nothing written.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import pyengine
from pyengine.bundle.variant import Variant
from pyengine.export.families.artv.assembly import Modules, components
from pyengine.export.families.artv.export import export_bundle, random_small_modules
from pyengine.export.families.shapes import autoencoder as causal
from pyengine.methods.artv import timesteps_of
from pyengine.schedule.samplers import alphas_cumprod, frame_noise, make_sampler

RESULTS = Path(__file__).parent / "results" / "artv.json"
PROMPT = "a red circle bounces over a blue background"
PAUSE_SECONDS = 0.02  # between contenders: the threads of the one before stop spinning


def in_torch(modules: Modules, precision: str, compiled: bool) -> Iterator[np.ndarray]:
    """Frames of the same loop in PyTorch, for ever: uint8 [4, 64, 64, 3] each time."""
    parts = {name: module.eval() for name, (module, _) in components(modules).items()}
    calls: dict[str, Any] = {name: torch.compile(part) if compiled else part for name, part in parts.items()}
    how, config = modules.method, modules.denoiser.config
    sampler = make_sampler(
        "ddim", alpha_bar=alphas_cumprod(*config.betas, config.timesteps), predicts=config.predicts
    )
    ladder = [
        (t + 1) / config.timesteps for t in timesteps_of(how["steps"], config.timesteps, how["spacing"])
    ]
    ladder.append(0.0)
    scales = [
        sampler(np.array([now], np.float32), np.array([then], np.float32)) for now, then in pairwise(ladder)
    ]
    weights = torch.tensor([how["guidance"], 1 - how["guidance"]])
    shape = (config.unet.channels, *modules.latent_size)
    decoder = modules.codec[1]  # type: ignore[index]
    assert isinstance(decoder, causal.Decoder)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        text = [each[:, None] for each in calls["text_encoder"](modules.null)]
        memory = decoder.initial_memory()
        one, none = torch.ones(1), torch.zeros(1)
        latents: list[Tensor] = []
        anchor: list[Tensor] = []
        for frame in range(1 << 30):
            present = one if latents else none
            newest = latents[-1:] + latents[-2:-1] or [torch.zeros(shape)]
            seen = torch.stack((newest * 2)[: config.adapter.references])
            condition, *features = calls["references"](seen, present, one, none)
            if frame < 2:
                anchor = list(calls["anchor"]((latents or newest)[0][None], present))
            x = torch.from_numpy(frame_noise(0, frame, shape))
            for level, scale in zip(ladder, scales, strict=False):
                found = calls["denoiser"](
                    torch.stack([seen[0], x])[None],
                    torch.tensor([[0.0, level]]),
                    condition[None],
                    text,
                    [each[None] for each in anchor],
                    [each[None] for each in features],
                )
                guided = torch.tensordot(weights, found[:, 0, 1].float(), 1)
                x = float(scale.sample[0]) * x + float(scale.prediction[0]) * guided
            latents = [*latents[-1:], x]
            frames, *memory = calls["decoder"](x[None], *memory)  # type: ignore[assignment]
            yield frames[0].numpy()


def in_turns(contenders: dict[str, Callable[[], object]], rounds: int, warm: int) -> dict[str, list[float]]:
    """Seconds of every contender in every round."""
    for run in contenders.values():
        for _ in range(warm):
            run()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            time.sleep(PAUSE_SECONDS)
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def parts_of(engine: Any, rounds: int) -> dict[str, float]:
    """Median seconds of each network of a frame, alone."""
    with engine.stream(PROMPT, frames=4) as stream:
        next(stream)
        executor = stream._executor
        sizes = {"branches": len(stream._state.weights), "streams": 1}
        runs = {
            "adapter": Variant.of("references"),
            "step": Variant.of("denoiser", **sizes),
            "decode": Variant.of("decoder", chunk=1),
        }
        contenders = {name: lambda variant=variant: executor.run(variant) for name, variant in runs.items()}
        return {name: statistics.median(values) for name, values in in_turns(contenders, rounds, 3).items()}


def measure(modules: Modules, folder: Path, threads: int, rounds: int, compiles: bool) -> dict[str, Any]:
    torch.set_num_threads(threads)
    for part in modules.parts():
        part.requires_grad_(False)
    bundle = export_bundle(modules, folder / "bundle", "artv")
    precision = "bf16" if _has_bf16() else "fp32"
    engine = pyengine.load(bundle.folder, threads=threads, precision=precision)
    with engine.stream(PROMPT, seed=0) as stream:
        clips = stream.clips()
        peers = {f"torch eager {precision}": in_torch(modules, precision, compiled=False)}
        if compiles:
            peers[f"torch.compile {precision}"] = in_torch(modules, precision, compiled=True)
        contenders: dict[str, Callable[[], object]] = {f"pyengine {precision}": lambda: next(clips)}
        contenders |= {name: lambda made=made: next(made) for name, made in peers.items()}
        seconds = in_turns(contenders, rounds, 6)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    best = min(value for name, value in medians.items() if name.startswith("torch"))
    own = medians[f"pyengine {precision}"]
    parts = parts_of(engine, rounds)
    steps = modules.method["steps"]
    frames = int(modules.video.frames_per_latent)
    return {
        "threads": threads,
        "steps": steps,
        "guidance": modules.method["guidance"],
        "median_seconds_per_latent": medians,
        "frames_per_second": {name: frames / value for name, value in medians.items()},
        "faster_than_best_torch": best / own,
        "seconds_of": parts,
        "seconds_of_a_latent_without_overlap": parts["adapter"] + steps * parts["step"] + parts["decode"],
        "machine": f"{platform.processor() or platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "torch": torch.__version__,
    }


def _has_bf16() -> bool:
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return "amx_bf16" in flags or "avx512_bf16" in flags


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=60, help="latents that each contender makes in turn")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument(
        "--output", type=Path, default=RESULTS, metavar="FILE", help="JSON that the figures are added to"
    )
    arguments = parser.parse_args()
    rounds = 3 if arguments.quick else arguments.rounds
    with tempfile.TemporaryDirectory() as folder:
        result = measure(random_small_modules(), Path(folder), arguments.threads, rounds, not arguments.quick)
    print(json.dumps(result, indent=1))
    if arguments.quick:
        return
    known = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    known[f"{arguments.threads} threads"] = result
    arguments.output.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
