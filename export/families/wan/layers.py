"""Layers of the transformer, by the names of its checkpoints. Tokens are [batch, frames, tokens of a frame, width] throughout."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...ops.frame_window_attention import accumulator

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v [B, F, N, heads, head size] -> [B, F, N, width]


class RMSNorm(nn.Module):
    """Over the whole width, before it is split into heads: in float32, cast back, and only then times the gain."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(accumulator(x.dtype))
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.epsilon)
        return wide.to(x.dtype) * self.weight


class Attention(nn.Module):
    """The projections and norms that self- and cross-attention have in common."""

    def __init__(self, width: int, heads: int, epsilon: float) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(width, epsilon), RMSNorm(width, epsilon)

    def split(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., heads, head size]"""
        return x.unflatten(-1, (self.heads, -1))

    def queries(self, x: Tensor) -> Tensor:
        return self.split(self.norm_q(self.q(x)))

    def keys(self, x: Tensor) -> Tensor:
        return self.split(self.norm_k(self.k(x)))

    def values(self, x: Tensor) -> Tensor:
        return self.split(self.v(x))


class CrossAttention(Attention):
    """Every token sees every text token, padding included: the model was trained so."""

    def text(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a text [B, L, width], which depend on nothing else: [B, heads, L, head size] each."""
        return self.keys(text).transpose(1, 2), self.values(text).transpose(1, 2)

    def forward(self, x: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """x [B, F, N, width]; key, value [B, heads, L, head size]"""
        query = self.queries(x).flatten(1, 2).transpose(1, 2)  # [B, heads, F * N, head size]
        out = F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
        return self.o(out.reshape(x.shape))


class Block(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward. The first and the last are modulated by the frame's timestep."""

    def __init__(self, width: int, ffn: int, heads: int, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.modulation = nn.Parameter(torch.randn(1, 6, width) / width**0.5)
        self.self_attn = Attention(width, heads, epsilon)
        self.norm3 = nn.LayerNorm(width, epsilon)
        self.cross_attn = CrossAttention(width, heads, epsilon)
        self.ffn = nn.Sequential(nn.Linear(width, ffn), nn.GELU("tanh"), nn.Linear(ffn, width))

    def forward(self, x: Tensor, modulation: Tensor, text: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        """x [B, F, N, width]; modulation [B, F, 6, width], the block's own table added; text: keys and values."""
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = modulation[:, :, :, None].unbind(2)
        attention = self.self_attn
        y = modulated(x, shift, scale, self.epsilon)
        out = attend(attention.queries(y), attention.keys(y), attention.values(y))
        x = x + attention.o(out) * gate
        x = x + self.cross_attn(self.norm3(x), *text)
        return x + self.ffn(modulated(x, ffn_shift, ffn_scale, self.epsilon)) * ffn_gate


class Head(nn.Module):
    """The last norm, modulated by the plain time embedding, and the projection to the values of a patch."""

    def __init__(self, width: int, values: int, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.head = nn.Linear(width, values)
        self.modulation = nn.Parameter(torch.randn(1, 2, width) / width**0.5)

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """x [B, F, N, width]; modulation [B, F, 2, width], the head's own table added."""
        shift, scale = modulation[:, :, :, None].unbind(2)
        return self.head(modulated(x, shift, scale, self.epsilon))


def modulated(x: Tensor, shift: Tensor, scale: Tensor, epsilon: float) -> Tensor:
    """LayerNorm without parameters of its own, then scaled and shifted per frame."""
    return F.layer_norm(x, x.shape[-1:], eps=epsilon) * (1 + scale) + shift
