"""The causal video autoencoder of `shapes`: 8x in space, 4x in time, decoded as a stream.

One latent frame stands for 4 video frames. The encoder looks at those 4 frames alone, so encoding is causal without any state. The
decoder also reads the previous latent frame at two scales; that memory is an explicit input and output, never hidden in the module.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FRAMES_PER_LATENT = 4
SPATIAL_FACTOR = 8
LATENT_CHANNELS = 8


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions at one resolution. [frames, channels, height, width] -> the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, channels)
        self.conv_in = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv_out = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv_out(F.silu(self.conv_in(F.silu(self.norm(x)))))


class CausalMix(nn.Module):
    """Adds a view of the previous latent frame. `memory` [1, channels, height, width] is the last frame of the call before."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.previous = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.previous.weight)

    def forward(self, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        shifted = torch.cat([memory, x[:-1]])  # frame i sees frame i - 1
        return x + self.previous(F.silu(shifted)), x[-1:]


class Encoder(nn.Module):
    """uint8 frames [4 * latents, 64, 64, 3] -> normalised latents [latents, 8, 8, 8]."""

    def __init__(self, width: int = 96, deep: int = 128) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3 * FRAMES_PER_LATENT * 16, width, 1)
        self.fine = ResidualBlock(width)
        self.down = nn.Conv2d(width, deep, 3, stride=2, padding=1)
        self.coarse = nn.Sequential(ResidualBlock(deep), ResidualBlock(deep))
        self.out = nn.Conv2d(deep, LATENT_CHANNELS, 3, padding=1)
        # Standardises each latent channel; running statistics are frozen into the weights when training ends.
        self.norm = nn.BatchNorm2d(LATENT_CHANNELS, affine=False, momentum=0.02)

    def forward(self, frames: Tensor) -> Tensor:
        count, height, width, _ = frames.shape
        x = frames.to(self.stem.weight.dtype) * (2 / 255) - 1
        x = x.reshape(count // FRAMES_PER_LATENT, FRAMES_PER_LATENT, height, width, 3)
        x = x.permute(0, 1, 4, 2, 3).flatten(1, 2)  # [latents, 12, height, width]
        x = self.fine(self.stem(F.pixel_unshuffle(x, 4)))
        return self.norm(self.out(self.coarse(self.down(x))))


class Decoder(nn.Module):
    """Latents [latents, 8, 8, 8] and the memory of two scales -> pixels in [-1, 1] [4 * latents, 3, 64, 64] and the new memory."""

    def __init__(self, width: int = 96, deep: int = 128, pixel: int = 48) -> None:
        super().__init__()
        self.stem = nn.Conv2d(LATENT_CHANNELS, deep, 3, padding=1)
        self.coarse_in = ResidualBlock(deep)
        self.coarse_mix = CausalMix(deep)
        self.coarse_out = ResidualBlock(deep)
        self.up = nn.Conv2d(deep, 4 * width, 1)
        self.fine_mix = CausalMix(width)
        self.fine = ResidualBlock(width)
        self.to_pixel = nn.Conv2d(width, 4 * pixel, 3, padding=1)
        self.pixel = ResidualBlock(pixel)
        self.out = nn.Conv2d(pixel, 4 * 3 * FRAMES_PER_LATENT, 3, padding=1)
        self.memory_shapes = {"coarse": (1, deep, 8, 8), "fine": (1, width, 16, 16)}

    def initial_memory(self) -> tuple[Tensor, Tensor]:
        """The memory before the first latent: zeros, [1, deep, 8, 8] and [1, width, 16, 16]."""
        coarse, fine = self.memory_shapes.values()
        return torch.zeros(coarse), torch.zeros(fine)

    def forward(self, latents: Tensor, coarse: Tensor, fine: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, coarse = self.coarse_mix(self.coarse_in(self.stem(latents)), coarse)
        x = F.pixel_shuffle(self.up(self.coarse_out(x)), 2)
        x, fine = self.fine_mix(x, fine)
        x = F.pixel_shuffle(self.to_pixel(self.fine(x)), 2)
        x = F.pixel_shuffle(self.out(self.pixel(x)), 2)  # [latents, 12, 64, 64]
        return x.unflatten(1, (FRAMES_PER_LATENT, 3)).flatten(0, 1), coarse, fine


class FrameDecoder(nn.Module):
    """The decoder as it ships: it ends in frames ready to show, uint8 [latents, 4, 64, 64, 3]."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, latents: Tensor, coarse: Tensor, fine: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pixels, coarse, fine = self.decoder(latents, coarse, fine)
        frames = ((pixels + 1) * 127.5 + 0.5).clamp(0, 255).to(torch.uint8)
        return frames.unflatten(0, (-1, FRAMES_PER_LATENT)).permute(0, 1, 3, 4, 2), coarse, fine


class FrameEncoder(nn.Module):
    """The encoder as it ships: uint8 frames grouped by latent [latents, 4, 64, 64, 3] -> latents [latents, 8, 8, 8]."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, frames: Tensor) -> Tensor:
        return self.encoder(frames.flatten(0, 1))
