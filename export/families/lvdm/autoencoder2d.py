"""The per-frame KL-f8 autoencoder of text to video (Rombach et al. 2022, arXiv:2112.10752), by its released names.

Quirks of the weights: a downsampling convolution is padded with zeros on the right and at the bottom only; GroupNorm has epsilon
1e-6; the middle attention has one head.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from .autoencoder3d import EPSILON, GROUPS, LOGVAR_RANGE
from .config import refuse_unknown, refuse_value

_IGNORED = (
    "lossconfig",
    "monitor",
    "ckpt_path",
    "ignore_keys",
    "image_key",
    "colorize_nlabels",
    "resolution",
    "dropout",
    "test",
    "logdir",
    "input_dim",
    "test_args",
)
# Keys of the released ddconfig that are built with one value only.
_FIXED = {
    "attn_type": "vanilla",
    "use_linear_attn": False,
    "resamp_with_conv": True,
    "tanh_out": False,
    "give_pre_end": False,
}


class AutoencoderKL(nn.Module):
    """encode: frames [N, 3, H, W] in [-1, 1] -> (mean, logvar) [N, 4, H/8, W/8]; decode: the reverse.

    A video [B, C, T, H, W] is taken frame by frame and comes back as a video. Takes the released `first_stage_config.params`.
    """

    def __init__(self, **config: Any) -> None:
        super().__init__()
        flat = {**config, **dict(config.get("ddconfig", {}))}
        flat.pop("ddconfig", None)
        refuse_value("AutoencoderKL", "double_z", flat.pop("double_z", True), True)
        for key, only in _FIXED.items():
            refuse_value("AutoencoderKL", key, flat.pop(key, only), only)
        refuse_value("AutoencoderKL", "attn_resolutions", list(flat.pop("attn_resolutions", [])), [])
        z, embed = flat.pop("z_channels", 4), flat.pop("embed_dim", 4)
        width, mult = flat.pop("ch", 128), tuple(flat.pop("ch_mult", (1, 2, 4, 8)))
        blocks = flat.pop("num_res_blocks", 2)
        pixels, out = flat.pop("in_channels", 3), flat.pop("out_ch", 3)
        refuse_unknown("AutoencoderKL", flat, _IGNORED)
        self.encoder = Encoder(pixels, width, mult, blocks, 2 * z)
        self.decoder = Decoder(out, width, mult, blocks, z)
        self.quant_conv = nn.Conv2d(2 * z, 2 * embed, 1)
        self.post_quant_conv = nn.Conv2d(embed, z, 1)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, logvar = per_frame(lambda frames: self.quant_conv(self.encoder(frames)), x).chunk(2, 1)
        return mean, logvar.clamp(*LOGVAR_RANGE)

    def decode(self, z: Tensor) -> Tensor:
        return per_frame(lambda frames: self.decoder(self.post_quant_conv(frames)), z)

    def forward(self, x: Tensor) -> Tensor:
        """The round trip through the mean."""
        return self.decode(self.encode(x)[0])


def per_frame(network: Any, x: Tensor) -> Tensor:
    """A network of frames [N, C, H, W] on a video [B, C, T, H, W], or on frames as they are."""
    if x.ndim == 4:
        return network(x)
    batch = x.shape[0]
    return network(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (batch, -1)).transpose(1, 2)


def normalise(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(GROUPS, channels, eps=EPSILON)


class ResnetBlock(nn.Module):
    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = normalise(channels), nn.Conv2d(channels, out, 3, padding=1)
        self.norm2, self.conv2 = normalise(out), nn.Conv2d(out, out, 3, padding=1)
        if channels != out:
            self.nin_shortcut = nn.Conv2d(channels, out, 1)
        self.changes = channels != out

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return (self.nin_shortcut(x) if self.changes else x) + h


class AttnBlock(nn.Module):
    """One head over all places of a frame."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = normalise(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2).transpose(1, 2)[:, None] for layer in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).reshape(x.shape)
        return x + self.proj_out(h)


class Middle(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels)
        self.attn_1 = AttnBlock(channels)
        self.block_2 = ResnetBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Resample(nn.Module):
    """The released `downsample` and `upsample`: a `conv` with what goes before it."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(channels, channels, 3, stride, padding=0 if stride == 2 else 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 2:
            return self.conv(F.pad(x, (0, 1, 0, 1)))
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    def __init__(self, channels: int, out: int, blocks: int) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(channels if i == 0 else out, out) for i in range(blocks))
        self.attn = nn.ModuleList()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return x


class Encoder(nn.Module):
    def __init__(self, pixels: int, width: int, mult: tuple[int, ...], blocks: int, out: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(pixels, width, 3, padding=1)
        self.down = nn.ModuleList()
        channels = width
        for index, factor in enumerate(mult):
            level = Level(channels, width * factor, blocks)
            channels = width * factor
            if index < len(mult) - 1:
                level.downsample = Resample(channels, 2)
            self.down.append(level)
        self.mid = Middle(channels)
        self.norm_out, self.conv_out = normalise(channels), nn.Conv2d(channels, out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
            if hasattr(level, "downsample"):
                h = level.downsample(h)  # type: ignore[operator]
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    def __init__(self, pixels: int, width: int, mult: tuple[int, ...], blocks: int, z: int) -> None:
        super().__init__()
        channels = width * mult[-1]
        self.conv_in = nn.Conv2d(z, channels, 3, padding=1)
        self.mid = Middle(channels)
        levels: list[Level] = []
        for index in reversed(range(len(mult))):
            level = Level(channels, width * mult[index], blocks + 1)
            channels = width * mult[index]
            if index > 0:
                level.upsample = Resample(channels, 1)
            levels.insert(0, level)  # stored from the finest to the coarsest, run the other way
        self.up = nn.ModuleList(levels)
        self.norm_out, self.conv_out = normalise(channels), nn.Conv2d(channels, pixels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for level in reversed(list(self.up)):
            h = level(h)
            if hasattr(level, "upsample"):
                h = level.upsample(h)  # type: ignore[operator]
        return self.conv_out(F.silu(self.norm_out(h)))
