"""What the engine is compared with: the same weights, schedule and noise in PyTorch and plain ONNX Runtime.

peers = Peers(bundle, prompt="a red circle bounces over a blue background", seed=7, precision="bf16")
for clip in peers.clips("torch_eager"): ...       # endless, uint8 [frames, height, width, 3]
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from pyengine.bundle.bundle import Bundle
from pyengine.engine import load

from ..families import family_of
from ..families.shapes.modules import Modules, load_modules
from .stream import TorchOptions, TorchStream

__all__ = ["DEFAULT", "NAMES", "Peers", "TorchOptions", "TorchStream", "load_modules", "names_for"]

# name -> (how it is compiled, whether the context is recomputed); these run at the engine's precision.
_TORCH: dict[str, tuple[str | None, bool]] = {
    "torch_eager": (None, False),
    "torch_compile": ("default", False),
    "torch_compile_frozen": ("frozen", False),
    "torch_compile_autotune": ("autotune", False),
    "torch_recompute": (None, True),
}
ONNXRUNTIME = "onnxruntime"  # the whole graph, float32, default options
NAMES = (*_TORCH, ONNXRUNTIME)
DEFAULT = ("torch_eager", "torch_compile", "torch_compile_frozen", "torch_recompute", ONNXRUNTIME)


def names_for(bundle: Bundle) -> tuple[str, ...]:
    """The peers that are measured unless others are named: in PyTorch where the family has its stream there."""
    return DEFAULT if family_of(bundle).streams_in_torch else (ONNXRUNTIME,)


class Peers:
    """Starts peers of one bundle on one prompt and seed. `cache_dir` is for the plan of ONNX Runtime."""

    def __init__(
        self,
        bundle: Bundle,
        *,
        prompt: str,
        seed: int,
        precision: str,
        threads: int | None = None,
        cache_dir: Path | None = None,
    ) -> None:
        self._bundle, self._prompt, self._seed = bundle, prompt, seed
        self._dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
        self._threads, self._cache = threads, cache_dir
        self._modules: Modules | None = None
        if threads:
            torch.set_num_threads(threads)

    def clips(self, name: str) -> Iterator[np.ndarray]:
        """The peer's endless clips, uint8 [frames, height, width, 3]."""
        if name == ONNXRUNTIME:
            return self._onnxruntime()
        compiled, recompute = _TORCH[name]
        if self._modules is None:
            self._modules = load_modules(self._bundle)
        modules = copy.deepcopy(self._modules)  # a stream changes dtype and layout of its modules
        options = TorchOptions(self._dtype, compiled, recompute)
        return TorchStream(self._bundle, modules, options, prompt=self._prompt, seed=self._seed).clips()

    def _onnxruntime(self) -> Iterator[np.ndarray]:
        engine = load(
            self._bundle.folder,
            backend="onnxruntime",
            choice="inline",
            precision="fp32",
            cache_dir=self._cache,
            threads=self._threads,
        )
        while True:  # a method that makes one clip makes it again
            with engine.stream(self._prompt, seed=self._seed) as stream:
                yield from stream.clips()
