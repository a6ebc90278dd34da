"""The autoencoder as it is exported: its second stage on one chunk, its first on a few frames (see pyengine/runtime/codec.py)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .vae import VideoAutoencoder

LEVELS = 127.5


class ChunkDecoder(nn.Module):
    """latents [5, 4, h, w] -> planes [17, 4, h, w]: what the frame decoder reads."""

    def __init__(self, vae: VideoAutoencoder) -> None:
        super().__init__()
        self.vae, self.frames = vae, vae.micro_frame_size or 1

    def forward(self, latents: Tensor) -> Tensor:
        z = self.vae.denormalised(latents.transpose(0, 1)[None])
        return self.vae.temporal_vae.decode(z, self.frames)[0].transpose(0, 1)


class FrameDecoder(nn.Module):
    """planes [batch, 4, h, w] -> frames [batch, 8 h, 8 w, 3] uint8."""

    def __init__(self, vae: VideoAutoencoder) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, planes: Tensor) -> Tensor:
        pixels = self.vae.spatial_vae.module.decode(planes / self.vae.scaling_factor)
        levels = (pixels.clamp(-1, 1) + 1) * LEVELS
        return (levels + 0.5).clamp(0, 255).permute(0, 2, 3, 1).to(torch.uint8)


class FrameEncoder(nn.Module):
    """frames [batch, H, W, 3] uint8 -> planes [batch, 4, H / 8, W / 8], the posterior mean."""

    def __init__(self, vae: VideoAutoencoder) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, frames: Tensor) -> Tensor:
        dtype = self.vae.spatial_vae.module.quant_conv.weight.dtype
        pixels = frames.permute(0, 3, 1, 2).to(dtype) / LEVELS - 1
        return self.vae.spatial_vae.module.moments(pixels).chunk(2, 1)[0] * self.vae.scaling_factor


class ChunkEncoder(nn.Module):
    """planes [17, 4, h, w] -> latents [5, 4, h, w]."""

    def __init__(self, vae: VideoAutoencoder) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, planes: Tensor) -> Tensor:
        z = self.vae.encode_time(planes.transpose(0, 1)[None])
        return self.vae.normalised(z)[0].transpose(0, 1)
