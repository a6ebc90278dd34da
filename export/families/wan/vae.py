"""Wan 2.1's causal autoencoder, by the names of its checkpoint: 4x in time, 8x in space, 16 channels.

    vae.decode(z)                          the whole of a video
    pixels, memory = vae.decode_chunk(z)   a part of it, and what the next part needs

Any chunking gives the same frames: the memory of a convolution is the end of its input, and the first frame of a video is a latent of
its own. Chunks of latents and of frames are those of a stream: 1 + 4 (n - 1) frames of the first n latents, 4 of every later one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyengine.errors import ConfigError, ShapeError

from .vae_layers import (
    AttentionBlock,
    CausalConv3d,
    ChannelNorm,
    Downsample,
    Pass,
    ResidualBlock,
    Upsample,
)

# Of the release. No other factor is applied to latents.
MEAN = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
STD = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)
FULL_SIZE: dict[str, Any] = {
    "dim": 96,
    "z_dim": 16,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_scales": [],
    "temperal_downsample": [False, True, True],
    "mean": list(MEAN),
    "std": list(STD),
}


# What a stream keeps between chunks: the end of the input of every convolution over time, in running order.
Memory = tuple[Tensor, ...]


class VideoAutoencoder(nn.Module):
    """encode: pixels [B, 3, T, H, W] in [-1, 1] -> normalised means [B, z_dim, 1 + (T - 1) // 4, H / 8, W / 8]; decode: the reverse."""

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        dim: int,
        z_dim: int,
        dim_mult: Sequence[int],
        num_res_blocks: int,
        attn_scales: Sequence[float],
        temperal_downsample: Sequence[bool],
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__()
        if (
            attn_scales
            or len(temperal_downsample) != len(dim_mult) - 1
            or len(mean) != z_dim
            or len(std) != z_dim
        ):
            raise ConfigError(
                "expected an autoencoder without attn_scales, with one temperal_downsample less than dim_mult and z_dim means and stds "
                f"but got {len(attn_scales)}, {len(temperal_downsample)} with {len(dim_mult)}, {len(mean)} and {len(std)} of {z_dim}"
            )
        self.z_dim = z_dim
        self.per_latent = 2 ** sum(temperal_downsample)
        self.factor = 2 ** len(temperal_downsample)
        self.encoder = Encoder(dim, 2 * z_dim, dim_mult, num_res_blocks, temperal_downsample)
        self.conv1, self.conv2 = nn.Conv3d(2 * z_dim, 2 * z_dim, 1), nn.Conv3d(z_dim, z_dim, 1)
        self.decoder = Decoder(dim, z_dim, dim_mult, num_res_blocks, temperal_downsample[::-1])
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values)[:, None, None, None], persistent=False)

    def decode(self, z: Tensor) -> Tensor:
        """The whole of a video, not clipped."""
        return self.decode_chunk(z)[0]

    def encode(self, x: Tensor) -> Tensor:
        """The whole of a video. Frames that do not fill the last group of 4 are ignored."""
        whole = 1 + (x.shape[2] - 1) // self.per_latent * self.per_latent
        return self.encode_chunk(x[:, :, :whole])[0]

    def decode_chunk(self, z: Tensor, memory: Memory | None = None) -> tuple[Tensor, Memory]:
        """The frames of the next latents [B, z_dim, n, h, w] of a stream; memory None: of the first."""
        begun = memory is not None
        slots = memory if memory is not None else self.decoder.start(z)
        pixels, kept = self.decode_pass(z, slots, z.new_tensor(float(begun)))
        return (pixels if begun else pixels[:, :, self.per_latent - 1 :]), kept

    def encode_chunk(self, x: Tensor, memory: Memory | None = None) -> tuple[Tensor, Memory]:
        """The latents of the next frames [B, 3, T, H, W] of a stream; memory None: of the first. Raises ShapeError."""
        begun = memory is not None
        hidden = 0 if begun else self.per_latent - 1
        if (x.shape[2] + hidden) % self.per_latent or x.shape[2] < 1:
            raise ShapeError(
                f"[wan] expected {'' if begun else '1 frame and '}a multiple of {self.per_latent} frames but got {x.shape[2]}"
            )
        x = F.pad(x, (0, 0, 0, 0, hidden, 0))
        slots = memory if memory is not None else self.encoder.start(x)
        z, kept = self.encode_pass(x, slots, x.new_tensor(float(begun)))
        return z, kept

    def decode_pass(
        self, z: Tensor, slots: Sequence[Tensor], begun: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """One pass of fixed sizes: 4 frames of every latent. While `begun` is 0 the first 3 frames mean nothing."""
        run = Pass(slots, begun)
        pixels = self.decoder(self.conv2(z * self.std + self.mean), run)
        return pixels, tuple(run.kept)

    def encode_pass(
        self, x: Tensor, slots: Sequence[Tensor], begun: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The same for frames. While `begun` is 0 the first 3 of them mean nothing."""
        run = Pass(slots, begun)
        moments = self.conv1(self.encoder(x, run))
        return (moments[:, : self.z_dim] - self.mean) / self.std, tuple(run.kept)


class Coder(nn.Module):
    """What encoder and decoder have in common: memory shapes, found in running order."""

    def start(self, x: Tensor) -> tuple[Tensor, ...]:
        """Zeros: the memory before the first chunk of x [B, c, T, h, w]."""
        return tuple(x.new_zeros(shape) for shape in self.memory_shapes(x.shape[0], *x.shape[3:]))

    def memory_shapes(self, batch: int, height: int, width: int) -> list[tuple[int, ...]]:
        """Of every slot, for inputs of that size."""
        raise NotImplementedError


class Encoder(Coder):
    def __init__(
        self, dim: int, out: int, mult: Sequence[int], blocks: int, over_time: Sequence[bool]
    ) -> None:
        super().__init__()
        rate = 2 ** sum(over_time)
        self.conv1 = CausalConv3d(3, dim, rate)
        self.downsamples = nn.ModuleList()
        channels = dim
        for index, factor in enumerate(mult):
            for _ in range(blocks):
                self.downsamples.append(ResidualBlock(channels, dim * factor, rate))
                channels = dim * factor
            if index < len(over_time):
                self.downsamples.append(Downsample(channels, rate, over_time[index]))
                rate //= 1 + over_time[index]
        self.middle = _middle(channels)
        self.head = nn.ModuleDict({"0": ChannelNorm(channels), "2": CausalConv3d(channels, out, rate)})

    def forward(self, x: Tensor, run: Pass) -> Tensor:
        x = self.conv1(x, run)
        for layer in (*self.downsamples, *self.middle):
            x = layer(x, run)
        return self.head["2"](F.silu(self.head["0"](x)), run)

    def memory_shapes(self, batch: int, height: int, width: int) -> list[tuple[int, ...]]:
        shapes: list[tuple[int, ...]] = []
        for layer in (self.conv1, *self.downsamples, *self.middle, self.head["2"]):
            if isinstance(layer, Downsample):
                height, width = height // 2, width // 2
            shapes += [(batch, *slot, height, width) for slot in _slots(layer)]
        return shapes


class Decoder(Coder):
    def __init__(
        self, dim: int, z_dim: int, mult: Sequence[int], blocks: int, over_time: Sequence[bool]
    ) -> None:
        super().__init__()
        channels, rate = dim * mult[-1], 1
        self.conv1 = CausalConv3d(z_dim, channels, rate)
        self.middle = _middle(channels)
        self.upsamples = nn.ModuleList()
        for index, factor in enumerate(reversed(mult)):
            for _ in range(blocks + 1):
                self.upsamples.append(ResidualBlock(channels, dim * factor, rate))
                channels = dim * factor
            if index < len(over_time):
                self.upsamples.append(Upsample(channels, rate, over_time[index]))
                channels //= 2
                rate *= 1 + over_time[index]
        self.head = nn.ModuleDict({"0": ChannelNorm(channels), "2": CausalConv3d(channels, 3, rate)})

    def forward(self, x: Tensor, run: Pass) -> Tensor:
        x = self.conv1(x, run)
        for layer in (*self.middle, *self.upsamples):
            x = layer(x, run)
        return self.head["2"](F.silu(self.head["0"](x)), run)

    def memory_shapes(self, batch: int, height: int, width: int) -> list[tuple[int, ...]]:
        shapes: list[tuple[int, ...]] = []
        for layer in (self.conv1, *self.middle, *self.upsamples, self.head["2"]):
            shapes += [(batch, *slot, height, width) for slot in _slots(layer)]
            if isinstance(layer, Upsample):
                height, width = height * 2, width * 2
        return shapes


def _middle(channels: int) -> nn.ModuleList:
    """At the coarsest stage, where every latent is one frame."""
    return nn.ModuleList(
        [ResidualBlock(channels, channels, 1), AttentionBlock(channels), ResidualBlock(channels, channels, 1)]
    )


def _slots(layer: nn.Module) -> list[tuple[int, int]]:
    """Channels and frames of what a layer remembers, in running order."""
    if isinstance(layer, CausalConv3d):
        return [(layer.in_channels, 2)]
    if isinstance(layer, ResidualBlock):
        return [slot for name in ("2", "6") for slot in _slots(layer.residual[name])]
    if isinstance(layer, Upsample) and layer.over_time:
        return [(layer.time_conv.in_channels, 2)]
    if isinstance(layer, Downsample) and layer.over_time:
        return [(layer.time_conv.in_channels, 1)]
    return []
