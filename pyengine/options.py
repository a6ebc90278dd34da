"""EngineOptions: how a bundle is compiled and run, the same for load, build, the commands and the benchmarks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pyengine.settings import Range, check_fields

__all__ = ["EngineOptions"]


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Every option that decides what is compiled and where it is kept. Raises ConfigError that names the option.

    What goes together (a ring in fp8 and a GPU, `refit` and a backend that can) is checked where the backend is known.

    backend        "openvino" (CPU), "onnxruntime" (CPU, or CUDA with device "cuda") or "tensorrt" (CUDA)
    device         "auto": the backend's own
    precision      "auto": bf16 where the processor has it; fp16 on CUDA alone
    choice         "auto" times our kernels against the backend's own and keeps the faster; "cut" or "inline" forces one
    cache_dir      where plans are kept; None: PYENGINE_CACHE or the user's cache folder
    threads        of the backend and of our kernels; None: all cores
    refit          TensorRT engines that take the weights of another bundle with the same graphs without a rebuild
    ring           "fp8": keys and values of the context in 8 bits, on CUDA; "auto": the type of activations
    memory_budget  bytes that compiled networks and buffers may take together before those that no stream uses are dropped; None: no limit
    """

    backend: Literal["openvino", "onnxruntime", "tensorrt"] = "openvino"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    choice: Literal["auto", "cut", "inline"] = "auto"
    cache_dir: Path | None = None
    threads: Annotated[int, Range(1, 4096)] | None = None
    refit: bool = False
    ring: Literal["auto", "fp8"] = "auto"
    memory_budget: Annotated[int, Range(0)] | None = None

    def __post_init__(self) -> None:
        check_fields(self)
