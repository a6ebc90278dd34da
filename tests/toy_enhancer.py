"""A second stage small enough to export in seconds, with what an enhancer has: it guides itself, and every frame sees its whole chunk."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from pyengine.bundle.bundle import Bundle, Latent, Video, write_manifest
from pyengine.export.graph import WeightStore, export_component, round_weights

FRAMES, CHANNELS, SIDE = 5, 4, 2
SETTINGS = {
    "steps": 3, "levels": 600, "guidance": 7.5, "rescale": 0.2, "clip_frames": FRAMES, "overlap": 2, "latent": (SIDE, SIDE),
}  # fmt: skip


class Enhancer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(CHANNELS, 8, 3, padding=1), nn.Conv2d(8, CHANNELS, 3, padding=1)

    def forward(
        self, latents: Tensor, level: Tensor, guidance: Tensor, rescale: Tensor, text: Tensor
    ) -> Tensor:
        branches, streams = text.shape[:2]
        x = latents + 0.3 * latents.mean(1, keepdim=True) + level[..., None, None, None]
        h = torch.tanh(self.one(x.flatten(0, 1))).unflatten(0, (streams, FRAMES))
        h = h + text[:, :, None, :, None, None]
        out = self.two(h.flatten(0, 2)).unflatten(0, (branches, streams, FRAMES))
        guided = (guidance[..., None, None, None, None] * out).sum(0)
        spread = guided.flatten(1).abs().mean(1)
        return (guided * (rescale / spread + 1 - rescale)[:, None, None, None, None])[None]


class Decoder(nn.Module):
    def forward(self, latents: Tensor) -> Tensor:
        pixels = (latents[:, :3].permute(0, 2, 3, 1) * 40 + 128).clamp(0, 255)
        return pixels.to(torch.uint8)[:, None]


def export(folder: Path) -> Bundle:
    """Writes the bundle into an empty folder; its method is another one's, since it is the second stage of none."""
    torch.manual_seed(0)
    store, streams = WeightStore(), 2
    denoiser = {
        "latents": torch.randn(streams, FRAMES, CHANNELS, SIDE, SIDE),
        "level": torch.rand(streams, FRAMES),
        "guidance": torch.tensor([[7.5, 2.0], [-6.5, -1.0]]),
        "rescale": torch.tensor([0.2, 0.0]),
        "text": torch.randn(2, streams, 8),
    }
    both = {0: "branches", 1: "streams"}
    dynamic = {name: {0: "streams"} for name in ("latents", "level", "rescale")}
    components = {
        "enhancer": export_component(
            round_weights(Enhancer()).eval(),
            denoiser,
            folder=folder,
            name="enhancer",
            store=store,
            outputs=["prediction"],
            dynamic=dynamic | {"guidance": both, "text": both},
        ),
        "decoder": export_component(
            Decoder().eval(),
            {"latents": torch.randn(2, CHANNELS, SIDE, SIDE)},
            folder=folder,
            name="decoder",
            store=store,
            outputs=["frames"],
            dynamic={"latents": {0: "chunk"}},
        ),
    }
    store.write(folder)
    return write_manifest(
        folder,
        name="toy-enhancer",
        family="toy",
        version="1",
        components=components,
        video=Video(SIDE, SIDE, 8.0, 1),
        latent=Latent(CHANNELS, SIDE, SIDE),
        method={"name": "progressive"},
    )
