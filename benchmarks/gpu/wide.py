"""The 1152-wide denoiser of benchmarks/wide.py on a GPU: our plan beside PyTorch on the same weights and inputs.

    python benchmarks/gpu/wide.py tensorrt --json FILE [--roofline FILE] [--work FOLDER]
    ... onnxruntime, torch (see torch_segments.py), and the peers torch_eager, torch_compile

Two blocks, 30 active frames of 105 tokens before a ring of 5, both guidance branches; random weights, so no network is needed. A
time is of one call of the network again and again, the ring left as it is. `of_roof` is the share of the larger of two bounds: its
products at the measured matrix rate, its weights and ring read once at the measured copy bandwidth. The error is against float32 in
PyTorch on the same card; allowed is twice that of PyTorch eager in the same precision.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import stream
import torch
from roofline import write

from pyengine.bundle import Bundle

sys.path.insert(0, str(Path(__file__).parents[1]))
from wide_case import BRANCHES, RING, Case, PlanRunner, TorchRunner, WideConfig, export_bundle, relative_error

DEPTH, FRAMES = 2, 30
FLOOR = 1e-3  # relative error: half a unit in the last place of bf16 is 2e-3
WARM, ROUNDS, REPLAYS = 5, 5, 20


def bundle_of(case: Case, work: Path) -> Bundle:
    """The case as a bundle in `work`, where the first contender leaves it for the others."""
    folder = work / f"wide-{case.config.width}-{case.config.depth}"
    if not folder.exists():
        scratch = Path(tempfile.mkdtemp(dir=work))
        export_bundle(copy.deepcopy(case), scratch / "bundle")
        (scratch / "bundle").rename(folder)  # whole or not at all
        shutil.rmtree(scratch)
    return Bundle.load(folder)


def work_of(case: Case) -> dict[str, float]:
    """What one call has to do: operations of its products, and bytes of weights and ring in 16 bits."""
    config, frames = case.config, case.frames
    pairs = frames * (frames + 1) // 2 + frames * min(RING, frames)  # levels rise along the window
    ring_rows = BRANCHES * config.tokens_per_frame * config.width * config.depth
    weights = sum(parameter.numel() for parameter in case.module.parameters())
    return {
        "operations": case.dense_flops() + 4.0 * ring_rows * pairs,
        "bytes": 2.0 * (weights + 2 * ring_rows * RING),
    }


def bound_ms(work: dict[str, float], roof: dict[str, float]) -> float:
    by_matrix = work["operations"] / roof["matrix_bf16_per_second"]
    return 1e3 * max(by_matrix, work["bytes"] / roof["copy_bytes_per_second"])


def measure(run: Callable[[], object], wait: Callable[[], object]) -> dict[str, Any]:
    """Of calls enqueued one behind the other, with the shares of them in which the card is idle."""

    def replay() -> None:
        for _ in range(REPLAYS):
            run()
        wait()

    for _ in range(WARM):
        run()
    wait()
    rounds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        replay()
        rounds.append(1e3 * (time.perf_counter() - start) / REPLAYS)
    return {"ms": median(rounds), "rounds": rounds, "on_card": stream.card_time(replay)}


def wait_for_card() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def bench(
    contender: str,
    case: Case,
    work: Path,
    cache: str | None,
    roof: dict[str, float] | None,
    device: str = "cuda",
) -> dict[str, Any]:
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    peer = contender in stream.PEERS
    precision = "bf16" if peer else stream.fast(contender)
    exact = TorchRunner(copy.deepcopy(case), None, device, torch.float32).velocity()
    eager = TorchRunner(copy.deepcopy(case), None, device, stream.DTYPES[precision])
    torch_error = relative_error(eager.velocity(), exact)
    found: dict[str, Any] = {"contender": contender, "precision": precision, "depth": case.config.depth}
    runner: PlanRunner | TorchRunner = eager
    if contender == "torch_compile":
        runner = TorchRunner(copy.deepcopy(case), stream.PEERS[contender], device)
    elif not peer:
        del eager
        if contender == "torch":
            import torch_segments

            torch_segments.register()
        options = {"backend": contender, "device": "cuda", "precision": precision, "choice": "cut"}
        runner = PlanRunner(case, bundle_of(case, work), Path(cache) if cache else work / "plans", **options)
    error = relative_error(runner.velocity(), exact)
    allowed = 2 * torch_error + FLOOR
    found |= {"error": error, "allowed": allowed, "good": bool(error <= allowed)}
    if isinstance(runner, PlanRunner):
        found |= measure(runner, runner.executor.synchronize)
        found["graphs"] = list(getattr(runner.executor, "graphs", ()))
    else:
        found |= measure(runner, wait_for_card)
    found |= work_of(case)
    if roof is not None:
        found["bound_ms"] = bound_ms(found, roof)
        found["of_roof"] = found["bound_ms"] / found["ms"]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("contender", choices=(*stream.PRECISIONS, *stream.PEERS))
    parser.add_argument("--json", type=Path, help="also write the result there")
    parser.add_argument("--work", type=Path, help="where the bundle is kept between contenders")
    parser.add_argument("--cache", default=os.environ.get("PYENGINE_CACHE"), help="where plans are kept")
    parser.add_argument("--roofline", type=Path, help="JSON of roofline.py, for the bound beside the figures")
    parser.add_argument("--frames", type=int, default=FRAMES, help=f"active frames (default {FRAMES})")
    parser.add_argument(
        "--width", type=int, default=1152, help="smaller ones are for a quick look; heads stay 16"
    )
    parser.add_argument("--depth", type=int, default=DEPTH, help=f"blocks (default {DEPTH})")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("wide.py: skipped, no GPU or a PyTorch without CUDA")
        return 0
    torch.set_grad_enabled(False)
    case = Case.random(replace(WideConfig(), width=options.width, depth=options.depth), options.frames)
    with tempfile.TemporaryDirectory(prefix="pyengine-wide-") as scratch:
        work = options.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        result = bench(options.contender, case, work, options.cache, stream.known_roof(options.roofline))
    write(options.json, result)
    print(json.dumps(result))
    return 0 if result["good"] else 1


if __name__ == "__main__":
    sys.exit(main())
