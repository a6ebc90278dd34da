"""Videos of the networks in training, several at a time: `python -m training.streamingt2v.sample --help` writes pictures of them.

The same loop as the engine's, in PyTorch, for what no bundle has: other kinds of conditioning, no anchor, and videos in the midst of a
training. `enhance` is the second stage, whose overlapping chunks share their noise or not, and are blended or not.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pyengine.bundle.bundle import Bundle
from pyengine.export.families.shapes.autoencoder import Decoder, FrameDecoder
from pyengine.export.families.shapes.captions import build_tokenizer, token_ids
from pyengine.export.families.shapes.modules import load_modules
from pyengine.export.families.shapes.text_encoder import null_ids
from pyengine.export.families.streamingt2v.small import (
    BETAS,
    CONDITION_FRAMES,
    FRAMES,
    PREDICTS,
    TIMESTEPS,
)
from pyengine.schedule.samplers import alphas_cumprod, ddim
from pyengine.schedule.timesteps import leading_timesteps, levels_of, with_first_alpha
from training.streamingt2v.model import CONDITIONINGS, Model

LATENT = (8, 8, 8)
ENHANCED_FRAMES, OVERLAP = FRAMES, 8
Blending = Literal["independent", "shared", "randomized"]


@dataclass(frozen=True)
class Sampling:
    """How windows are sampled. `anchored`: whether the anchor is shown."""

    steps: int = 25
    guidance: float = 2.0
    eta: float = 1.0
    anchored: bool = True


def ladder(steps: int) -> tuple[np.ndarray, tuple[float, ...]]:
    """Timesteps, highest first, and the levels between which they lead, highest first as well."""
    timesteps = leading_timesteps(steps, TIMESTEPS)
    return timesteps, levels_of(timesteps, TIMESTEPS)[::-1]


def denoise(
    model: Model,
    x: Tensor,
    texts: tuple[Tensor, Tensor],
    condition: Tensor | None,
    sampling: Sampling,
    random: torch.Generator,
) -> Tensor:
    """Windows of noise [n, 16, 8, 8, 8] to clean ones. texts: contexts of the prompts and of the null branch."""
    step = ddim(with_first_alpha(alphas_cumprod(BETAS[0], BETAS[1], TIMESTEPS)), sampling.eta, PREDICTS)
    timesteps, levels = ladder(sampling.steps)
    both = torch.cat(texts)
    given = None if condition is None else torch.cat([condition] * 2)
    for timestep, now, then in zip(timesteps, levels[:-1], levels[1:], strict=True):
        at = torch.full((2 * len(x),), int(timestep))
        prompt, null = model.predict(torch.cat([x] * 2), at, both, given).float().chunk(2)
        scales = step([now], [then])
        guided = null + sampling.guidance * (prompt - null)
        noise = torch.randn(x.shape, generator=random)
        x = (
            float(scales.sample[0]) * x
            + float(scales.prediction[0]) * guided
            + float(scales.noise[0]) * noise
        )
    return x


@torch.inference_mode()
def videos(
    model: Model, tokens: Tensor, latents: int, sampling: Sampling = Sampling(), seed: int = 0
) -> Tensor:
    """Latents [n, `latents`, 8, 8, 8] of captions [n, 20]: a first window of the text, then chunks of 8 with the 8 before."""
    random = torch.Generator().manual_seed(seed)
    count, null = len(tokens), null_ids().expand(len(tokens), -1)
    plain = (model.context(tokens), model.context(null))
    window = denoise(
        model, torch.randn(count, FRAMES, *LATENT, generator=random), plain, None, sampling, random
    )
    parts, anchor = [window], window[:, 0]
    grey = torch.zeros_like(anchor)
    texts = (model.context(tokens, anchor if sampling.anchored else grey), model.context(null, grey))
    while sum(part.shape[1] for part in parts) < latents:
        noise = torch.randn(count, FRAMES, *LATENT, generator=random)
        window = denoise(model, noise, texts, window[:, -CONDITION_FRAMES:], sampling, random)
        parts.append(window[:, CONDITION_FRAMES:])
    return torch.cat(parts, 1)[:, :latents]


@torch.inference_mode()
def enhance(
    model: Model,
    latents: Tensor,
    tokens: Tensor,
    blending: Blending = "randomized",
    strength: float = 0.5,
    sampling: Sampling = Sampling(steps=12, eta=0.0),
    seed: int = 0,
) -> Tensor:
    """Videos [n, frames, 8, 8, 8] noised to `strength` of the levels and denoised again by the text-to-video model, in chunks of 16
    that overlap by 8.

    independent  each chunk has its own noise, and the later chunk's frames of an overlap are kept
    shared       overlapping frames have the same noise
    randomized   and at every step each chunk takes over from the one before at a random frame of the overlap
    """
    random, draws = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    bar = with_first_alpha(alphas_cumprod(BETAS[0], BETAS[1], TIMESTEPS))
    step = ddim(bar, sampling.eta, PREDICTS)
    timesteps = np.linspace(strength * (TIMESTEPS - 1), 1, sampling.steps).round().astype(int)
    levels = levels_of(timesteps, TIMESTEPS)[::-1]
    starts = range(0, latents.shape[1] - OVERLAP, ENHANCED_FRAMES - OVERLAP)
    if starts[-1] + ENHANCED_FRAMES != latents.shape[1]:
        raise ValueError(f"expected 16 latent frames or 8 more each time but got {latents.shape[1]}")
    keep = float(bar(np.array(levels[0])))
    whole = torch.randn(latents.shape, generator=random)
    noise = [
        torch.randn(latents[:, :ENHANCED_FRAMES].shape, generator=random)
        if blending == "independent"
        else whole[:, start : start + ENHANCED_FRAMES]
        for start in starts
    ]
    parts = [
        keep**0.5 * latents[:, start : start + ENHANCED_FRAMES] + (1 - keep) ** 0.5 * each
        for start, each in zip(starts, noise, strict=True)
    ]
    texts = torch.cat([model.context(tokens), model.context(null_ids().expand(len(tokens), -1))])
    for timestep, now, then in zip(timesteps, levels[:-1], levels[1:], strict=True):
        scales = step([now], [then])
        for index, x in enumerate(parts):
            at = torch.full((2 * len(x),), int(timestep))
            prompt, null = model.predict(torch.cat([x] * 2), at, texts).float().chunk(2)
            guided = null + sampling.guidance * (prompt - null)
            parts[index] = float(scales.sample[0]) * x + float(scales.prediction[0]) * guided
        if blending == "randomized":
            parts = split(join(parts, [int(draws.integers(OVERLAP)) for _ in parts[1:]]))
    return join(parts, [0] * (len(parts) - 1))


def join(parts: Sequence[Tensor], splits: Sequence[int]) -> Tensor:
    """Chunks as one video; each but the first takes over at its frame of `splits`."""
    out = list(parts[:1])
    for part, place in zip(parts[1:], splits, strict=True):
        out[-1] = out[-1][:, : out[-1].shape[1] - OVERLAP + place]
        out.append(part[:, place:])
    return torch.cat(out, 1)


def split(video: Tensor) -> list[Tensor]:
    """The chunks of a video again."""
    hop = ENHANCED_FRAMES - OVERLAP
    return [video[:, start : start + ENHANCED_FRAMES] for start in range(0, video.shape[1] - OVERLAP, hop)]


@torch.inference_mode()
def frames_of(decoder: Decoder, latents: Tensor) -> np.ndarray:
    """Latents [frames, 8, 8, 8] of one video -> uint8 [4 * frames, 64, 64, 3]."""
    memory, found = decoder.initial_memory(), []
    for chunk in latents.split(16):
        frames, *memory = FrameDecoder(decoder)(chunk, *memory)
        found.append(frames.flatten(0, 1).numpy())
    return np.concatenate(found)


def load(folder: Path, conditioning: str = "cam") -> Model:
    """The averaged weights of a stage."""
    model = Model(conditioning).eval()
    model.load_state_dict(load_file(folder / "average.safetensors"))
    return model


def encode(captions: Sequence[str]) -> Tensor:
    """[n, 20]"""
    tokenizer = build_tokenizer()
    return torch.stack([torch.from_numpy(token_ids(tokenizer, caption)) for caption in captions])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="of a stage")
    parser.add_argument("captions", nargs="+")
    parser.add_argument("--conditioning", choices=CONDITIONINGS, default="cam")
    parser.add_argument(
        "--latents", type=int, default=FRAMES, help="latent frames of each video, 4 frames each"
    )
    parser.add_argument("--guidance", type=float, default=Sampling.guidance)
    parser.add_argument("--steps", type=int, default=Sampling.steps)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bundle", default="shapes", help="whose decoder goes with the latents")
    parser.add_argument(
        "--output", type=Path, default=Path("sheet.png"), help="one row of frames per caption"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = load(arguments.folder, arguments.conditioning)
    decoder = load_modules(Bundle.load(arguments.bundle)).decoder
    sampling = Sampling(arguments.steps, arguments.guidance)
    with sdpa_kernel(SDPBackend.MATH):
        found = videos(model, encode(arguments.captions), arguments.latents, sampling, arguments.seed)
    rows = []
    for latents in found:
        frames = frames_of(decoder, latents)
        rows.append(np.concatenate(list(frames[np.linspace(0, len(frames) - 1, 12).astype(int)]), 1))
    Image.fromarray(np.concatenate(rows)).save(arguments.output)


if __name__ == "__main__":
    main()
