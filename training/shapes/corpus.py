"""Encoded clips to train the denoiser on: latents and captions, written once as safetensors shards.

`python -m training.shapes.corpus --autoencoder runs/autoencoder --folder runs/corpus`
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor

from pyengine.bundle.bundle import Bundle
from pyengine.export.families.shapes.autoencoder import FRAMES_PER_LATENT, Decoder, Encoder
from pyengine.export.families.shapes.captions import build_tokenizer, token_ids
from pyengine.export.families.shapes.modules import autoencoder_weights, load_modules
from training.shapes.captions import varied_caption
from training.shapes.world import render, sample_scene

CLIP_LATENTS = 20
SHARD_CLIPS = 512


def load_autoencoder(folder: Path) -> tuple[Encoder, Decoder]:
    """The averaged autoencoder of a training folder, in evaluation mode."""
    model = torch.nn.ModuleDict({"encoder": Encoder(), "decoder": Decoder()})
    model.load_state_dict(autoencoder_weights(folder))
    model.eval()
    return model["encoder"], model["decoder"]  # type: ignore[return-value]


@torch.inference_mode()
def encode_shard(encoder: Encoder, rng: np.random.Generator, clips: int, device: str) -> dict[str, Tensor]:
    """latents [clips, 20, 8, 8, 8] float16 and tokens [clips, 20] int64 of fresh scenes."""
    tokenizer = build_tokenizer()
    latents, tokens = [], []
    for _ in range(clips):
        scene = sample_scene(rng)
        start = int(rng.integers(0, 5000))
        frames = torch.from_numpy(render(scene, range(start, start + CLIP_LATENTS * FRAMES_PER_LATENT)))
        with torch.autocast(device, torch.bfloat16):
            latents.append(encoder(frames.to(device)).half().cpu())
        tokens.append(torch.from_numpy(token_ids(tokenizer, varied_caption(scene, rng))))
    return {"latents": torch.stack(latents), "tokens": torch.stack(tokens)}


def load_corpus(folder: Path) -> tuple[Tensor, Tensor]:
    """All shards: latents [clips, 20, 8, 8, 8] float16, tokens [clips, 20] int64."""
    shards = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    return torch.cat([s["latents"] for s in shards]), torch.cat([s["tokens"] for s in shards])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--autoencoder", type=Path, default=Path("runs/autoencoder"))
    parser.add_argument("--bundle", default=None, help="take the encoder of this bundle instead")
    parser.add_argument("--folder", type=Path, default=Path("runs/corpus"))
    parser.add_argument("--clips", type=int, default=16384)
    parser.add_argument(
        "--first-shard", type=int, default=0, help="shards are numbered; several processes can share the work"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    if arguments.bundle is None:
        encoder = load_autoencoder(arguments.autoencoder)[0]
    else:
        encoder = load_modules(Bundle.load(arguments.bundle)).encoder.eval()
    encoder = encoder.to(arguments.device)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for shard in track(range(arguments.first_shard, arguments.first_shard + arguments.clips // SHARD_CLIPS)):
        path = arguments.folder / f"{shard:04d}.safetensors"
        if not path.exists():
            save_file(
                encode_shard(encoder, np.random.default_rng(10_000 + shard), SHARD_CLIPS, arguments.device),
                path,
            )


if __name__ == "__main__":
    main()
