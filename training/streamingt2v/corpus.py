"""Latent clips and captions of plain scenes: `python -m training.streamingt2v.corpus --help`.

A clip is as long as the released training has it for both modules at once: 32 latents of the autoencoder of `shapes`, of which the anchor,
the condition and the window are parts. One shape that is not small over a plain background, as for `shapes-lvdm`.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor

from pyengine.bundle.bundle import Bundle
from pyengine.export.families.shapes.autoencoder import FRAMES_PER_LATENT
from pyengine.export.families.shapes.captions import build_tokenizer, token_ids
from pyengine.export.families.shapes.modules import load_modules
from training.lvdm.train_shapes import plain_scene
from training.shapes.captions import varied_caption
from training.shapes.world import render

CLIP_LATENTS = 32
SHARD_CLIPS = 128
LATEST_START = 5000  # exclusive: of a clip in its endless video, in frames


@torch.inference_mode()
def encode_shard(encoder: torch.nn.Module, shard: int, clips: int = SHARD_CLIPS) -> dict[str, Tensor]:
    """latents [clips, 32, 8, 8, 8] float16 and tokens [clips, 20]; the same for the same number."""
    rng = np.random.default_rng(90_000 + shard)
    tokenizer = build_tokenizer()
    latents, tokens = [], []
    for _ in range(clips):
        scene, start = plain_scene(rng), int(rng.integers(0, LATEST_START))
        frames = render(scene, range(start, start + CLIP_LATENTS * FRAMES_PER_LATENT))
        latents.append(encoder(torch.from_numpy(frames)).half())
        tokens.append(torch.from_numpy(token_ids(tokenizer, varied_caption(scene, rng))))
    return {"latents": torch.stack(latents), "tokens": torch.stack(tokens)}


def load_corpus(folder: Path) -> tuple[Tensor, Tensor]:
    """All shards that are there: latents [clips, 32, 8, 8, 8] float16 and tokens [clips, 20]."""
    shards = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    if not shards:
        raise SystemExit(
            f"[corpus] expected encoded clips in {folder} but there are none; run training.streamingt2v.corpus"
        )
    return torch.cat([shard["latents"] for shard in shards]), torch.cat([shard["tokens"] for shard in shards])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/streamingt2v/corpus"))
    parser.add_argument("--bundle", default="shapes", help="whose encoder makes the latents")
    parser.add_argument(
        "--shards", type=int, nargs=2, default=(0, 64), metavar=("FIRST", "END"), help="of 128 clips"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    encoder = load_modules(Bundle.load(arguments.bundle)).encoder.eval()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for shard in track(range(*arguments.shards)):
        path = arguments.folder / f"{shard:04d}.safetensors"
        if not path.exists():
            partial = path.with_suffix(".partial")
            save_file(encode_shard(encoder, shard), partial)
            os.replace(partial, path)


if __name__ == "__main__":
    main()
