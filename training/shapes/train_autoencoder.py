"""Train the autoencoder on endless fresh scenes: `python -m training.shapes.train_autoencoder --help`.

With `--encoder FOLDER` the encoder of an earlier run (with `--bundle NAME`, that of a bundle) is kept as it is and only the decoder goes
on, in a folder of its own: so the decoder can improve after the denoiser has been trained on the encoder's latents. With `--whole` the
encoder goes on as well; its latents change, and the denoiser has to be trained on them afterwards.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from pyengine.bundle.bundle import Bundle
from pyengine.export.families.shapes.autoencoder import FRAMES_PER_LATENT, CausalMix, Decoder, Encoder
from pyengine.export.families.shapes.modules import autoencoder_weights, load_modules
from training.shapes.alignment import Alignment, CellLabels, label_cells
from training.shapes.trainer import Clock, Trainer, join_processes, learning_rate
from training.shapes.world import render, sample_scene

CLIP_LATENTS = 4
LEAST_CONTRAST = 0.2  # between neighbouring pixels of a range of 2; a gradient's rows differ by less
LATENT_NOISE = 0.15  # the decoder learns to bear what the denoiser leaves behind
ALIGNMENT_WEIGHT = 0.6


def sample_clips(rng: np.random.Generator, count: int) -> tuple[Tensor, CellLabels]:
    """Fresh clips [count, 16, 64, 64, 3] uint8 and what their latents should say, [4 * count, ...]."""
    pictures, labels = [], []
    for start in rng.integers(0, 2000, count):
        scene, frames = sample_scene(rng), range(start, start + CLIP_LATENTS * FRAMES_PER_LATENT)
        pictures.append(render(scene, frames))
        labels.append(label_cells(scene, frames))
    return torch.from_numpy(np.stack(pictures)), CellLabels(*map(torch.cat, zip(*labels, strict=True)))


class FreshClips(IterableDataset[tuple[Tensor, CellLabels]]):
    """Endless batches of `sample_clips`, different in every worker and after every resume."""

    def __init__(self, batch: int, seed: int) -> None:
        self.batch, self.seed = batch, seed

    def __iter__(self) -> Iterator[tuple[Tensor, CellLabels]]:
        worker = get_worker_info()
        rng = np.random.default_rng([self.seed, worker.id if worker else 0])
        while True:
            yield sample_clips(rng, self.batch)


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """L1 and L2 of the pixels and L1 of their differences between neighbours, which keeps edges sharp. [n, 3, height, width].

    Pixels near an edge of the target count up to nine times: most of a picture is background, and a star lives by its outline. Errors are
    taken relative to the contrast around them, or a green star on grey would be left a blob for the sake of a white one on black.
    """
    error = output - target
    steps = F.pad(target.diff(dim=-1), (0, 1)).abs() + F.pad(target.diff(dim=-2), (0, 0, 0, 1)).abs()
    steps = steps.amax(1, keepdim=True)
    contrast = F.max_pool2d(steps, 5, stride=1, padding=2)
    around = F.max_pool2d(steps, 17, stride=1, padding=8)
    around = torch.where(around > LEAST_CONTRAST, around.clamp(max=1), 1.0)
    error = error / around
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    weight = 1 + 8 * (contrast / around).clamp(max=1)
    return (weight * (error.abs() + 2 * error.square())).mean() + edges


def decode_clip(decoder: Decoder, latents: Tensor) -> Tensor:
    """Decode clips [count, latents, 8, 8, 8], each from an empty memory, in lock step. [count, 4 * latents, 3, 64, 64]."""
    count = latents.shape[0]
    x = decoder.coarse_in(decoder.stem(latents.flatten(0, 1)))
    x = _mix(decoder.coarse_mix, x, count)
    x = F.pixel_shuffle(decoder.up(decoder.coarse_out(x)), 2)
    x = _mix(decoder.fine_mix, x, count)
    x = F.pixel_shuffle(decoder.to_pixel(decoder.fine(x)), 2)
    x = F.pixel_shuffle(decoder.out(decoder.pixel(x)), 2)
    return x.unflatten(1, (FRAMES_PER_LATENT, 3)).flatten(0, 1).unflatten(0, (count, -1))


def _mix(mix: CausalMix, x: Tensor, count: int) -> Tensor:
    """CausalMix over a batch of clips at once: the frame before the first is zero."""
    clips = x.unflatten(0, (count, -1))
    shifted = torch.cat([torch.zeros_like(clips[:, :1]), clips[:, :-1]], 1).flatten(0, 1)
    return x + mix.previous(F.silu(shifted))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/autoencoder"), help="checkpoints and log; resumes from here"
    )
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--batch", type=int, default=8, help="clips of 16 frames per step")
    parser.add_argument(
        "--minutes",
        type=float,
        default=None,
        help="stop after this long; the learning rate then follows the clock",
    )
    parser.add_argument(
        "--encoder", type=Path, default=None, help="train the decoder alone, from this earlier run"
    )
    parser.add_argument(
        "--bundle", default=None, help="train the decoder alone, from the weights of this bundle"
    )
    parser.add_argument(
        "--whole", action="store_true", help="with --encoder or --bundle: train the encoder on as well"
    )
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument(
        "--workers",
        type=int,
        default=min(16, os.cpu_count() or 1) if torch.cuda.is_available() else 0,
        help="processes that draw scenes; beside a GPU one per core (default), else none",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()

    process = join_processes(arguments.device)
    torch.manual_seed(0)
    encoder, decoder = Encoder(), Decoder()
    if arguments.encoder is not None:
        torch.nn.ModuleDict({"encoder": encoder, "decoder": decoder}).load_state_dict(
            autoencoder_weights(arguments.encoder)
        )
    if arguments.bundle is not None:
        modules = load_modules(Bundle.load(arguments.bundle))
        encoder, decoder = modules.encoder.train(), modules.decoder.train()
    alone = (arguments.encoder is not None or arguments.bundle is not None) and not arguments.whole
    if alone:
        encoder.requires_grad_(False).eval()
    model = torch.nn.ModuleDict({"encoder": encoder, "decoder": decoder})
    if not alone:
        model["alignment"] = Alignment()
    model = model.to(arguments.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    trainer = Trainer(model, arguments.folder, peak_rate=arguments.rate, ema=0.998)
    seed = trainer.step + 1 + 1_000_003 * process
    torch.manual_seed(seed)
    source = DataLoader(FreshClips(arguments.batch, seed), batch_size=None, num_workers=arguments.workers)
    clock = Clock(arguments.steps, arguments.minutes)
    batches = iter(source)
    while (progress := clock.progress(trainer.step)) < 1:
        clips, labels = next(batches)
        clips, labels = (
            clips.to(arguments.device),
            CellLabels(*(part.to(arguments.device) for part in labels)),
        )
        with torch.autocast(arguments.device, torch.bfloat16):
            latents = encoder(clips.flatten(0, 1))
            noisy = latents + LATENT_NOISE * torch.rand(()) * torch.randn_like(latents)
            output = decode_clip(decoder, noisy.unflatten(0, (arguments.batch, -1)))
        target = clips.permute(0, 1, 4, 2, 3).float() * (2 / 255) - 1
        loss = reconstruction_loss(output.flatten(0, 1).float(), target.flatten(0, 1))
        read = {}
        if not alone:
            read["misread"], right = cast(Alignment, model["alignment"]).loss(latents.float(), labels)
            loss = loss + ALIGNMENT_WEIGHT * read["misread"]
            read["kinds_right"] = right
        trainer.update(loss, learning_rate(progress, trainer.step), read)
    trainer.save()


if __name__ == "__main__":
    main()
