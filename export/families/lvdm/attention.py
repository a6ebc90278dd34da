"""Attention of the unconditional UNets: over space within a frame, then over time at each place, with relative positions.

Released quirk that the weights depend on: the relative-key term is transposed. Where Shaw et al. (2018, arXiv:1803.02155) add
q_i . R[j - i], the released einsum adds q_j . R[i - j], scaled by d^(-1/4) alone; the softmax still runs over j. Text to video has
the textbook form. Both are the op RelativeAttention, attribute `transposed`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...ops.relative_attention import relative_attention
from .group_norm import GROUPS, group_norm


class RelativePosition(nn.Module):
    """One vector per clipped distance: `embeddings_table` [2 * reach + 1, head size]."""

    def __init__(self, head_size: int, reach: int) -> None:
        super().__init__()
        self.embeddings_table = nn.Parameter(torch.empty(2 * reach + 1, head_size))
        nn.init.xavier_uniform_(self.embeddings_table)


class STAttentionBlock(nn.Module):
    """Spatial, then temporal attention, each with a residual. [B, C, T, H, W] -> the same.

    `reach` is the released `temporal_length`: distances are clipped to it, so T may be larger. None: no relative positions.
    """

    def __init__(self, channels: int, heads: int, reach: int | None) -> None:
        super().__init__()
        self.heads = heads
        # GroupNorm over one frame for space, over all frames of one place for time.
        self.norm_s = nn.GroupNorm(GROUPS, channels)
        self.norm_t = nn.GroupNorm(GROUPS, channels)
        self.qkv_s = nn.Conv1d(channels, 3 * channels, 1)
        self.qkv_t = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out_s = nn.Conv1d(channels, channels, 1)
        self.proj_out_t = nn.Conv1d(channels, channels, 1)
        if reach is not None:
            self.relative_position_k = RelativePosition(channels // heads, reach)
            self.relative_position_v = RelativePosition(channels // heads, reach)
        self.relative = reach is not None
        for layer in (self.proj_out_s, self.proj_out_t):  # a block begins as the identity
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return self.over_time(self.over_space(x))

    def over_space(self, x: Tensor) -> Tensor:
        _, channels, frames, height, width = x.shape
        rows = x.permute(0, 2, 3, 4, 1).reshape(-1, height * width, channels)  # [B T, H W, C]
        h = linear(group_norm(rows, self.norm_s), self.qkv_s)  # [B T, H W, 3 C]
        # q, k and v are split first, then the heads: [B T, heads, H W, d].
        q, k, v = (
            part.unflatten(-1, (self.heads, channels // self.heads)).transpose(1, 2)
            for part in h.chunk(3, -1)
        )
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        h = linear(h.reshape(-1, height * width, channels), self.proj_out_s)
        h = h.reshape(-1, frames, height, width, channels)
        return x + h.permute(0, 4, 1, 2, 3)

    def over_time(self, x: Tensor) -> Tensor:
        _, channels, frames, height, width = x.shape
        places = height * width
        rows = x.permute(0, 2, 3, 4, 1).reshape(-1, frames, places, channels)  # [B, T, H W, C]
        h = linear(group_norm(rows, self.norm_t), self.qkv_t)  # [B, T, H W, 3 C]
        h = h.reshape(-1, frames, places, 3, self.heads, channels // self.heads)
        tables = (
            (self.relative_position_k.embeddings_table, self.relative_position_v.embeddings_table)
            if self.relative
            else ()
        )
        h = linear(relative_attention(h, *tables, transposed=True), self.proj_out_t)
        h = h.reshape(-1, frames, height, width, channels)
        return x + h.permute(0, 4, 1, 2, 3)


def linear(x: Tensor, conv: nn.Conv1d) -> Tensor:
    """A kernel-1 convolution of the checkpoint on channels-last data, where it is a plain matrix product.

    Squeezed rather than indexed: NNCF takes a Gather on weights for an embedding, and fails.
    """
    return F.linear(x, conv.weight.squeeze(2), conv.bias)
