"""The second stage of the autoencoder: a causal 3-D autoencoder of the first stage's latents, four frames to one.

Convolutions look back in time only (MAGVIT-v2, Yu et al. 2024); names as in the checkpoint under `temporal_vae.`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from pyengine.errors import ConfigError

EPSILON = 1e-5


class CausalConv(nn.Module):
    """3-D convolution, zero-padded in front in time and around in space."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1, bias: bool = True
    ) -> None:
        super().__init__()
        side = kernel // 2
        self.padding = (side, side, side, side, kernel - stride, 0)
        self.conv = nn.Conv3d(inputs, outputs, kernel, (stride, 1, 1), bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, self.padding) if any(self.padding) else x)


class Residual(nn.Module):
    """Two normed causal convolutions beside the input."""

    def __init__(self, inputs: int, outputs: int, groups: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(groups, inputs, EPSILON), nn.GroupNorm(groups, outputs, EPSILON)
        self.conv1 = CausalConv(inputs, outputs, bias=False)
        self.conv2 = CausalConv(outputs, outputs, bias=False)
        self.conv3 = CausalConv(inputs, outputs, 1, bias=False) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return out + (x if self.conv3 is None else self.conv3(x))


def _residuals(inputs: int, outputs: int, count: int, groups: int) -> nn.ModuleList:
    return nn.ModuleList(
        Residual(inputs if index == 0 else outputs, outputs, groups) for index in range(count)
    )


class Encoder(nn.Module):
    """[b, channels, t, h, w] -> moments [b, 2 * latent channels, t / 4, h, w]."""

    def __init__(
        self,
        channels: int,
        latents: int,
        filters: int,
        blocks: int,
        multipliers: Sequence[int],
        halve: Sequence[bool],
        groups: int,
    ) -> None:
        super().__init__()
        widths = [filters * multiplier for multiplier in multipliers]
        self.conv_in = CausalConv(channels, filters, bias=False)
        self.block_res_blocks = nn.ModuleList(
            _residuals(i, o, blocks, groups) for i, o in zip([filters, *widths[:-1]], widths, strict=True)
        )
        self.conv_blocks = nn.ModuleList(
            CausalConv(width, width, stride=2) if half else nn.Identity()
            for width, half in zip(widths[:-1], halve, strict=True)
        )
        self.res_blocks = _residuals(widths[-1], widths[-1], blocks, groups)
        self.norm1 = nn.GroupNorm(groups, widths[-1], EPSILON)
        self.conv2 = CausalConv(widths[-1], latents, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level, blocks in enumerate(self.block_res_blocks):
            for block in blocks:  # type: ignore[attr-defined]
                x = block(x)
            if level < len(self.conv_blocks):
                x = self.conv_blocks[level](x)
        for block in self.res_blocks:
            x = block(x)
        return self.conv2(F.silu(self.norm1(x)))


class Decoder(nn.Module):
    """[b, latent channels, t, h, w] -> [b, channels, 4 t, h, w]."""

    def __init__(
        self,
        channels: int,
        latents: int,
        filters: int,
        blocks: int,
        multipliers: Sequence[int],
        double: Sequence[bool],
        groups: int,
    ) -> None:
        super().__init__()
        widths = [filters * multiplier for multiplier in multipliers]
        self.doubled = tuple(double)
        self.conv1 = CausalConv(latents, widths[-1])
        self.res_blocks = _residuals(widths[-1], widths[-1], blocks, groups)
        # Level i takes what level i + 1 leaves.
        self.block_res_blocks = nn.ModuleList(
            _residuals(i, o, blocks, groups) for i, o in zip([*widths[1:], widths[-1]], widths, strict=True)
        )
        self.conv_blocks = nn.ModuleList(
            CausalConv(width, 2 * width) if twice else nn.Identity()
            for width, twice in zip(widths[1:], double, strict=True)
        )
        self.norm1 = nn.GroupNorm(groups, widths[0], EPSILON)
        self.conv_out = CausalConv(widths[0], channels)

    def forward(self, z: Tensor) -> Tensor:
        x = self.conv1(z)
        for block in self.res_blocks:
            x = block(x)
        for level in reversed(range(len(self.block_res_blocks))):
            for block in self.block_res_blocks[level]:  # type: ignore[attr-defined]
                x = block(x)
            if level > 0:
                x = self.conv_blocks[level - 1](x)
                if self.doubled[level - 1]:  # channel 2 c + s of frame t becomes channel c of frame 2 t + s
                    x = x.unflatten(1, (-1, 2)).permute(0, 1, 3, 2, 4, 5).flatten(2, 3)
        return self.conv_out(F.silu(self.norm1(x)))


class TimeAutoencoder(nn.Module):
    """The causal autoencoder with the convolutions around its latent."""

    def __init__(
        self,
        in_out_channels: int = 4,
        latent_embed_dim: int = 4,
        embed_dim: int = 4,
        filters: int = 128,
        num_res_blocks: int = 4,
        channel_multipliers: Sequence[int] = (1, 2, 2, 4),
        temporal_downsample: Sequence[bool] = (False, True, True),
        num_groups: int = 32,
    ) -> None:
        super().__init__()
        if len(temporal_downsample) != len(channel_multipliers) - 1:
            raise ConfigError(
                f"expected temporal_downsample between {len(channel_multipliers)} levels but got {list(temporal_downsample)}"
            )
        sizes = (filters, num_res_blocks, tuple(channel_multipliers), tuple(temporal_downsample), num_groups)
        self.frames_per_latent = 2 ** sum(bool(half) for half in temporal_downsample)
        self.encoder = Encoder(in_out_channels, 2 * latent_embed_dim, *sizes)
        self.quant_conv = CausalConv(2 * latent_embed_dim, 2 * embed_dim, 1)
        self.post_quant_conv = CausalConv(embed_dim, latent_embed_dim, 1)
        self.decoder = Decoder(in_out_channels, latent_embed_dim, *sizes)

    def moments(self, x: Tensor) -> Tensor:
        """Mean and log-variance; time is zero-padded in front to whole latents."""
        missing = -x.shape[2] % self.frames_per_latent
        if missing:
            x = F.pad(x, (0, 0, 0, 0, missing, 0))
        return self.quant_conv(self.encoder(x))

    def decode(self, z: Tensor, frames: int) -> Tensor:
        """The first frames, which the encoder padded, are dropped."""
        return self.decoder(self.post_quant_conv(z))[:, :, -frames % self.frames_per_latent :]
