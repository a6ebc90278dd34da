"""The autoencoder as it is exported: one graph for every chunk of a stream, the first included, with its memory as state."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .vae import VideoAutoencoder

LEVELS = 127.5


class ChunkDecoder(nn.Module):
    """The next latents of a stream to frames. Of the first chunk the first 3 frames mean nothing."""

    def __init__(self, vae: VideoAutoencoder) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor, begun: Tensor, memory: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """latents [chunk, c, h, w]; begun [1], 0 before the first chunk; memory one [c, 2, h, w] per slot, zeros before the first chunk.
        Returns frames [chunk, 4, H, W, 3] uint8, then begun and memory for the next chunk.
        """
        slots = [slot[None] for slot in memory]
        pixels, kept = self.vae.decode_pass(latents.transpose(0, 1)[None], slots, begun)
        levels = ((pixels[0].clamp(-1, 1) + 1) * LEVELS + 0.5).clamp(0, 255)
        frames = levels.permute(1, 2, 3, 0).unflatten(0, (-1, self.vae.per_latent)).to(torch.uint8)
        return (frames, begun.clamp(min=1.0), *(slot[0] for slot in kept))


class ChunkEncoder(nn.Module):
    """The next frames of a stream to latents. Of the first chunk the first 3 frames are not looked at."""

    def __init__(self, vae: VideoAutoencoder) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, frames: Tensor, begun: Tensor, memory: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """frames [chunk, 4, H, W, 3] uint8; begun and memory as of the decoder. Returns latents [chunk, c, h, w], begun, memory."""
        dtype = self.vae.conv1.weight.dtype
        pixels = frames.flatten(0, 1).permute(3, 0, 1, 2)[None].to(dtype) / LEVELS - 1
        z, kept = self.vae.encode_pass(pixels, [slot[None] for slot in memory], begun)
        return (z[0].transpose(0, 1), begun.clamp(min=1.0), *(slot[0] for slot in kept))
