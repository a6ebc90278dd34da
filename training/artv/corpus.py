"""Encoded clips to train `shapes-artv` on: `python -m training.artv.corpus --folder runs/artv/corpus`.

Each clip has two scenes of one shape. The second takes over where the first is at latent `SWITCH`: same place, and same velocity where both
move straight on. So a clip teaches how a scene goes on, twice, and how it goes on when the prompt changes. Of either scene a latent of
any other time is there as well, for the anchor.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor

from pyengine.bundle.bundle import Bundle
from pyengine.export.families.shapes.autoencoder import FRAMES_PER_LATENT, Encoder
from pyengine.export.families.shapes.captions import build_tokenizer, token_ids
from pyengine.export.families.shapes.modules import load_modules
from pyengine.export.families.shapes.recipe import HEIGHT, WIDTH
from training.shapes.captions import varied_caption
from training.shapes.world import MovingShape, Scene, render, sample_scene

CLIP_LATENTS, SWITCH = 12, 6
SHARD_CLIPS = 256
FARTHEST = 5000  # frames between a clip and its anchor
CENTRE = np.array([WIDTH / 2, HEIGHT / 2])


def single_scene(rng: np.random.Generator) -> Scene:
    """A scene of one shape."""
    while True:
        scene = sample_scene(rng)
        if len(scene.shapes) == 1:
            return scene


def continued(scene: Scene, after: Scene, frame: int) -> Scene:
    """`after`, whose shape is at `frame` where that of `scene` is, or as near as it can be, and keeps a straight motion."""
    old, new = scene.shapes[0], after.shapes[0]
    x, y = (float(value) for value in old.centre(np.array([frame]))[0])
    least, most = new.extent, WIDTH - new.extent
    inside = (min(max(x, least), most), min(max(y, least), most))
    if new.motion == "orbit":
        away = np.array([x, y]) - CENTRE
        radius = float(np.clip(np.hypot(*away), 10.0, max(10.0, 30.0 - new.extent)))
        turn = np.sign(new.turn) * abs(new.turn) * new.orbit_radius / radius
        phase = float(np.arctan2(away[1], away[0])) - turn * frame
        moved = replace(new, start=(WIDTH / 2, HEIGHT / 2), orbit_radius=radius, turn=turn, angle=phase)
    elif new.motion == "spin":
        moved = replace(new, start=inside)
    else:
        velocity = _velocity(old, frame) if old.motion in ("bounce", "drift") else new.velocity
        place = (x, y) if new.motion == "drift" else inside
        moved = replace(
            new,
            velocity=velocity,
            start=(place[0] - frame * velocity[0], place[1] - frame * velocity[1]),
        )
    return replace(after, shapes=(moved,))


def _velocity(shape: MovingShape, frame: int) -> tuple[float, float]:
    """How a shape moves from a frame to the next, whichever wall it last met."""
    before, now = shape.centre(np.array([frame - 1, frame]))
    dx, dy = (now - before + WIDTH / 2) % WIDTH - WIDTH / 2
    return float(dx), float(dy)


@torch.inference_mode()
def encode_shard(encoder: Encoder, rng: np.random.Generator, clips: int) -> dict[str, Tensor]:
    """latents [clips, 2, 12, 8, 8, 8] and anchors [clips, 2, 8, 8, 8] float16, tokens [clips, 2, 20] int64."""
    tokenizer = build_tokenizer()
    latents, anchors, tokens = [], [], []
    for _ in range(clips):
        start = int(rng.integers(0, 5000))
        first = single_scene(rng)
        second = continued(first, single_scene(rng), start + SWITCH * FRAMES_PER_LATENT)
        for scene in (first, second):
            long_ago = int(rng.integers(0, FARTHEST))
            frames = [*range(start, start + CLIP_LATENTS * FRAMES_PER_LATENT)]
            frames += range(long_ago, long_ago + FRAMES_PER_LATENT)
            with torch.autocast("cpu", torch.bfloat16):
                encoded = encoder(torch.from_numpy(render(scene, np.array(frames)))).half()
            latents.append(encoded[:-1])
            anchors.append(encoded[-1])
            tokens.append(torch.from_numpy(token_ids(tokenizer, varied_caption(scene, rng))))

    def paired(values: list[Tensor]) -> Tensor:
        return torch.stack(values).unflatten(0, (clips, 2))

    return {"latents": paired(latents), "anchors": paired(anchors), "tokens": paired(tokens)}


def load_corpus(folder: Path) -> dict[str, Tensor]:
    """All shards that are there, as `encode_shard` makes them."""
    shards = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    if not shards:
        raise SystemExit(
            f"[corpus] expected shards in {folder} but there are none; run training.artv.corpus first"
        )
    return {name: torch.cat([shard[name] for shard in shards]) for name in shards[0]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/artv/corpus"))
    parser.add_argument("--bundle", default="shapes", help="whose autoencoder makes the latents")
    parser.add_argument(
        "--shards", type=int, nargs=2, default=(0, 24), metavar=("FIRST", "END"), help="of 256 clips"
    )
    arguments = parser.parse_args()
    encoder = load_modules(Bundle.load(arguments.bundle)).encoder.eval()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for shard in track(range(*arguments.shards)):
        path = arguments.folder / f"{shard:04d}.safetensors"
        if not path.exists():
            made = encode_shard(encoder, np.random.default_rng(180_000 + shard), SHARD_CLIPS)
            save_file(made, path.with_suffix(".part"))
            path.with_suffix(".part").rename(path)


if __name__ == "__main__":
    main()
