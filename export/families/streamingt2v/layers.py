"""What the three 3-D UNets of StreamingT2V are made of, by the names of their checkpoints.

Activations are frames one after the other, x [rows * frames, C, h, w]; a row is one video, that of one branch of guidance. Convolutions
and spatial attention see single frames; temporal layers take `frames` and see all frames of a row. In the release nothing knows the
position of a frame: its order enters through temporal convolutions alone.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...ops.relative_attention import relative_attention

GROUPS = 32  # of every norm, unless another number is given
HIDDEN = 4  # width of a feed-forward layer, over that of its input
CONVOLUTIONS = 4  # of a temporal convolution
EPSILON = 1e-5
# GroupNorm at the entry of transformers and of mergers alone.
ENTRY_EPSILON = 1e-6


class TextKeys(NamedTuple):
    """What one cross-attention reads of a text, [rows, heads, tokens, head size] each. All frames of a row share it."""

    key: Tensor
    value: Tensor


class Attention(nn.Module):
    """Attention of `channels` over tokens of `context_channels`, heads of `head_size`; no bias but that of the output."""

    def __init__(self, channels: int, head_size: int, context_channels: int | None = None) -> None:
        super().__init__()
        self.head_size = head_size
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k, self.to_v = (
            nn.Linear(context_channels or channels, channels, bias=False) for _ in range(2)
        )
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def keys(self, context: Tensor) -> TextKeys:
        """context [rows, tokens, channels] -> keys and values by head."""
        return TextKeys(self.heads(self.to_k(context)), self.heads(self.to_v(context)))

    def heads(self, x: Tensor) -> Tensor:
        """[..., tokens, channels] -> [..., heads, tokens, head size]"""
        return x.unflatten(-1, (-1, self.head_size)).transpose(-3, -2)

    def attend(self, x: Tensor, context: TextKeys) -> Tensor:
        """x [rows, tokens, channels] -> the same, no mask."""
        out = F.scaled_dot_product_attention(self.heads(self.to_q(x)), context.key, context.value)
        return self.to_out[0](out.transpose(1, 2).flatten(2))

    def over_space(self, x: Tensor) -> Tensor:
        """Self-attention of the places of each frame. x [frames, places, channels]"""
        return self.attend(x, self.keys(x))

    def over_time(self, x: Tensor) -> Tensor:
        """Self-attention of the frames of each place. x [rows, frames, places, channels]"""
        packed = torch.stack([self.to_q(x), self.to_k(x), self.to_v(x)], 3)
        return self.to_out[0](relative_attention(packed.unflatten(-1, (-1, self.head_size))))


class GEGLU(nn.Module):
    """Twice as wide, half of it a gate (Shazeer 2020, arXiv:2002.05202), with the exact GELU."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, -1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """So many times as wide and back."""

    def __init__(self, channels: int, times: int = HIDDEN) -> None:
        super().__init__()
        # Index 1 is a dropout of the release, which has no parameters.
        self.net = nn.ModuleList(
            [GEGLU(channels, times * channels), nn.Identity(), nn.Linear(times * channels, channels)]
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class Block(nn.Module):
    """Attention, a second attention and a feed-forward layer, each behind a LayerNorm and with a residual."""

    def __init__(self, channels: int, attn1: Attention, attn2: Attention, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(channels) for _ in range(3))
        self.attn1, self.attn2 = attn1, attn2
        self.ff = FeedForward(channels, hidden)


class Transformer(nn.Module):
    """Entry norm, projections and one block; `proj_in` and `proj_out` are kernel-1 convolutions in the enhancer's temporal layers."""

    def __init__(
        self, channels: int, inner: int, block: Block, convolutions: bool = False, groups: int = GROUPS
    ) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, ENTRY_EPSILON)
        sizes = ((channels, inner), (inner, channels))
        self.proj_in, self.proj_out = (
            nn.Conv1d(*size, 1) if convolutions else nn.Linear(*size) for size in sizes
        )
        self.transformer_blocks = nn.ModuleList([block])

    @property
    def block(self) -> Block:
        block = self.transformer_blocks[0]
        assert isinstance(block, Block)
        return block


def project(x: Tensor, layer: nn.Module) -> Tensor:
    """A linear layer, or a kernel-1 convolution of the checkpoint, on data with the channels last."""
    weight, bias = layer.get_parameter("weight"), layer.get_parameter("bias")
    return F.linear(x, weight.squeeze(2) if weight.ndim == 3 else weight, bias)


class SpatialTransformer(Transformer):
    """Self-attention of the places of a frame, then attention to the text."""

    def __init__(
        self,
        channels: int,
        head_size: int,
        attention: Attention,
        groups: int = GROUPS,
        hidden: int = HIDDEN,
    ) -> None:
        block = Block(channels, Attention(channels, head_size), attention, hidden)
        super().__init__(channels, channels, block, groups=groups)

    def before_text(self, x: Tensor) -> Tensor:
        """What needs no text: x [n, C, h, w] -> tokens [n, places, C]."""
        h = project(self.norm(x).flatten(2).transpose(1, 2), self.proj_in)
        return h + self.block.attn1.over_space(self.block.norm1(h))

    def after_text(self, x: Tensor, h: Tensor, text: TextKeys, frames: int) -> Tensor:
        """The rest, from the layer's input and what `before_text` gave. The frames of a row are one list of queries."""
        block = self.block
        queries = block.norm2(h).reshape(-1, frames * h.shape[1], h.shape[2])
        h = h + block.attn2.attend(queries, text).reshape(h.shape)
        h = project(h + block.ff(block.norm3(h)), self.proj_out)
        return x + h.transpose(1, 2).reshape(x.shape)


class TemporalTransformer(Transformer):
    """Two self-attentions over the frames of each place. `heads`: of the stem, whose inner width is not that of its channels."""

    def __init__(
        self,
        channels: int,
        head_size: int,
        heads: int | None = None,
        convolutions: bool = False,
        groups: int = GROUPS,
        hidden: int = HIDDEN,
    ) -> None:
        inner = channels if heads is None else heads * head_size
        block = Block(inner, Attention(inner, head_size), Attention(inner, head_size), hidden)
        super().__init__(channels, inner, block, convolutions, groups)

    def forward(self, x: Tensor, frames: int) -> Tensor:
        block = self.block
        h = project(over_frames(self.norm, x, frames), self.proj_in)
        h = h + block.attn1.over_time(block.norm1(h))
        h = h + block.attn2.over_time(block.norm2(h))
        h = project(h + block.ff(block.norm3(h)), self.proj_out)
        return x + back(h, x)


def over_frames(norm: nn.GroupNorm, x: Tensor, frames: int) -> Tensor:
    """GroupNorm whose statistics are over all frames of a row. [rows * frames, C, h, w] -> [rows, frames, places, C]"""
    video = x.flatten(2).unflatten(0, (-1, frames)).transpose(1, 2)  # [rows, C, frames, places]
    return norm(video).permute(0, 2, 3, 1)


def back(h: Tensor, like: Tensor) -> Tensor:
    """[rows, frames, places, C] -> [rows * frames, C, h, w]"""
    return h.flatten(0, 1).transpose(1, 2).reshape(like.shape)


class TemporalConv(nn.Module):
    """Convolutions over three frames each, one behind the other, beside the input: four in the release.

    There `conv1` has no dropout, so its index is another.
    """

    def __init__(self, channels: int, groups: int = GROUPS, convolutions: int = CONVOLUTIONS) -> None:
        super().__init__()

        def layer(dropout: bool) -> nn.Sequential:
            parts = [nn.GroupNorm(groups, channels, EPSILON), nn.SiLU()]
            parts += [nn.Dropout(0.0)] if dropout else []
            return nn.Sequential(*parts, nn.Conv3d(channels, channels, (3, 1, 1), padding=(1, 0, 0)))

        self.count = convolutions
        for index in range(convolutions):
            self.add_module(f"conv{index + 1}", layer(index > 0))

    def forward(self, x: Tensor, frames: int) -> Tensor:
        h = x.unflatten(0, (-1, frames)).transpose(1, 2)  # [rows, C, frames, h, w]
        for index in range(self.count):
            h = self.get_submodule(f"conv{index + 1}")(h)
        return x + h.transpose(1, 2).flatten(0, 1)


class FramePositions(nn.Module):
    """Adds a learned vector per frame of the window. The release has none; a network that is trained for an hour is in need of it."""

    def __init__(self, frames: int, channels: int) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.zeros(frames, channels))

    def forward(self, x: Tensor, frames: int) -> Tensor:
        return (x.unflatten(0, (-1, frames)) + self.place[:frames, :, None, None]).flatten(0, 1)


class ResidualParts(NamedTuple):
    """The layers of a residual block by role."""

    norm1: nn.GroupNorm
    conv1: nn.Conv2d
    embedding: nn.Linear
    norm2: nn.GroupNorm
    conv2: nn.Conv2d
    shortcut: nn.Conv2d | None


class Residual(nn.Module):
    """Two normed convolutions beside the input; between them the time embedding is added. A subclass has the names of its checkpoint."""

    def parts(self) -> ResidualParts:
        raise NotImplementedError

    def forward(self, x: Tensor, projected: Tensor) -> Tensor:
        """x [n, C, h, w]; `projected` [n, out]: what `embedding` makes of the time embedding of each frame."""
        parts = self.parts()
        h = parts.conv1(F.silu(parts.norm1(x))) + projected[:, :, None, None]
        h = parts.conv2(F.silu(parts.norm2(h)))
        return h + (x if parts.shortcut is None else parts.shortcut(x))


def timestep_embedding(timesteps: Tensor, channels: int) -> Tensor:
    """[n] -> [n, channels] float32: cosines, then sines, of t * 10000^(-i / half)."""
    half = channels // 2
    index = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    angle = timesteps[:, None].float() * torch.exp(-math.log(10000.0) * index / half)
    return torch.cat([angle.cos(), angle.sin()], -1)
