"""How much windowed decoding differs from decoding a whole video at once, as published: `python benchmarks/lvdm_decoding.py`.

The released 3-D autoencoder at full width with random weights (its trained weights are not at hand; with them the
numbers will be others) decodes 36 latents of 4 x 4 places in one call, and in rounds of 12 as the method
`hierarchical` does with decode "windowed": a round sees some latents of the round before and the key behind it.
Two causes are told apart: GroupNorm takes its statistics over the window instead of the video, and the
convolutions, which look both ways in time, miss what lies outside.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor, nn

from pyengine.export.families.lvdm import Autoencoder3D
from pyengine.export.families.lvdm.released import configuration

RESULTS = Path(__file__).parent / "results" / "lvdm_decoding.json"
ROUND, LATENTS, SIDE, PER_LATENT = 12, 36, 4, 4
CONTEXTS = (0, 2, 4)


def videos(seed: int) -> dict[str, Tensor]:
    """Latents [1, 4, 36, 4, 4] of unit variance: independent frames, and frames that change slowly."""
    generator = torch.Generator().manual_seed(seed)
    still = torch.randn(1, 4, LATENTS, SIDE, SIDE, generator=generator)
    slow = still.clone()
    for frame in range(1, LATENTS):
        slow[:, :, frame] = 0.95 * slow[:, :, frame - 1] + (1 - 0.95**2) ** 0.5 * still[:, :, frame]
    return {"independent": still, "slow": slow}


def windowed(decoder: Autoencoder3D, latents: Tensor, context: int) -> Tensor:
    """Rounds of 12, each with `context` latents before it and one behind, both cut off again."""
    parts = []
    for start in range(0, LATENTS, ROUND):
        first, end = max(0, start - context), min(LATENTS, start + ROUND + 1)
        frames = decoder.decode(latents[:, :, first:end])
        skip = (start - first) * PER_LATENT
        parts.append(frames[:, :, skip : skip + ROUND * PER_LATENT])
    return torch.cat(parts, 2)


def frozen(decoder: Autoencoder3D, latents: Tensor) -> None:
    """Every GroupNorm takes from now on the statistics that it has for this video, whatever the window."""

    def keep(norm: nn.Module, given: tuple[Tensor], made: Tensor) -> Tensor:
        assert isinstance(norm, nn.GroupNorm)
        groups = given[0].unflatten(1, (norm.num_groups, -1))
        if not hasattr(norm, "kept"):
            norm.kept = torch.var_mean(groups, (2, 3, 4, 5), correction=0, keepdim=True)
        variance, mean = norm.kept  # type: ignore[misc]
        normal = ((groups - mean) * (variance + norm.eps).rsqrt()).flatten(1, 2)
        return normal * norm.weight[:, None, None, None] + norm.bias[:, None, None, None]

    for layer in decoder.modules():
        if isinstance(layer, nn.GroupNorm):
            layer.register_forward_hook(keep)
    decoder.decode(latents)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="one kind of video, one context; nothing written"
    )
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    contexts = CONTEXTS[1:2] if arguments.quick else CONTEXTS
    rows = []
    for kind, latents in list(videos(0).items())[: 1 if arguments.quick else None]:
        for statistics in ("of the window", "of the video"):
            torch.manual_seed(0)
            decoder = Autoencoder3D(**configuration("sky").autoencoder).eval()
            whole = decoder.decode(latents)
            spread = (whole - whole.mean((2, 3, 4), keepdim=True)).abs().mean()
            if statistics == "of the video":
                frozen(decoder, latents)
            for context in contexts:
                difference = (windowed(decoder, latents, context) - whole).abs().mean() / spread
                rows.append(
                    {
                        "latents": kind,
                        "statistics": statistics,
                        "left_context": context,
                        "difference": round(float(difference), 5),
                    }
                )
                print(rows[-1], flush=True)
    if not arguments.quick:
        arguments.output.write_text(
            json.dumps({"measure": "mean |difference| / mean |deviation|", "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
