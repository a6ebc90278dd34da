"""Attention of the text-to-video UNet: a transformer block with two temporal attentions between the spatial ones."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...ops.relative_attention import relative_attention
from .attention import RelativePosition
from .group_norm import GROUPS

# The entry norm alone has the autoencoders' epsilon; every other GroupNorm of the UNets has 1e-5.
ENTRY_EPSILON = 1e-6


class SpatialTemporalTransformer(nn.Module):
    """x [B, C, T, H, W], context [B, tokens, context_dim] -> x; the same context serves every frame."""

    def __init__(
        self, channels: int, heads: int, head_size: int, depth: int, context_dim: int, reach: int | None
    ) -> None:
        super().__init__()
        inner = heads * head_size
        self.norm = nn.GroupNorm(GROUPS, channels, eps=ENTRY_EPSILON)
        self.proj_in = nn.Conv3d(channels, inner, 1)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(inner, heads, head_size, context_dim, reach) for _ in range(depth)
        )
        self.proj_out = nn.Conv3d(inner, channels, 1)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        keys = [key for block in self.transformer_blocks for key in block.attn2.keys(context)]  # type: ignore[union-attr, operator]
        return self.with_keys(x, iter(keys))

    def with_keys(self, x: Tensor, keys: Iterator[Tensor]) -> Tensor:
        """`keys` yields key and value of the text for each block, as `CrossAttention.keys` makes them."""
        height, width = x.shape[3:]
        h = pointwise(self.norm(x).permute(0, 2, 3, 4, 1), self.proj_in)
        h = h.flatten(2, 3)  # [B, T, H W, C]
        for block in self.transformer_blocks:
            h = block(h, next(keys), next(keys))
        h = pointwise(h, self.proj_out).unflatten(2, (height, width))
        return x + h.permute(0, 4, 1, 2, 3)


class TransformerBlock(nn.Module):
    """Space, time, text, time, feed-forward; each pre-normed, with a residual. [B, T, H W, C] -> the same.

    `attn2_tmp` is a self-attention despite its name, and the norms are numbered in the order of their birth: 1, 4, 2, 5, 3.
    """

    def __init__(self, width: int, heads: int, head_size: int, context_dim: int, reach: int | None) -> None:
        super().__init__()
        self.attn1 = CrossAttention(width, width, heads, head_size)
        self.attn2 = CrossAttention(width, context_dim, heads, head_size)
        self.attn1_tmp = TemporalAttention(width, heads, head_size, reach)
        self.attn2_tmp = TemporalAttention(width, heads, head_size, reach)
        self.ff = FeedForward(width)
        self.norm1, self.norm2, self.norm3, self.norm4, self.norm5 = (nn.LayerNorm(width) for _ in range(5))

    def forward(self, x: Tensor, text_key: Tensor, text_value: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn1_tmp(self.norm4(x))
        x = x + self.attn2.attend(self.norm2(x), text_key, text_value)
        x = x + self.attn2_tmp(self.norm5(x))
        return x + self.ff(self.norm3(x))


class CrossAttention(nn.Module):
    """Tokens of each frame attend to themselves, or to the context. x [B, T, N, C]"""

    def __init__(self, width: int, context_dim: int, heads: int, head_size: int) -> None:
        super().__init__()
        self.heads, self.head_size = heads, head_size
        self.to_q = nn.Linear(width, heads * head_size, bias=False)
        self.to_k = nn.Linear(context_dim, heads * head_size, bias=False)
        self.to_v = nn.Linear(context_dim, heads * head_size, bias=False)
        self.to_out = nn.Sequential(nn.Linear(heads * head_size, width), nn.Dropout(0.0))

    def forward(self, x: Tensor) -> Tensor:
        """Self-attention within each frame."""
        _, frames, tokens, _ = x.shape
        shape = (-1, tokens, self.heads, self.head_size)
        q, k, v = (layer(x).reshape(shape).transpose(1, 2) for layer in (self.to_q, self.to_k, self.to_v))
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.to_out(h.reshape(-1, frames, tokens, self.heads * self.head_size))

    def keys(self, context: Tensor) -> list[Tensor]:
        """Key and value of a context [B, tokens, context_dim], each [B, heads, tokens, d]."""
        shape = (-1, context.shape[1], self.heads, self.head_size)
        return [layer(context).reshape(shape).transpose(1, 2) for layer in (self.to_k, self.to_v)]

    def attend(self, x: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Tokens of all frames, as one sequence of queries, attend to a context."""
        _, frames, tokens, _ = x.shape
        q = self.to_q(x).reshape(-1, frames * tokens, self.heads, self.head_size).transpose(1, 2)
        h = F.scaled_dot_product_attention(q, key, value).transpose(1, 2)
        return self.to_out(h.reshape(-1, frames, tokens, self.heads * self.head_size))


class TemporalAttention(nn.Module):
    """Frames attend to frames at each place, with Shaw's relative positions. x [B, T, N, C]"""

    def __init__(self, width: int, heads: int, head_size: int, reach: int | None) -> None:
        super().__init__()
        self.heads, self.head_size = heads, head_size
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, heads * head_size, bias=False) for _ in range(3))
        self.to_out = nn.Sequential(nn.Linear(heads * head_size, width), nn.Dropout(0.0))
        self.relative = reach is not None
        if reach is not None:
            self.relative_position_k = RelativePosition(head_size, reach)
            self.relative_position_v = RelativePosition(head_size, reach)

    def forward(self, x: Tensor) -> Tensor:
        _, frames, places, _ = x.shape
        qkv = F.linear(x, torch.cat([self.to_q.weight, self.to_k.weight, self.to_v.weight]))
        qkv = qkv.reshape(-1, frames, places, 3, self.heads, self.head_size)
        tables = (
            (self.relative_position_k.embeddings_table, self.relative_position_v.embeddings_table)
            if self.relative
            else ()
        )
        return self.to_out(relative_attention(qkv, *tables, transposed=False))


class GEGLU(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, -1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(width, 4 * width), nn.Dropout(0.0), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def pointwise(x: Tensor, conv: nn.Conv3d) -> Tensor:
    """A 1x1x1 convolution of the checkpoint on channels-last data."""
    return F.linear(x, conv.weight.flatten(1), conv.bias)
