"""How long the small LVDM's prediction model keeps a shape: `python benchmarks/lvdm_chains.py --training runs/lvdm`.

Chains of clips of keys, each conditioned on the last keys of the one before, in PyTorch. Of their last keys after some
of the clips: the share that still shows something that stands out from its background, and how far the colour of that is
from what it was after the first clip, and the background from its own. For levels of perturbation, guidance and
numbers of known keys. This is the table of docs/lvdm.md.
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from pyengine.bundle.bundle import Bundle
from pyengine.export.families.lvdm import UNet
from pyengine.export.families.lvdm.small import BETAS, PREDICTION, PREDICTS, TIMESTEPS
from pyengine.export.families.shapes.autoencoder import Decoder
from pyengine.export.families.shapes.modules import load_modules
from pyengine.schedule.hierarchy import ddim_timesteps
from pyengine.schedule.samplers import alphas_cumprod, ddim

# level, guidance, known keys: as shipped, without perturbation, as released, and what differs from those in one or two
SETTINGS = (
    (100, 0.0, 2), (0, 0.0, 2),
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


class Seen(NamedTuple):
    """What keys show: whether there is something [chains], its colour and that of the background [chains, 3], 0..255."""

    there: Tensor
    colour: Tensor
    background: Tensor


def look(decoder: Decoder, keys: Tensor) -> Seen:
    """At the third frame of keys [chains, 8, 8, 8]."""
    frames = torch.cat([decoder(key[None], *decoder.initial_memory())[0][2:3] for key in keys]) * 127.5
    background = frames.flatten(2).median(2).values[:, :, None, None]
    stands_out = (frames - background).abs().amax(1, keepdim=True) > CONTRAST
    pixels = stands_out.sum((2, 3))
    colour = (frames * stands_out).sum((2, 3)) / pixels.clamp(min=1)
    return Seen(pixels[:, 0] > LEAST_PIXELS, colour + 127.5, background.flatten(1) + 127.5)


def report(first: Seen, now: Seen) -> str:
    """Share that shows something / how far its colour moved / the background's, of 255 in the channel that moved most."""
    both = first.there & now.there
    moved = (now.colour - first.colour).abs().amax(1)[both].mean()
    background = (now.background - first.background).abs().amax(1).mean()
    return f"{now.there.float().mean():.2f} / {moved:.0f} / {background:.0f}"


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--training", type=Path, default=Path("runs/lvdm"))
    parser.add_argument("--chains", type=int, default=12)
    parser.add_argument(
        "--clips", type=int, nargs="+", default=(4, 7, 14), help="look after these, beside the first"
    )
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    model = UNet(**PREDICTION).eval()
    model.load_state_dict(load_file(arguments.training / "prediction" / "average.safetensors"))
    decoder = load_modules(Bundle.load("shapes")).decoder.eval()
    for level, guidance, known in SETTINGS:
        torch.manual_seed(0)
        keys = sample(model, None, level, guidance, arguments.chains, arguments.steps)
        first = look(decoder, keys[:, :, 3])
        cells = [report(first, first)]
        for clip in range(2, max(arguments.clips) + 1):
            keys = sample(model, keys[:, :, -known:], level, guidance, arguments.chains, arguments.steps)
            if clip in arguments.clips:
                cells.append(report(first, look(decoder, keys[:, :, 3])))
        print(f"| {level} | {guidance:g} | {known} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
