"""What the UNet is made of, by the parameter names of diffusers' UNet2DConditionModel.

A row is one branch of guidance of one stream. What depends on the text or on the anchor alone, keys and values, comes from outside.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EPSILON, ENTRY_EPSILON = 1e-5, 1e-6  # of GroupNorm; of the one at the entry of a transformer


class Context(NamedTuple):
    """What one cross-attention reads, [rows, 2, heads, tokens, head size] each: keys, then values.

    An anchor that is absent has keys and values of zero, which add nothing.
    """

    text: Tensor
    anchor: Tensor


class Residual(nn.Module):
    """Two normed convolutions beside the input, with the time embedding added between them."""

    def __init__(self, inputs: int, outputs: int, embedding: int, groups: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.GroupNorm(groups, width, EPSILON) for width in (inputs, outputs))
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.time_emb_proj = nn.Linear(embedding, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x [rows, inputs, h, w]; embedding [rows, E], after its SiLU."""
        h = self.conv1(F.silu(self.norm1(x))) + self.time_emb_proj(embedding)[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(nn.Module):
    """Attention of `width` over tokens of `context_width`; no bias but that of the output."""

    def __init__(self, width: int, heads: int, context_width: int | None = None) -> None:
        super().__init__()
        self.head_size = width // heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k, self.to_v = (nn.Linear(context_width or width, width, bias=False) for _ in range(2))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def split(self, x: Tensor) -> Tensor:
        """[rows, tokens, width] -> [rows, heads, tokens, head size]"""
        return x.unflatten(-1, (-1, self.head_size)).transpose(1, 2)

    def joined(self, x: Tensor) -> Tensor:
        """The reverse, through the output layer."""
        return self.to_out[0](x.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        """Self-attention. x [rows, tokens, width]"""
        q, k, v = (self.split(layer(x)) for layer in (self.to_q, self.to_k, self.to_v))
        return self.joined(F.scaled_dot_product_attention(q, k, v))


class CrossAttention(Attention):
    """Attention to the text and, by the same queries, to the anchor, whose outputs are added (as in IP-Adapter, arXiv:2308.06721)."""

    def __init__(self, width: int, heads: int, text_width: int, anchor_width: int) -> None:
        super().__init__(width, heads, text_width)
        self.to_k_anchor, self.to_v_anchor = (nn.Linear(anchor_width, width, bias=False) for _ in range(2))
        nn.init.zeros_(self.to_v_anchor.weight)

    def of_text(self, tokens: Tensor) -> Tensor:
        """Keys and values of a text, constant per prompt. [rows, tokens, text width] -> [rows, 2, heads, tokens, head size]"""
        return torch.stack([self.split(self.to_k(tokens)), self.split(self.to_v(tokens))], 1)

    def of_anchor(self, tokens: Tensor) -> Tensor:
        """Keys and values of an anchor, constant per stream. [rows, tokens, anchor width] -> [rows, 2, heads, tokens, head size]"""
        return torch.stack([self.split(self.to_k_anchor(tokens)), self.split(self.to_v_anchor(tokens))], 1)

    def attend(self, x: Tensor, context: Context) -> Tensor:
        """x [rows, tokens, width] -> the same."""
        q = self.split(self.to_q(x))
        text, anchor = (
            F.scaled_dot_product_attention(q, each[:, 0], each[:, 1])
            for each in (context.text, context.anchor)
        )
        return self.joined(text + anchor)


class GEGLU(nn.Module):
    """Twice as wide, half of it a gate (Shazeer 2020, arXiv:2002.05202), with the exact GELU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, -1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """Four times as wide and back. Index 1 is a dropout in diffusers, which has no parameters."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class Block(nn.Module):
    """Self-attention, cross-attention and a feed-forward layer, each behind a LayerNorm and with a residual."""

    def __init__(self, width: int, heads: int, text_width: int, anchor_width: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.attn1 = Attention(width, heads)
        self.attn2 = CrossAttention(width, heads, text_width, anchor_width)
        self.ff = FeedForward(width)


class Transformer(nn.Module):
    """One block over the places of a frame, between two projections."""

    def __init__(self, width: int, heads: int, text_width: int, anchor_width: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, ENTRY_EPSILON)
        self.proj_in, self.proj_out = nn.Linear(width, width), nn.Linear(width, width)
        self.transformer_blocks = nn.ModuleList([Block(width, heads, text_width, anchor_width)])

    @property
    def block(self) -> Block:
        block = self.transformer_blocks[0]
        assert isinstance(block, Block)
        return block

    def before_text(self, x: Tensor) -> Tensor:
        """What needs no text: x [rows, width, h, w] -> tokens [rows, places, width]."""
        h = self.proj_in(self.norm(x).flatten(2).transpose(1, 2))
        return h + self.block.attn1(self.block.norm1(h))

    def after_text(self, x: Tensor, h: Tensor, context: Context) -> Tensor:
        """The rest, from the layer's input and what `before_text` gave."""
        block = self.block
        h = h + block.attn2.attend(block.norm2(h), context)
        h = self.proj_out(h + block.ff(block.norm3(h)))
        return x + h.transpose(1, 2).reshape(x.shape)


class Down(nn.Module):
    """Half the size."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Up(nn.Module):
    """Twice the size."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class TimeEmbedding(nn.Module):
    """Two layers over the sinusoid of a timestep."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, 4 * width)

    def forward(self, timesteps: Tensor) -> Tensor:
        """[rows] -> [rows, 4 * width]"""
        wave = sinusoid(timesteps, self.linear_1.in_features).to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(wave)))


def sinusoid(timesteps: Tensor, width: int) -> Tensor:
    """[rows] -> [rows, width] float32: cosines, then sines, of t * 10000^(-i / half)."""
    half = width // 2
    index = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    angle = timesteps[:, None].float() * torch.exp(-math.log(10000.0) * index / half)
    return torch.cat([angle.cos(), angle.sin()], -1)
