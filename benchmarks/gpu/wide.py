"""The 1152-wide denoiser of benchmarks/wide.py on a GPU: our plan beside PyTorch on the same weights and inputs.

    python benchmarks/gpu/wide.py tensorrt --json FILE [--roofline FILE] [--work FOLDER]
    ... onnxruntime, torch (see torch_segments.py), and the peers torch_eager, torch_compile

Two blocks, 30 active frames of 105 tokens before a ring of 5, both guidance branches; random weights, so nothing is downloaded. The
ring is left as it is. network.py says what is measured.
"""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import network
import torch

from pyengine.bundle.bundle import Bundle

sys.path.append(str(Path(__file__).parents[1]))
from wide_case import BRANCHES, RING, Case, PlanRunner, TorchRunner, WideConfig, export_bundle

DEPTH, FRAMES = 2, 30


@dataclass
class Wide:
    """`network.Network`"""

    case: Case

    @property
    def name(self) -> str:
        return f"wide-{self.case.config.width}-{self.case.config.depth}"

    def facts(self) -> dict[str, Any]:
        return {"depth": self.case.config.depth}

    def work(self, ours: bool) -> dict[str, float]:
        config, frames = self.case.config, self.case.frames
        pairs = frames * (frames + 1) // 2 + frames * min(RING, frames)  # levels rise along the window
        ring_rows = BRANCHES * config.tokens_per_frame * config.width * config.depth
        weights = sum(parameter.numel() for parameter in self.case.module.parameters())
        return {
            "operations": self.case.dense_flops() + 4.0 * ring_rows * pairs,
            "bytes": 2.0 * (weights + 2 * ring_rows * RING),
        }

    def torch(self, compiled: str | None, device: str, dtype: torch.dtype) -> TorchRunner:
        return TorchRunner(copy.deepcopy(self.case), compiled, device, dtype)

    def export(self, folder: Path) -> Bundle:
        return export_bundle(copy.deepcopy(self.case), folder)

    def plan(self, bundle: Bundle, cache: Path, **options: Any) -> PlanRunner:
        return PlanRunner(self.case, bundle, cache, **options)


def main() -> int:
    parser = network.parser(__doc__)
    parser.add_argument("--frames", type=int, default=FRAMES, help=f"active frames (default {FRAMES})")
    parser.add_argument(
        "--width", type=int, default=1152, help="smaller ones are for a quick look; heads stay 16"
    )
    parser.add_argument("--depth", type=int, default=DEPTH, help=f"blocks (default {DEPTH})")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("wide.py: skipped, no GPU or a PyTorch without CUDA")
        return 0
    config = replace(WideConfig(), width=options.width, depth=options.depth)
    return network.main(options, lambda: Wide(Case.random(config, options.frames)))


if __name__ == "__main__":
    sys.exit(main())
