"""Train a small LVDM in the `shapes` world: `python -m training.lvdm.train_shapes --help`.

The prediction and the interpolation UNet, whose weights were never published, on latents of the autoencoder of the bundle `shapes` (the
same 8x in space and 4x in time as LVDM's own). Conditioning is the released one: mask channel, perturbed conditioning latents, perturbation
level as a label. The published models are unconditional, and so are these: no text. Scenes have one shape, not a small one, over a plain
background.

    python -m training.lvdm.train_shapes --folder runs/lvdm --minutes 70

With `--stages train`, once there is a corpus, it runs under `torchrun` as well.

Other than the released training: the networks predict v, since a noise of which alpha bar is 0.0007 can be named within 5 % by a network
that knows nothing of the picture below it; the loss is the squared error, as the figure of the paper says (the configuration: L1),
and counts the frames that are not known.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pyengine.bundle.bundle import Bundle
from pyengine.export.families.lvdm import UNet
from pyengine.export.families.lvdm.small import BETAS, INTERPOLATION, PREDICTION, TIMESTEPS
from pyengine.export.families.shapes.captions import build_tokenizer
from pyengine.export.families.shapes.modules import load_modules
from pyengine.schedule.samplers import alphas_cumprod
from training.shapes.trainer import Trainer, agreed, is_first, join_processes, learning_rate
from training.shapes.world import Scene, render, sample_scene

KEY_STRIDE = 4  # latents between key latents
MAX_NOISE_LEVEL = 250  # exclusive, as released: the last row of label_emb is never trained
CLIP_LATENTS, FRAMES_PER_LATENT = 24, 4
SHARD_CLIPS = 256
# Of clips. Released: 0.5 and 0.9; of a minute's prediction clips all but the first are conditional.
CONDITIONAL_SHARE = {"prediction": 0.75, "interpolation": 0.9}
BATCH = {"prediction": 24, "interpolation": 20}  # about the same number of latents
# What a key gets wrong stays, what is between keys does not.
TURNS = ("prediction", "interpolation", "prediction")


def plain_scene(rng: np.random.Generator) -> Scene:
    """A scene of one shape over one colour: an hour is not enough for the whole world.

    No small shape, of which little is left at the perturbation level.
    """
    while True:
        scene = sample_scene(rng)
        if len(scene.shapes) == 1 and scene.shapes[0].size != "small" and not scene.gradient:
            return scene


@torch.inference_mode()
def encode_corpus(folder: Path, bundle: str, shards: range) -> None:
    """Latents [256, 24, 8, 8, 8] float16 per shard, in the encoder's own units, which are about standard normal."""
    encoder = load_modules(Bundle.load(bundle)).encoder.eval()
    folder.mkdir(parents=True, exist_ok=True)
    for shard in track(shards):
        path = folder / f"{shard:04d}.safetensors"
        if path.exists():
            continue
        rng = np.random.default_rng(70_000 + shard)
        latents = []
        for _ in range(SHARD_CLIPS):
            start = int(rng.integers(0, 5000))
            span = range(start, start + CLIP_LATENTS * FRAMES_PER_LATENT)
            with torch.autocast("cpu", torch.bfloat16):
                latents.append(encoder(torch.from_numpy(render(plain_scene(rng), span))).half())
        save_file({"latents": torch.stack(latents)}, path)


def select_corpus(folder: Path, source: Path) -> None:
    """The same out of a corpus that `shapes.corpus` encoded: its clips of plain scenes, known by their captions, 20 latents each."""
    known = build_tokenizer().get_vocab()
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.glob("*.safetensors")):
        clips = load_file(path)
        other = [clips["tokens"].eq(known[word]).any(1) for word in ("and", "gradient", "small")]
        save_file({"latents": clips["latents"][~torch.stack(other).any(0)].contiguous()}, folder / path.name)


def load_corpus(folder: Path) -> Tensor:
    """[clips, 24, 8, 8, 8] float16 (20 latents where they were selected): latents, channels, height, width."""
    return torch.cat([load_file(path)["latents"] for path in sorted(folder.glob("*.safetensors"))])


def draw(latents: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Clean clips [B, 8, T, 8, 8] float32 and the mask [B, 1, T, 8, 8] of what is known of each.

    A prediction knows one key as released or, half of the time, two, which show a velocity.
    """
    batch = BATCH[name]
    frames, stride = (4, KEY_STRIDE) if name == "prediction" else (5, 1)
    pick = torch.randint(len(latents), (batch,))
    start = torch.randint(latents.shape[1] - stride * (frames - 1), (batch, 1))
    clean = latents[pick[:, None], start + stride * torch.arange(frames)].float().transpose(1, 2)
    known = torch.zeros(batch, frames)
    if name == "prediction":
        known[:, 0] = 1
        known[: batch // 2, 1] = 1
    else:
        known[:, [0, -1]] = 1
    known *= torch.rand(batch, 1) < CONDITIONAL_SHARE[name]
    return clean, known[:, None, :, None, None].expand(-1, 1, -1, *clean.shape[3:])


def clip_loss(model: UNet, clean: Tensor, mask: Tensor, alpha_bar: Tensor) -> Tensor:
    """Squared error of the velocity v = sqrt(abar) eps - sqrt(1 - abar) x0 (arXiv:2202.00512) over the frames that are not known.

    Known frames keep their own level and their own noise. A clip of which nothing is known gets no level either, as when sampling;
    the released training gives it a random one.
    """
    batch = len(clean)
    t, s = torch.randint(TIMESTEPS, (batch,)), torch.randint(MAX_NOISE_LEVEL, (batch,))
    of_known, of_others = (alpha_bar[step].reshape(-1, 1, 1, 1, 1) for step in (s, t))
    level = torch.where(mask > 0, of_known, of_others)
    noise = torch.randn_like(clean)
    noisy = level.sqrt() * clean + (1 - level).sqrt() * noise
    with torch.autocast("cpu", torch.bfloat16):
        given = mask.amax((1, 2, 3, 4))[:, None]  # [B, 1], 1 where something is known
        embedding = model.embed(t) + given * model.label_emb(s)
        predicted = model.denoise(torch.cat([noisy, mask], 1), model.project(embedding))
    velocity = level.sqrt() * noise - (1 - level).sqrt() * clean
    error = (predicted.float() - velocity).square().mean(1, keepdim=True)
    return (error * (1 - mask)).sum() / (1 - mask).sum()


def train(folder: Path, corpus: Path, minutes: float) -> None:
    """Both networks by turns, so that both are of use at any time. Resumes from the folder. `torchrun`: every process draws other clips."""
    process = join_processes("cpu")
    torch.manual_seed(1)
    latents = load_corpus(corpus)
    models = {"prediction": UNet(**PREDICTION), "interpolation": UNet(**INTERPOLATION)}
    trainers = {
        name: Trainer(model, folder / name, peak_rate=1.5e-3, ema=0.999, muon=True)
        for name, model in models.items()
    }
    torch.manual_seed(trainers["prediction"].step + 2 + 1_000_003 * process)
    alpha_bar = torch.from_numpy(alphas_cumprod(BETAS[0], BETAS[1], TIMESTEPS)).float()
    for progress in clock(folder, minutes):
        for name in TURNS:
            model = models[name]
            with sdpa_kernel(SDPBackend.MATH):  # much quicker than the flash kernel for so few tokens
                loss = clip_loss(model, *draw(latents, name), alpha_bar)
                trainers[name].update(loss, learning_rate(progress, trainers[name].step))
    for trainer in trainers.values():
        trainer.save()


def clock(folder: Path, minutes: float) -> Iterator[float]:
    """Yields the share of the time that has gone since the first start, until it is over."""
    path = folder / "started"
    if is_first() and not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{time.time()}\n")
    started = agreed(float(path.read_text()) if is_first() else 0.0)
    while (progress := agreed((time.time() - started) / 60 / minutes)) < 1:
        yield progress


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/lvdm"), help="checkpoints and logs")
    parser.add_argument("--corpus", type=Path, help="encoded clips; FOLDER/corpus unless given")
    parser.add_argument("--bundle", default="shapes", help="whose autoencoder makes the latents")
    parser.add_argument(
        "--select-from",
        type=Path,
        metavar="CORPUS",
        help="take the clips out of this corpus of `shapes.corpus` instead of encoding them",
    )
    parser.add_argument(
        "--shards",
        type=int,
        nargs=2,
        default=(0, 32),
        metavar=("FIRST", "END"),
        help="of 256 clips, to encode",
    )
    parser.add_argument("--minutes", type=float, default=70, help="of training, since its first start")
    parser.add_argument("--stages", nargs="+", choices=("corpus", "train"), default=("corpus", "train"))
    arguments = parser.parse_args()
    corpus = arguments.corpus or arguments.folder / "corpus"
    if "corpus" in arguments.stages and arguments.select_from is not None:
        select_corpus(corpus, arguments.select_from)
    elif "corpus" in arguments.stages:
        encode_corpus(corpus, arguments.bundle, range(*arguments.shards))
    if "train" in arguments.stages:
        train(arguments.folder, corpus, arguments.minutes)


if __name__ == "__main__":
    main()
