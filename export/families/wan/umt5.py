"""The encoder of UMT5 by the names of Wan's own file. A stream reads prompts through `transformers`; this is what its weights are checked
against, and the reference for how they are renamed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...ops.frame_window_attention import accumulator

EPSILON, FARTHEST = 1e-6, 128


class TextEncoder(nn.Module):
    """ids, mask [B, L] int64 -> states [B, L, dim], zero where mask is 0."""

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        dim_attn: int,
        dim_ffn: int,
        num_heads: int,
        encoder_layers: int,
        num_buckets: int,
    ) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, dim)
        self.blocks = nn.ModuleList(
            Block(dim, dim_attn, dim_ffn, num_heads, num_buckets) for _ in range(encoder_layers)
        )
        self.norm = Norm(dim)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.token_embedding(ids)
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x) * mask[..., None]


class Norm(nn.Module):
    """x over its root mean square, in float32, times a gain."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(accumulator(x.dtype))
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPSILON)).to(x.dtype) * self.weight


class Block(nn.Module):
    def __init__(self, dim: int, dim_attn: int, dim_ffn: int, heads: int, buckets: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = Norm(dim), Norm(dim)
        self.attn = Attention(dim, dim_attn, heads)
        self.ffn = FeedForward(dim, dim_ffn)
        self.pos_embedding = RelativePosition(buckets, heads)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), mask, self.pos_embedding(x.shape[1]))
        return x + self.ffn(self.norm2(x))


class Attention(nn.Module):
    """Scores are not divided by the root of the head size."""

    def __init__(self, dim: int, dim_attn: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(dim, dim_attn, bias=False) for _ in range(3))
        self.o = nn.Linear(dim_attn, dim, bias=False)

    def forward(self, x: Tensor, mask: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        hidden = (mask == 0)[:, None, None]
        bias = bias.expand(x.shape[0], -1, -1, -1).masked_fill(hidden, torch.finfo(x.dtype).min)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        return self.o(out.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, dim: int, dim_ffn: int) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(dim, dim_ffn, bias=False), nn.GELU("tanh"))
        self.fc1 = nn.Linear(dim, dim_ffn, bias=False)
        self.fc2 = nn.Linear(dim_ffn, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x) * self.gate(x))


class RelativePosition(nn.Module):
    """A bias per head and bucket of distances: exact below 8, then ever wider up to 128, apart for keys before and after."""

    def __init__(self, buckets: int, heads: int) -> None:
        super().__init__()
        self.buckets = buckets
        self.embedding = nn.Embedding(buckets, heads)

    def forward(self, length: int) -> Tensor:
        """[1, heads, length (query), length (key)]"""
        place = torch.arange(length, device=self.embedding.weight.device)
        return self.embedding(self._bucket(place[None] - place[:, None])).permute(2, 0, 1)[None]

    def _bucket(self, distance: Tensor) -> Tensor:
        side = self.buckets // 2
        exact = side // 2
        far = distance.abs()
        wide = torch.log(far.clamp(min=1).double() / exact) / math.log(FARTHEST / exact) * (side - exact)
        bucket = torch.where(far < exact, far, (exact + wide.long()).clamp(max=side - 1))
        return bucket + side * (distance > 0)
