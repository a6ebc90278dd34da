"""Layers of the causal 3-D autoencoder, with explicit memory. Data is [batch, channels, frames, height, width].

A stage has `rate` frames per latent: 1, 2 or 4. The first latent of a video stands for one frame alone. So that one graph serves it too,
it is run like any other, and of its `rate` frames only the last is valid: the others are hidden from every convolution over time while
`Pass.begun` is 0, and the caller drops them from the result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

KERNEL = 3  # in time and space


class Pass:
    """One run over a chunk: memory that is taken slot by slot in running order, and what takes its place.

    begun  [] float32: 0 where the chunk begins with the first latent of a video, 1 later
    """

    def __init__(self, memory: Sequence[Tensor], begun: Tensor) -> None:
        self._memory: Iterator[Tensor] = iter(memory)
        self.begun = begun
        self.kept: list[Tensor] = []

    def joined(self, x: Tensor, hidden: int, keeps: int) -> Tensor:
        """Memory and x along time, the first `hidden` frames of x zero in the chunk that begins a video. The last `keeps` are kept."""
        begun = self.begun.to(x.dtype)
        parts = (x[:, :, :hidden] * begun, x[:, :, hidden:]) if hidden else (x,)
        whole = torch.cat((next(self._memory), *parts), 2)
        self.kept.append(whole[:, :, -keeps:])
        return whole

    def replaced(self, made: Tensor, plain: Tensor, frames: slice) -> Tensor:
        """`made`, whose `frames` are `plain` in the chunk that begins a video."""
        first = torch.where(self.begun > 0, made[:, :, frames], plain)
        return torch.cat((made[:, :, : frames.start], first, made[:, :, frames.stop :]), 2)


class CausalConv3d(nn.Conv3d):
    """Stride 1. In time it sees two frames before; memory holds the last two of its input, zeros before a video."""

    def __init__(self, channels: int, out: int, rate: int) -> None:
        super().__init__(channels, out, KERNEL)
        self.rate = rate

    def forward(self, x: Tensor, run: Pass) -> Tensor:  # type: ignore[override]
        whole = run.joined(x, self.rate - 1, KERNEL - 1)
        return F.conv3d(whole, self.weight, self.bias, padding=(0, 1, 1))


class ChannelNorm(nn.Module):
    """Over channels at every place: x / max(|x|, 1e-12) * sqrt(channels) * gamma. `axes`: how many of 1 gamma has behind channels."""

    def __init__(self, channels: int, axes: int = 3) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *[1] * axes))

    def forward(self, x: Tensor) -> Tensor:
        gain = self.gamma.flatten()[:, None, None, None] * self.gamma.shape[0] ** 0.5
        return F.normalize(x, dim=1) * gain


class ResidualBlock(nn.Module):
    """Norm, SiLU, convolution, twice."""

    def __init__(self, channels: int, out: int, rate: int) -> None:
        super().__init__()
        self.residual = nn.ModuleDict(
            {
                "0": ChannelNorm(channels),
                "2": CausalConv3d(channels, out, rate),
                "3": ChannelNorm(out),
                "6": CausalConv3d(out, out, rate),
            }
        )
        self.shortcut = nn.Conv3d(channels, out, 1) if channels != out else nn.Identity()

    def forward(self, x: Tensor, run: Pass) -> Tensor:
        parts = self.residual
        h = parts["2"](F.silu(parts["0"](x)), run)
        h = parts["6"](F.silu(parts["3"](h)), run)
        return self.shortcut(x) + h


class AttentionBlock(nn.Module):
    """One head over all places of a frame; frames do not see each other."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels, axes=2)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, run: Pass) -> Tensor:
        del run
        height, width = x.shape[3:]
        rows = self.norm(x).permute(0, 2, 3, 4, 1).flatten(2, 3)  # [B, T, h w, c]
        query, key, value = _linear(rows, self.to_qkv).chunk(3, -1)
        out = _linear(F.scaled_dot_product_attention(query, key, value), self.proj)
        return x + out.unflatten(2, (height, width)).permute(0, 4, 1, 2, 3)


class Upsample(nn.Module):
    """Twice the size and half the channels; with `over_time` twice the frames, too. `rate`: frames per latent that come in."""

    def __init__(self, channels: int, rate: int, over_time: bool) -> None:
        super().__init__()
        self.rate = rate
        self.resample = nn.ModuleDict({"1": nn.Conv2d(channels, channels // 2, KERNEL)})
        if over_time:
            self.time_conv = nn.Conv3d(channels, 2 * channels, (KERNEL, 1, 1))
        self.over_time = over_time

    def forward(self, x: Tensor, run: Pass) -> Tensor:
        if self.over_time:
            x = self._twice(x, run)
        x = F.interpolate(x, scale_factor=(1.0, 2.0, 2.0), mode="nearest")
        return _per_frame(x, self.resample["1"], 1)

    def _twice(self, x: Tensor, run: Pass) -> Tensor:
        """Two frames of each. No frame of the first latent enters the convolution or is changed by it."""
        made = self.time_conv(run.joined(x, self.rate, KERNEL - 1))
        earlier, later = made.chunk(2, 1)
        later = run.replaced(later, x[:, :, : self.rate], slice(0, self.rate))
        return torch.stack((earlier, later), 3).flatten(2, 3)


class Downsample(nn.Module):
    """Half the size; with `over_time` half the frames, too. `rate`: frames per latent that come in."""

    def __init__(self, channels: int, rate: int, over_time: bool) -> None:
        super().__init__()
        self.rate = rate
        self.resample = nn.ModuleDict({"1": nn.Conv2d(channels, channels, KERNEL, 2)})
        if over_time:
            self.time_conv = nn.Conv3d(channels, channels, (KERNEL, 1, 1), (2, 1, 1))
        self.over_time = over_time

    def forward(self, x: Tensor, run: Pass) -> Tensor:
        x = _per_frame(F.pad(x, (0, 1, 0, 1)), self.resample["1"], 0)
        if not self.over_time:
            return x
        made = self.time_conv(run.joined(x, 0, 1))
        # The first frame of a video passes unchanged: the last of the first latent's that comes in is the last that goes out.
        last = self.rate // 2 - 1
        return run.replaced(made, x[:, :, self.rate - 1 : self.rate], slice(last, last + 1))


def _per_frame(x: Tensor, conv: nn.Module, padding: int) -> Tensor:
    """A convolution of the checkpoint over height and width, on all frames at once."""
    assert isinstance(conv, nn.Conv2d)
    return F.conv3d(x, conv.weight[:, :, None], conv.bias, (1, *conv.stride), (0, padding, padding))


def _linear(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """A kernel-1 convolution of the checkpoint on channels-last data."""
    return F.linear(x, conv.weight.flatten(1), conv.bias)
