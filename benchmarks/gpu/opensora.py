"""STDiT3 of Open-Sora v1.2 at its real widths on a GPU, as benchmarks/opensora.py measures it on a processor.

    python benchmarks/gpu/opensora.py tensorrt --json FILE [--roofline FILE] [--work FOLDER] [--size 240x426] [--depth 28]
    ... onnxruntime, torch (see torch_segments.py), and the peers torch_eager, torch_compile

A full window of PA-VDM: 35 latent frames, 5 of them clean, prompt and null text; two pairs of blocks (the released model: 28),
random weights, so nothing is downloaded. The peers project the text in every call, as the released sampler does. Ours has its
keys and values, and does what comes before the first text once for both branches: it has fewer operations to do, and they are
what its share of the matrix rate counts. network.py says what is measured.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import network
import torch

from pyengine.bundle.bundle import Bundle

sys.path.append(str(Path(__file__).parents[1]))
from opensora_case import Case, PlanRunner, TorchRunner, export_case, random_model

SIZE, DEPTH, WORDS = "240x426", 2, 120


@dataclass
class OpenSora:
    """`network.Network`"""

    case: Case

    @property
    def name(self) -> str:
        height, width = self.case.size
        return f"stdit3-{height}x{width}-{self.case.model.config.depth}"

    def facts(self) -> dict[str, Any]:
        return {"size": list(self.case.size), "depth": self.case.model.config.depth}

    def work(self, ours: bool) -> dict[str, float]:
        blocks = [block for pair in self.case.model.pairs() for block in pair]
        weights = sum(parameter.numel() for block in blocks for parameter in block.parameters())
        return {"operations": self.case.flops(shared_first=ours), "bytes": 2.0 * weights}

    def torch(self, compiled: str | None, device: str, dtype: torch.dtype) -> TorchRunner:
        return TorchRunner(self.case, compiled, device, dtype)

    def export(self, folder: Path) -> Bundle:
        return export_case(self.case, folder)

    def plan(self, bundle: Bundle, cache: Path, **options: Any) -> PlanRunner:
        return PlanRunner(self.case, bundle, cache, **options)


def main() -> int:
    parser = network.parser(__doc__)
    parser.add_argument("--size", default=SIZE, help=f"height x width of the video (default {SIZE})")
    parser.add_argument("--depth", type=int, default=DEPTH, help=f"pairs of blocks (default {DEPTH})")
    parser.add_argument("--words", type=int, default=WORDS, help=f"prompt tokens (default {WORDS})")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("opensora.py: skipped, no GPU or a PyTorch without CUDA")
        return 0
    height, width = map(int, options.size.split("x"))
    return network.main(
        options, lambda: OpenSora(Case(random_model(options.depth), (height, width), options.words))
    )


if __name__ == "__main__":
    sys.exit(main())
