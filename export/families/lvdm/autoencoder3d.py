"""The 3-D autoencoder of sky, taichi, ucf and the long-video models: 4x in time, 8x in space, KL with 4 channels.

Released quirks that the weights depend on:
- every convolution pads by *replication*, in time as well, and asymmetrically where the total is odd: a 4-wide kernel at stride 1
  gets 2 in front and 1 behind;
- a transposed convolution is padded by the same rule first, then cropped by kernel - 1 on every side;
- GroupNorm has epsilon 1e-6 (the UNets have 1e-5) and its statistics run over all frames at once, so decoding a video in pieces is
  another function than decoding it whole;
- the weight of every padded convolution is registered twice, as `X.conv.weight` and as `X.weight`: the alias is dropped at loading.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import refuse_unknown, refuse_value

GROUPS, EPSILON = 32, 1e-6
LOGVAR_RANGE = (-30.0, 20.0)
# Keys of the released yaml that only training reads.
_TRAINING = ("lossconfig", "monitor", "ckpt_path", "ignore_keys", "image_key", "std", "mean", "prob")


class Autoencoder3D(nn.Module):
    """encode: pixels [B, 3, T, H, W] in [-1, 1] -> (mean, logvar) [B, embed_dim, T/4, H/8, W/8]; decode: the reverse.

    Takes the released `first_stage_config.params` (`embed_dim`, `ddconfig`) or the same numbers flat: `n_hiddens`, `downsample`
    (and `upsample`, default the same), `z_channels`, `embed_dim`, `image_channel`. `model latent = scale * (latent + shift)` is the
    diffusion model's business, not done here.
    """

    def __init__(self, **config: Any) -> None:
        super().__init__()
        flat = _flatten(config)
        hidden, factors, z = flat["n_hiddens"], flat["downsample"], flat["z_channels"]
        self.factors = tuple(int(factor) for factor in factors)  # of time, height, width
        self.encoder = Encoder(hidden, factors, z, flat["image_channel"])
        self.decoder = Decoder(hidden, flat["upsample"], z, flat["image_channel"])
        self.quant_conv = SamePadConv3d(2 * z, 2 * flat["embed_dim"], 1)
        self.post_quant_conv = SamePadConv3d(flat["embed_dim"], z, 1)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the latent, the latter clamped."""
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, 1)
        return mean, logvar.clamp(*LOGVAR_RANGE)

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(z))

    def forward(self, x: Tensor) -> Tensor:
        """The round trip through the mean."""
        return self.decode(self.encode(x)[0])


def triple(stride: Sequence[int]) -> tuple[int, int, int]:
    """Over time, height and width."""
    time, height, width = stride
    return time, height, width


class SamePadConv3d(nn.Module):
    """Convolution behind replicate padding of kernel - stride in all. [B, C, T, H, W]"""

    def __init__(self, channels: int, out: int, kernel: int, stride: Sequence[int] = (1, 1, 1)) -> None:
        super().__init__()
        self.pad = replicate_padding(kernel, stride)
        self.conv = nn.Conv3d(channels, out, kernel, triple(stride))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, self.pad, mode="replicate") if any(self.pad) else x)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        state_dict.pop(f"{prefix}weight", None)  # the released alias of conv.weight
        super()._load_from_state_dict(state_dict, prefix, *rest)


class SamePadConvTranspose3d(nn.Module):
    """Transposed convolution that multiplies each axis by its stride, behind replicate padding."""

    def __init__(self, channels: int, out: int, kernel: int, stride: Sequence[int]) -> None:
        super().__init__()
        self.pad = replicate_padding(kernel, stride)
        self.convt = nn.ConvTranspose3d(channels, out, kernel, triple(stride), padding=kernel - 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.convt(F.pad(x, self.pad, mode="replicate"))


class ResBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(GROUPS, channels, eps=EPSILON)
        self.conv1 = SamePadConv3d(channels, channels, 3)
        self.norm2 = nn.GroupNorm(GROUPS, channels, eps=EPSILON)
        self.conv2 = SamePadConv3d(channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


class Encoder(nn.Module):
    def __init__(self, hidden: int, factors: Sequence[int], z_channels: int, image_channels: int) -> None:
        super().__init__()
        self.conv_first = SamePadConv3d(image_channels, hidden, 3)
        self.conv_blocks = nn.ModuleList()
        channels = hidden
        for stride in strides(factors):
            down = SamePadConv3d(channels, 2 * channels, 4, stride)
            channels *= 2
            self.conv_blocks.append(nn.ModuleDict({"down": down, "res": ResBlock(channels)}))
        norm = nn.GroupNorm(GROUPS, channels, eps=EPSILON)
        self.final_block = nn.Sequential(norm, nn.SiLU(), SamePadConv3d(channels, 2 * z_channels, 3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_first(x)
        for block in self.conv_blocks:
            h = block["res"](block["down"](h))  # type: ignore[index]
        return self.final_block(h)


class Decoder(nn.Module):
    def __init__(self, hidden: int, factors: Sequence[int], z_channels: int, image_channels: int) -> None:
        super().__init__()
        levels = strides(factors)
        self.conv_blocks = nn.ModuleList()
        channels = z_channels
        for level, stride in enumerate(levels):
            out = hidden * 2 ** (len(levels) - level)
            up = SamePadConvTranspose3d(channels, out, 4, stride)
            self.conv_blocks.append(nn.ModuleDict({"up": up, "res1": ResBlock(out), "res2": ResBlock(out)}))
            channels = out
        self.conv_out = SamePadConv3d(channels, image_channels, 3)

    def forward(self, z: Tensor) -> Tensor:
        h = z
        for block in self.conv_blocks:
            h = block["res2"](block["res1"](block["up"](h)))  # type: ignore[index]
        return self.conv_out(h)


def strides(factors: Sequence[int]) -> list[tuple[int, int, int]]:
    """Strides of the levels for factors of (time, height, width): an axis is halved until its factor is reached."""
    left = [int(math.log2(factor)) for factor in factors]
    levels = []
    for level in range(max(left)):
        t, h, w = (2 if count > level else 1 for count in left)
        levels.append((t, h, w))
    return levels


def replicate_padding(kernel: int, stride: Sequence[int]) -> tuple[int, ...]:
    """(front, back) of width, height, time, as F.pad takes them; the odd one goes to the front."""
    totals = [kernel - step for step in reversed(tuple(stride))]
    return tuple(side for total in totals for side in (total // 2 + total % 2, total // 2))


def _flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of a released yaml or of flat keys, in one dictionary."""
    flat = dict(config)
    dd = dict(flat.pop("ddconfig", {}))
    for key in ("encoder", "decoder"):
        nested = dict(dd.pop(key, {}))
        flat |= nested.get("params", nested)
    flat |= dd
    refuse_value("Autoencoder3D", "double_z", flat.pop("double_z", True), True)
    refuse_value("Autoencoder3D", "norm_type", flat.pop("norm_type", "group"), "group")
    refuse_value("Autoencoder3D", "padding_type", flat.pop("padding_type", "replicate"), "replicate")
    known = {"image_channel": 3, "z_channels": 4, "embed_dim": 4, **flat}
    known.setdefault("upsample", known.get("downsample"))
    needed = ("n_hiddens", "downsample", "upsample", "z_channels", "embed_dim", "image_channel")
    refuse_unknown("Autoencoder3D", known, (*needed, *_TRAINING))
    missing = [key for key in needed if known.get(key) is None]
    if missing:
        refuse_value("Autoencoder3D", missing[0], None, "a number")
    return {key: known[key] for key in needed}


def sample_latent(mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    """A draw of the latent: mean + exp(logvar / 2) * noise."""
    return mean + torch.exp(0.5 * logvar) * noise
