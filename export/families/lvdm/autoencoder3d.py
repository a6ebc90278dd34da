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
from operator import lt
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from pyengine.errors import ConfigError, ShapeError

from .config import refuse_unknown, refuse_value

GROUPS, EPSILON = 32, 1e-6
LOGVAR_RANGE = (-30.0, 20.0)
PADDINGS = ("replicate", "reflect", "circular", "constant")
_SIZES = ("n_hiddens", "downsample", "upsample", "z_channels", "embed_dim", "image_channel", "padding_type")
_KEYS = (*_SIZES, "double_z", "norm_type")  # of the yaml, its ddconfig and either half of that
# Keys of the released yaml that only training reads.
_TRAINING = ("lossconfig", "monitor", "ckpt_path", "ignore_keys", "image_key", "std", "mean", "prob")


class Autoencoder3D(nn.Module):
    """encode: pixels [B, 3, T, H, W] in [-1, 1] -> (mean, logvar) [B, embed_dim, T/4, H/8, W/8]; decode: the reverse.

    Takes the released `first_stage_config.params` (`embed_dim`, `ddconfig`) or the same numbers flat: `n_hiddens`, `downsample`
    (and `upsample`, default the same), `z_channels`, `embed_dim`, `image_channel`, and `padding_type`, which as released is for
    the encoder's convolutions outside its ResBlocks alone: all others replicate. Raises ConfigError, ShapeError.
    `model latent = scale * (latent + shift)` is the diffusion model's business, not done here.
    """

    def __init__(self, **config: Any) -> None:
        super().__init__()
        flat = _flatten(config)
        given, made = flat["encoder"], flat["decoder"]
        z, factors = flat["z_channels"], given["downsample"]
        self.factors = tuple(2 ** int(math.log2(factor)) for factor in factors)  # of time, height, width
        self.channels, self.embed_dim = given["image_channel"], flat["embed_dim"]
        self.encoder = Encoder(given["n_hiddens"], factors, z, self.channels, given["padding_type"])
        self.decoder = Decoder(made["n_hiddens"], made["upsample"], z, made["image_channel"])
        self.quant_conv = SamePadConv3d(2 * z, 2 * self.embed_dim, 1)
        self.post_quant_conv = SamePadConv3d(self.embed_dim, z, 1)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the latent, the latter clamped."""
        smallest = [self.channels, *self.factors]
        if x.ndim != 5 or x.shape[1] != self.channels or any(map(lt, x.shape[2:], self.factors)):
            raise ShapeError(
                f"[Autoencoder3D] expected x [batch, channels, frames, height, width] of {smallest} or more but got {list(x.shape)}"
            )
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, 1)
        return mean, logvar.clamp(*LOGVAR_RANGE)

    def decode(self, z: Tensor) -> Tensor:
        if z.ndim != 5 or z.shape[1] != self.embed_dim:
            raise ShapeError(
                f"[Autoencoder3D] expected z [batch, {self.embed_dim}, frames, height, width] but got {list(z.shape)}"
            )
        return self.decoder(self.post_quant_conv(z))

    def forward(self, x: Tensor) -> Tensor:
        """The round trip through the mean."""
        return self.decode(self.encode(x)[0])


def triple(stride: Sequence[int]) -> tuple[int, int, int]:
    """Over time, height and width."""
    time, height, width = stride
    return time, height, width


class SamePadConv3d(nn.Module):
    """Convolution behind padding of kernel - stride in all, by replication unless told otherwise. [B, C, T, H, W]"""

    def __init__(
        self, channels: int, out: int, kernel: int, stride: Sequence[int] = (1, 1, 1), mode: str = "replicate"
    ) -> None:
        super().__init__()
        self.pad, self.mode = same_padding(kernel, stride), mode
        self.conv = nn.Conv3d(channels, out, kernel, triple(stride))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, self.pad, mode=self.mode) if any(self.pad) else x)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        state_dict.pop(f"{prefix}weight", None)  # the released alias of conv.weight
        super()._load_from_state_dict(state_dict, prefix, *rest)


class SamePadConvTranspose3d(nn.Module):
    """Transposed convolution that multiplies each axis by its stride, behind replicate padding."""

    def __init__(self, channels: int, out: int, kernel: int, stride: Sequence[int]) -> None:
        super().__init__()
        self.pad = same_padding(kernel, stride)
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
    def __init__(
        self, hidden: int, factors: Sequence[int], z_channels: int, image_channels: int, mode: str
    ) -> None:
        super().__init__()
        self.conv_first = SamePadConv3d(image_channels, hidden, 3, mode=mode)
        self.conv_blocks = nn.ModuleList()
        channels = hidden
        for stride in strides(factors):
            down = SamePadConv3d(channels, 2 * channels, 4, stride, mode)
            channels *= 2
            self.conv_blocks.append(nn.ModuleDict({"down": down, "res": ResBlock(channels)}))
        norm = nn.GroupNorm(GROUPS, channels, eps=EPSILON)
        last = SamePadConv3d(channels, 2 * z_channels, 3, mode=mode)
        self.final_block = nn.Sequential(norm, nn.SiLU(), last)

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


def same_padding(kernel: int, stride: Sequence[int]) -> tuple[int, ...]:
    """(front, back) of width, height, time, as F.pad takes them; the odd one goes to the front."""
    totals = [kernel - step for step in reversed(tuple(stride))]
    return tuple(side for total in totals for side in (total // 2 + total % 2, total // 2))


def _flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of a released yaml or of flat keys: those of both halves, and of `encoder` and `decoder` each, which may differ."""
    common = dict(config)
    dd = dict(common.pop("ddconfig", {}))
    halves = {half: dict(dd.pop(half, {})) for half in ("encoder", "decoder")}
    halves = {half: dict(nested.get("params", nested)) for half, nested in halves.items()}
    refuse_unknown("Autoencoder3D", common, (*_KEYS, *_TRAINING))
    # The release reads no other key of ddconfig.
    common |= {key: value for key, value in dd.items() if key in _KEYS}
    found: dict[str, Any] = {}
    for half, nested in halves.items():
        refuse_unknown("Autoencoder3D", nested, _KEYS)
        own = {"image_channel": 3, "z_channels": 4, "padding_type": "replicate", **common, **nested}
        own.setdefault("upsample", own.get("downsample", halves["encoder"].get("downsample")))
        refuse_value("Autoencoder3D", "double_z", own.pop("double_z", True), True)
        refuse_value("Autoencoder3D", "norm_type", own.pop("norm_type", "group"), "group")
        found[half] = own
    z = common.get("z_channels", found["encoder"]["z_channels"])
    for half in halves:
        refuse_value("Autoencoder3D", f"z_channels of the {half}", found[half]["z_channels"], z)
    found |= {"z_channels": z, "embed_dim": common.get("embed_dim", 4)}
    for half, key in (
        ("encoder", "n_hiddens"),
        ("encoder", "downsample"),
        ("decoder", "n_hiddens"),
        ("decoder", "upsample"),
    ):
        if found[half].get(key) is None:
            raise ConfigError(
                f"[Autoencoder3D] expected {key} but got none; give the yaml's `first_stage_config.params`"
            )
    if found["encoder"]["padding_type"] not in PADDINGS:
        raise ConfigError(
            f"[Autoencoder3D] expected padding_type out of {', '.join(PADDINGS)} but got {found['encoder']['padding_type']!r}"
        )
    return found
