"""Train a small LVDM in the `shapes` world: `python -m pyengine.export.families.lvdm.train_shapes --help`.

Three networks, one after the other: a 3-D autoencoder on endless fresh scenes, then the prediction and the interpolation UNet on its
latents, with the released conditioning (mask channel, perturbed conditioning latents, perturbation level as a label). The
published models are unconditional, and so are these: no text. Scenes have one shape over a plain background.

    python -m pyengine.export.families.lvdm.train_shapes --folder runs/lvdm --minutes 70

Every stage resumes where it stopped. Losses are squared errors, as the figure of the paper says (the released configuration: L1).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pyengine.samplers import alphas_cumprod

from ..shapes.train_autoencoder import reconstruction_loss
from ..shapes.training import Trainer
from ..shapes.world import WIDTH, render, sample_scene
from .autoencoder3d import Autoencoder3D, ResBlock
from .unet import UNet

AUTOENCODER: dict[str, Any] = {"n_hiddens": 16, "downsample": [4, 8, 8], "z_channels": 4, "embed_dim": 4}
PREDICTION: dict[str, Any] = {
    "in_channels": 5,
    "out_channels": 4,
    "model_channels": 32,
    "channel_mult": [1, 2],
    "num_res_blocks": 1,
    "attention_resolutions": [2],
    "num_heads": 4,
    "num_classes": 251,
    "use_scale_shift_norm": True,
    "kernel_size_t": 1,
    "padding_t": 0,
    "temporal_length": 4,
    "use_relative_position": True,
}
INTERPOLATION: dict[str, Any] = PREDICTION | {"temporal_length": 5}
BETAS, TIMESTEPS = (0.0015, 0.0155), 1000
KEY_STRIDE = 4  # latents between key latents
MAX_NOISE_LEVEL = 250  # exclusive, as released: the last row of label_emb is never trained
CROPPED_SHARE = 0.7
CLIP_FRAMES = 64  # 16 latents
SHARES = {"autoencoder": 0.5, "corpus": 0.06, "prediction": 0.22, "interpolation": 0.22}  # of the minutes


def train_autoencoder(folder: Path, minutes: float) -> None:
    """L1, L2 and edges of pixels; the latent is its mean (the released kl weight is 0), with a little noise for the decoder."""
    torch.manual_seed(0)
    model = start_linear(Autoencoder3D(**AUTOENCODER))
    trainer = Trainer(model, folder / "autoencoder", peak_rate=2e-3, ema=0.99)
    rng = np.random.default_rng(trainer.step + 1)
    for progress in clock(minutes):
        # Crops first, which show four times as many scenes for the same work; whole pictures for the last part.
        cropped = progress < CROPPED_SHARE
        clips = [fresh_clip(rng, 12, crop=32 if cropped else None) for _ in range(4 if cropped else 2)]
        target = to_pixels(torch.from_numpy(np.stack(clips)))
        half = {name: value.bfloat16() for name, value in model.named_parameters()}
        output = torch.func.functional_call(
            RoundTrip(model), {f"model.{name}": value for name, value in half.items()}, (target.bfloat16(),)
        )
        flat = (value.transpose(1, 2).flatten(0, 1) for value in (output.float(), target))
        trainer.update(pixel_loss(*flat, edges=progress > 0.5), rate_at(progress, trainer.step))
    trainer.save()


def pixel_loss(output: Tensor, target: Tensor, edges: bool) -> Tensor:
    """Colours first; then pixels near an edge count up to nine times. [frames, 3, height, width]"""
    if edges:
        return reconstruction_loss(output, target)
    error = output - target
    return (
        (error.abs() + 2 * error.square()).mean()
        + error.diff(dim=-1).abs().mean()
        + error.diff(dim=-2).abs().mean()
    )


def rate_at(progress: float, step: int) -> float:
    """Fraction of the peak rate: a short warm-up, then a cosine to 2 %."""
    return min(1.0, (step + 1) / 20) * (0.51 + 0.49 * math.cos(math.pi * progress))


@torch.no_grad()
def start_linear(model: Autoencoder3D) -> Autoencoder3D:
    """Residual branches begin at zero and the up-convolutions keep variance.

    With PyTorch's own start the path from latent to pixel has a gain of 0.004 beside branches of order one, and those are
    normalised: a plain background is then invisible, and hundreds of steps pass before any colour is learned.
    """
    for layer in model.modules():
        if isinstance(layer, ResBlock):
            nn.init.zeros_(layer.conv2.conv.weight)
            nn.init.zeros_(layer.conv2.conv.bias)  # type: ignore[arg-type]
        if isinstance(layer, nn.ConvTranspose3d):
            taps = math.prod(k // s for k, s in zip(layer.kernel_size, layer.stride, strict=True))
            nn.init.normal_(layer.weight, std=(layer.in_channels * taps) ** -0.5)
    return model


class RoundTrip(nn.Module):
    """Encode, disturb a little, decode; half precision throughout."""

    def __init__(self, model: Autoencoder3D) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        z = self.model.encode(pixels)[0]
        spread = z.detach().float().std().to(z.dtype)
        return self.model.decode(z + 0.05 * spread * torch.randn_like(z))


def fresh_clip(rng: np.random.Generator, frames: int, crop: int | None = None) -> np.ndarray:
    """A clip of a fresh scene, played backwards half of the time. uint8 [frames, height, width, 3]

    `crop`: only a square of this size, near the first shape.
    """
    start = int(rng.integers(0, 5000))
    scene = sample_scene(rng)
    while len(scene.shapes) > 1 or scene.gradient:  # an hour of one core is not enough for the whole world
        scene = sample_scene(rng)
    clip = render(scene, range(start, start + frames))
    if crop is not None:
        x, y = scene.shapes[0].centre(np.array([start]))[0] + rng.uniform(-crop / 2, crop / 2, 2)
        left, top = (int(np.clip(v - crop / 2, 0, WIDTH - crop)) for v in (x, y))
        clip = clip[:, top : top + crop, left : left + crop]
    return clip if rng.random() < 0.5 else clip[::-1].copy()


def to_pixels(clips: Tensor) -> Tensor:
    """uint8 [B, T, H, W, 3] -> [B, 3, T, H, W] in [-1, 1]."""
    return clips.permute(0, 4, 1, 2, 3).float() * (2 / 255) - 1


def load_autoencoder(folder: Path) -> Autoencoder3D:
    """The averaged autoencoder of a training folder."""
    model = Autoencoder3D(**AUTOENCODER)
    model.load_state_dict(load_file(folder / "autoencoder" / "average.safetensors"))
    return model.eval()


@torch.inference_mode()
def encode_corpus(folder: Path, minutes: float) -> None:
    """Latents [clips, 4, 16, 8, 8] of clips of 64 frames, encoded whole; scale and shift that make them standard normal."""
    if (folder / "corpus.safetensors").exists():
        return
    model = load_autoencoder(folder).bfloat16()
    rng = np.random.default_rng(77)
    latents = []
    for _ in clock(minutes):
        clip = torch.from_numpy(fresh_clip(rng, CLIP_FRAMES))[None]
        latents.append(model.encode(to_pixels(clip).bfloat16())[0].float())
    whole = torch.cat(latents)
    save_file({"latents": whole.half().contiguous()}, folder / "corpus.safetensors")
    numbers = {"scale_factor": 1 / float(whole.std()), "shift_factor": -float(whole.mean())}
    (folder / "latent.json").write_text(json.dumps(numbers | {"clips": len(whole)}) + "\n")
    print(f"corpus: {len(whole)} clips, {numbers}", flush=True)


def load_corpus(folder: Path) -> Tensor:
    """Model latents scale * (latent + shift): [clips, 4, 16, 8, 8] float32."""
    numbers = json.loads((folder / "latent.json").read_text())
    latents = load_file(folder / "corpus.safetensors")["latents"].float()
    return numbers["scale_factor"] * (latents + numbers["shift_factor"])


def train_unet(folder: Path, name: str, minutes: float, batch: int = 32) -> None:
    """The UNet of one level: keys every fourth latent, or five neighbours with both ends known."""
    torch.manual_seed(1)
    latents = load_corpus(folder)
    predicts = name == "prediction"
    model = UNet(**(PREDICTION if predicts else INTERPOLATION))
    trainer = Trainer(model, folder / name, peak_rate=1.5e-3, ema=0.998)
    torch.manual_seed(trainer.step + 2)
    frames, stride = (4, KEY_STRIDE) if predicts else (5, 1)
    known = torch.zeros(frames)
    known[[0] if predicts else [0, -1]] = 1
    share = 0.5 if predicts else 0.9  # of clips that are conditional, as released
    alpha_bar = torch.from_numpy(alphas_cumprod(*BETAS, TIMESTEPS)).float()
    for progress in clock(minutes):
        pick = torch.randint(len(latents), (batch,))
        start = torch.randint(latents.shape[2] - stride * (frames - 1), (batch, 1))
        clean = latents[pick[:, None], :, start + stride * torch.arange(frames)].transpose(1, 2)
        t, s = torch.randint(TIMESTEPS, (batch,)), torch.randint(MAX_NOISE_LEVEL, (batch,))
        mask = (known * (torch.rand(batch, 1) < share))[:, None, :, None, None].expand(-1, 1, -1, 8, 8)
        # Conditioning frames keep their own noise level and their own noise, which is the target there.
        noise = torch.randn_like(clean)
        level = torch.where(
            mask > 0, alpha_bar[s].reshape(-1, 1, 1, 1, 1), alpha_bar[t].reshape(-1, 1, 1, 1, 1)
        )
        noisy = level.sqrt() * clean + (1 - level).sqrt() * noise
        predicted = model(torch.cat([noisy, mask], 1), t, y=s)
        trainer.update((predicted - noise).square().mean(), rate_at(progress, trainer.step))
    trainer.save()


def clock(minutes: float) -> Any:
    """Yields the share of the time that has gone until it is over."""
    started = time.perf_counter()
    while (progress := (time.perf_counter() - started) / 60 / minutes) < 1:
        yield progress


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/lvdm"), help="checkpoints, latents and logs"
    )
    parser.add_argument("--minutes", type=float, default=70, help="of all stages together")
    parser.add_argument("--stages", nargs="+", choices=list(SHARES), default=list(SHARES))
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    total = sum(SHARES[stage] for stage in arguments.stages)
    for stage in arguments.stages:
        minutes = arguments.minutes * SHARES[stage] / total
        print(f"{stage}: {minutes:.0f} minutes", flush=True)
        if stage == "autoencoder":
            train_autoencoder(arguments.folder, minutes)
        elif stage == "corpus":
            encode_corpus(arguments.folder, minutes)
        else:
            train_unet(arguments.folder, stage, minutes)


if __name__ == "__main__":
    main()
