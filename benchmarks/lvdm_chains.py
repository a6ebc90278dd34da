"""How long the small LVDM's prediction model keeps a shape: `python benchmarks/lvdm_chains.py --training runs/lvdm`.

Chains of clips of keys, each conditioned on the last keys of the one before, in PyTorch; the share of chains whose
last key still shows something that stands out from its background, after every clip. For levels of perturbation,
guidance and numbers of known keys. This is the table of docs/lvdm.md; minutes, where quality_lvdm.py takes hours.
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from pyengine.bundle import Bundle
from pyengine.export.families.lvdm import UNet
from pyengine.export.families.lvdm.train_shapes import BETAS, PREDICTION, PREDICTS, TIMESTEPS
from pyengine.export.families.shapes.autoencoder import Decoder
from pyengine.export.families.shapes.modules import load_modules
from pyengine.hierarchy import ddim_timesteps
from pyengine.samplers import alphas_cumprod, ddim

# level, guidance, known keys
SETTINGS = (
    (100, 0.1, 1), (0, 0.1, 1), (100, 1.0, 1), (100, 0.1, 2), (0, 1.0, 2), (100, 1.0, 2), (200, 1.0, 2), (100, 3.0, 2),
)  # fmt: skip
CONTRAST, LEAST_PIXELS = 50.0, 30  # of 255; of 4,096


def sample(model: UNet, known: Tensor | None, level: int, guidance: float, chains: int, steps: int) -> Tensor:
    """A clip of 4 keys for every chain, as `Clips` samples it. [chains, 8, 4, 8, 8]"""
    alpha_bar = alphas_cumprod(*BETAS, TIMESTEPS)
    step = ddim(alpha_bar, 1.0, PREDICTS)
    x = torch.randn(chains, 8, 4, 8, 8)
    count = 0 if known is None else known.shape[2]
    if known is not None:
        known = alpha_bar[level] ** 0.5 * known + (1 - alpha_bar[level]) ** 0.5 * torch.randn_like(known)
    ladder = [*ddim_timesteps(steps), 0]
    for now, then in pairwise(ladder):
        mask = torch.zeros(chains, 1, 4, 8, 8)
        t = torch.full((chains,), now)
        labels = torch.full((chains,), level) if count else None
        if known is not None:
            x[:, :, :count], mask[:, :, :count] = known, 1
        with torch.autocast("cpu", torch.bfloat16):
            predicted = model(torch.cat([x, mask], 1), t, labels).float()
            if count and guidance:
                null = model(torch.cat([x, 0 * mask], 1), t).float()
                predicted = predicted + guidance * (predicted - null)
        a, b, c = (float(v[0]) for v in step([(now + 1) / TIMESTEPS], [(then + 1) / TIMESTEPS]))
        x = a * x + b * predicted + c * torch.randn_like(x)
    return x


def showing(decoder: Decoder, keys: Tensor) -> float:
    """Share of keys [chains, 8, 8, 8] whose third frame has something on its background."""
    frames = torch.cat([decoder(key[None], *decoder.initial_memory())[0][2:3] for key in keys]) * 127.5
    background = frames.flatten(2).median(2).values[:, :, None, None]
    pixels = ((frames - background).abs().amax(1) > CONTRAST).sum((1, 2))
    return float((pixels > LEAST_PIXELS).float().mean())


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--training", type=Path, default=Path("runs/lvdm"))
    parser.add_argument("--chains", type=int, default=12)
    parser.add_argument("--clips", type=int, default=7)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    model = UNet(**PREDICTION).eval()
    model.load_state_dict(load_file(arguments.training / "prediction" / "average.safetensors"))
    decoder = load_modules(Bundle.load("shapes")).decoder.eval()
    for level, guidance, known in SETTINGS:
        torch.manual_seed(0)
        keys = sample(model, None, level, guidance, arguments.chains, arguments.steps)
        shares = [showing(decoder, keys[:, :, 3])]
        for _ in range(arguments.clips - 1):
            last = keys[:, :, -known:]
            keys = sample(model, last, level, guidance, arguments.chains, arguments.steps)
            shares.append(showing(decoder, keys[:, :, 3]))
        print(
            f"| {level} | {guidance:g} | {known} | " + " | ".join(f"{s:.2f}" for s in shares) + " |",
            flush=True,
        )


if __name__ == "__main__":
    main()
