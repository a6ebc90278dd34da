"""One call of a network on a GPU, our plan beside PyTorch on the same weights and inputs: what wide.py and opensora.py share.

A time is of one call of the network again and again. `of_roof` is the share of the larger of two bounds: its products at the
measured matrix rate, its weights and ring read once at the measured copy bandwidth; `of_matrix_rate` is the first alone. The error
is against float32 in PyTorch on the same GPU; allowed is twice that of PyTorch eager in the same precision.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import numpy as np
import stream
import torch
from roofline import write

from pyengine.bundle.bundle import Bundle

sys.path.append(str(Path(__file__).parents[1]))
from wide_case import relative_error

FLOOR = 1e-3  # relative error: half a unit in the last place of bf16 is 2e-3
WARM, ROUNDS, REPLAYS = 5, 5, 20


class Runner(Protocol):
    """The network behind a call, which only enqueues it."""

    def __call__(self) -> object: ...
    def velocity(self) -> np.ndarray: ...


class Network(Protocol):
    """A network with random weights, and how it is called."""

    name: str  # of its folder

    def facts(self) -> dict[str, Any]:
        """What tells it from others of its kind, for the report."""

    def work(self, ours: bool) -> dict[str, float]:
        """What one call has to do: `operations` of its products, and `bytes` of weights and ring in 16 bits."""

    def torch(self, compiled: str | None, device: str, dtype: torch.dtype) -> Runner: ...
    def export(self, folder: Path) -> Bundle: ...
    def plan(self, bundle: Bundle, cache: Path, **options: Any) -> Any:
        """A Runner that has an `executor`."""


def bundle_of(network: Network, work: Path) -> Bundle:
    """The network as a bundle in `work`, where the first contender leaves it for the others."""
    folder = work / network.name
    if not folder.exists():
        scratch = Path(tempfile.mkdtemp(dir=work))
        network.export(scratch / "bundle")
        (scratch / "bundle").rename(folder)  # whole or not at all
        shutil.rmtree(scratch)
    return Bundle.load(folder)


def measure(run: Callable[[], object], wait: Callable[[], object]) -> dict[str, Any]:
    """Of calls enqueued one behind the other, with the shares of them in which the GPU is idle."""

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
    return {"ms": median(rounds), "rounds": rounds, "on_gpu": stream.gpu_time(replay)}


def bounds(work: dict[str, float], roof: dict[str, float], milliseconds: float) -> dict[str, float]:
    by_matrix = 1e3 * work["operations"] / roof["matrix_bf16_per_second"]
    bound = max(by_matrix, 1e3 * work["bytes"] / roof["copy_bytes_per_second"])
    return {
        "bound_ms": bound,
        "of_roof": bound / milliseconds,
        "of_matrix_rate": by_matrix / milliseconds,
    }


def wait_for_gpu() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def bench(
    contender: str,
    network: Network,
    work: Path,
    cache: str | None,
    roof: dict[str, float] | None,
    device: str = "cuda",
) -> dict[str, Any]:
    """`device` is that of PyTorch."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    peer = contender in stream.PEERS
    precision = "bf16" if peer else stream.fast(contender)
    exact = network.torch(None, device, torch.float32).velocity()
    eager = network.torch(None, device, stream.DTYPES[precision])
    torch_error = relative_error(eager.velocity(), exact)
    found: dict[str, Any] = {"contender": contender, "precision": precision, **network.facts()}
    runner, wait = eager, wait_for_gpu
    if contender == "torch_compile":
        runner = network.torch(stream.PEERS[contender], device, torch.bfloat16)
    elif not peer:
        del eager
        if contender == "torch":
            import torch_segments

            torch_segments.register()
        options = {"backend": contender, "device": "cuda", "precision": precision, "choice": "cut"}
        runner = network.plan(bundle_of(network, work), Path(cache) if cache else work / "plans", **options)
        wait = runner.executor.synchronize
    error, allowed = relative_error(runner.velocity(), exact), 2 * torch_error + FLOOR
    found |= {"error": error, "allowed": allowed, "good": bool(error <= allowed)}
    found |= measure(runner, wait) | network.work(not peer)
    if not peer:
        found["graphs"] = list(getattr(runner.executor, "graphs", ()))  # type: ignore[attr-defined]
    return found if roof is None else found | bounds(found, roof, found["ms"])


def parser(description: str | None) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("contender", choices=(*stream.PRECISIONS, *stream.PEERS))
    made.add_argument("--json", type=Path, help="also write the result there")
    made.add_argument("--work", type=Path, help="where the bundle is kept between contenders")
    made.add_argument("--cache", default=os.environ.get("PYENGINE_CACHE"), help="where plans are kept")
    made.add_argument("--roofline", type=Path, help="JSON of roofline.py, for the bound beside the figures")
    return made


def main(options: argparse.Namespace, network: Callable[[], Network]) -> int:
    """Measures the contender, writes and prints what was found. Exit code."""
    torch.set_grad_enabled(False)
    with tempfile.TemporaryDirectory(prefix="pyengine-network-") as scratch:
        work = options.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        roof = stream.known_roof(options.roofline)
        result = bench(options.contender, network(), work, options.cache, roof)
    write(options.json, result)
    print(json.dumps(result))
    return 0 if result["good"] else 1
