"""What this GPU can do at most, measured: copy bandwidth and matrix rate. `python benchmarks/gpu/roofline.py [--json FILE]`.

Needs a PyTorch with CUDA. Every figure that a GPU benchmark reports stands beside these.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

FLUSH_BYTES = 256 << 20  # several times any L2 cache
HOST_CYCLES = 1_000_000  # of the GPU, half a millisecond: the host launches anything in less


@dataclass(frozen=True)
class Roofline:
    """Bytes and operations per second, on the GPU named."""

    gpu: str
    driver: str
    capability: str
    copy_bytes_per_second: float  # read plus written
    matrix_bf16_per_second: float
    matrix_fp16_per_second: float


def time_cold(run: Callable[[], object], rounds: int = 20, flush: torch.Tensor | None = None) -> list[float]:
    """Milliseconds of single runs on the GPU, each after the L2 cache was overwritten. The GPU is kept waiting until the host has
    enqueued the run behind the first mark: else a short run would be as long as its launch from Python.
    """
    if flush is None:
        flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    for _ in range(3):
        run()
    pairs = []
    for _ in range(rounds):
        flush.zero_()
        torch.cuda._sleep(HOST_CYCLES)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in pairs]


def copy_bandwidth() -> float:
    """Of copying 1 GiB to elsewhere in the GPU's memory: bytes read and written per second."""
    size = min(1 << 30, torch.cuda.mem_get_info()[0] // 4)
    source = torch.empty(size, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    milliseconds = statistics.median(time_cold(lambda: target.copy_(source)))
    return 2 * size / milliseconds * 1e3


def matrix_rate(dtype: torch.dtype, size: int = 8192) -> float:
    """Of a square product of random matrices by the vendor's library: operations per second."""
    a, b = (torch.randn(size, size, device="cuda", dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    milliseconds = statistics.median(time_cold(lambda: torch.mm(a, b, out=out)))
    return 2 * size**3 / milliseconds * 1e3


def measure() -> Roofline:
    """Takes a few seconds."""
    properties = torch.cuda.get_device_properties(0)
    return Roofline(
        gpu=properties.name,
        driver=_driver(),
        capability=f"{properties.major}.{properties.minor}",
        copy_bytes_per_second=copy_bandwidth(),
        matrix_bf16_per_second=matrix_rate(torch.bfloat16),
        matrix_fp16_per_second=matrix_rate(torch.float16),
    )


def write(path: Path | None, result: Any) -> None:
    """Whole or not at all, so that what is there when a step is stopped can be read."""
    if path is not None:
        scratch = path.with_suffix(".tmp")
        scratch.write_text(json.dumps(result, indent=1) + "\n")
        scratch.replace(path)


def _driver() -> str:
    try:
        with open("/proc/driver/nvidia/version") as file:
            words = file.readline().split()
    except OSError:
        return "unknown"
    return next((word for word in words if word[0].isdigit()), "unknown")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write it there")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("roofline.py: skipped, no GPU or a PyTorch without CUDA")
        return
    found = measure()
    write(options.json, asdict(found))
    print(f"{found.gpu}, driver {found.driver}, compute capability {found.capability}")
    print(f"copy      {found.copy_bytes_per_second / 1e9:8.0f} GB/s")
    print(f"bf16      {found.matrix_bf16_per_second / 1e12:8.1f} TFLOP/s")
    print(f"fp16      {found.matrix_fp16_per_second / 1e12:8.1f} TFLOP/s")


if __name__ == "__main__":
    main()
