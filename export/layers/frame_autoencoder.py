"""The autoencoder of single frames of latent diffusion (Rombach et al. 2022, arXiv:2112.10752), 8 x 8 pixels to one latent place.

Parameters have the names of `AutoencoderKL` in diffusers, as the checkpoints of Open-Sora (under `spatial_vae.module.`) and of StreamingT2V
(under `vae.`) have them.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

EPSILON = 1e-6


class Residual(nn.Module):
    """Two normed convolutions beside the input."""

    def __init__(self, inputs: int, outputs: int, groups: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(groups, inputs, EPSILON), nn.GroupNorm(groups, outputs, EPSILON)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return out + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class PlaneAttention(nn.Module):
    """One head over all places of a frame."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, EPSILON)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        rows = self.group_norm(x).flatten(2).transpose(1, 2)  # [frames, places, channels]
        q, k, v = (layer(rows).unsqueeze(1) for layer in (self.to_q, self.to_k, self.to_v))  # one head
        out = F.scaled_dot_product_attention(q, k, v).squeeze(1)
        return x + self.to_out[0](out).transpose(1, 2).reshape(x.shape)


class Middle(nn.Module):
    """Residual, attention, residual at the smallest size."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([PlaneAttention(channels, groups)])
        self.resnets = nn.ModuleList(Residual(channels, channels, groups) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Down(nn.Module):
    """Half the size; odd sizes lose their last row. The padding is on the right and below only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Up(nn.Module):
    """Twice the size."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Stage(nn.Module):
    """Residual blocks at one size, and what leads to the next."""

    def __init__(
        self, inputs: int, outputs: int, layers: int, groups: int, resize: str, resizer: nn.Module | None
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            Residual(inputs if index == 0 else outputs, outputs, groups) for index in range(layers)
        )
        self.resize = resize if resizer is not None else ""
        if resizer is not None:
            self.add_module(resize, nn.ModuleList([resizer]))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.resnets:
            x = block(x)
        return self.get_submodule(f"{self.resize}.0")(x) if self.resize else x


class Encoder(nn.Module):
    """Frames [n, channels, h, w] -> moments [n, 2 * latent channels, h / 8, w / 8]."""

    def __init__(self, inputs: int, latents: int, widths: Sequence[int], layers: int, groups: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(inputs, widths[0], 3, padding=1)
        pairs = list(zip((widths[0], *widths[:-1]), widths, strict=True))
        self.down_blocks = nn.ModuleList(
            Stage(i, o, layers, groups, "downsamplers", Down(o) if level < len(pairs) - 1 else None)
            for level, (i, o) in enumerate(pairs)
        )
        self.mid_block = Middle(widths[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], EPSILON)
        self.conv_out = nn.Conv2d(widths[-1], 2 * latents, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for stage in self.down_blocks:
            x = stage(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    """Latents [n, latent channels, h, w] -> frames [n, channels, 8 h, 8 w]."""

    def __init__(self, outputs: int, latents: int, widths: Sequence[int], layers: int, groups: int) -> None:
        super().__init__()
        down = tuple(reversed(widths))
        self.conv_in = nn.Conv2d(latents, down[0], 3, padding=1)
        self.mid_block = Middle(down[0], groups)
        pairs = list(zip((down[0], *down[:-1]), down, strict=True))
        self.up_blocks = nn.ModuleList(
            Stage(i, o, layers + 1, groups, "upsamplers", Up(o) if level < len(pairs) - 1 else None)
            for level, (i, o) in enumerate(pairs)
        )
        self.conv_norm_out = nn.GroupNorm(groups, down[-1], EPSILON)
        self.conv_out = nn.Conv2d(down[-1], outputs, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(z))
        for stage in self.up_blocks:
            x = stage(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class FrameAutoencoder(nn.Module):
    """The 2-D autoencoder with the convolutions around its latent."""

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        block_out_channels: Sequence[int] = (128, 256, 512, 512),
        layers_per_block: int = 2,
        latent_channels: int = 4,
        norm_num_groups: int = 32,
    ) -> None:
        super().__init__()
        sizes = (tuple(block_out_channels), layers_per_block, norm_num_groups)
        self.encoder = Encoder(in_channels, latent_channels, *sizes)
        self.decoder = Decoder(out_channels, latent_channels, *sizes)
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)

    def moments(self, frames: Tensor) -> Tensor:
        """Mean and log-variance of the posterior, one after the other along the channels."""
        return self.quant_conv(self.encoder(frames))

    def decode(self, latents: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(latents))
