"""The anchor: tokens of the first frame's latent, which every later frame attends to. Its encoder is ours; the paper does not name one."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class AnchorEncoder(nn.Module):
    """A latent -> one token for every 4 x 4 places (2 x 2 where `halvings` is 1)."""

    def __init__(self, channels: int, width: int, hidden: int, halvings: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(channels, hidden, 3, padding=1)
        self.halves = nn.ModuleList(
            nn.Conv2d(hidden, hidden, 3, stride=2, padding=1) for _ in range(halvings)
        )
        self.norm = nn.LayerNorm(hidden)
        self.proj = nn.Linear(hidden, width)

    def tokens(self, size: tuple[int, int]) -> int:
        """How many tokens a latent of this height and width has."""
        high, wide = size
        for _ in self.halves:
            high, wide = -(-high // 2), -(-wide // 2)
        return high * wide

    def forward(self, latent: Tensor) -> Tensor:
        """[streams, channels, h, w] -> [streams, tokens, width]"""
        x = F.silu(self.conv_in(latent))
        for conv in self.halves:
            x = F.silu(conv(x))
        return self.proj(self.norm(x.flatten(2).transpose(1, 2)))


def without(keys: Tensor, present: Tensor) -> Tensor:
    """Keys and values, or zeros for streams that have no anchor: attention to those adds nothing. present [streams]"""
    shape = (-1, *[1] * (keys.ndim - 1))
    return torch.where(present.reshape(shape) > 0, keys, torch.zeros_like(keys))
