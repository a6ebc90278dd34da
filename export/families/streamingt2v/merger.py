"""How the features of the condition frames enter the denoiser (StreamingT2V, arXiv:2403.14773, section 4.1): at each place of a frame the
frames of the window attend to the condition frames, 16 queries and 8 keys.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from .layers import ENTRY_EPSILON, GROUPS, Attention, back, over_frames

HEAD_SIZE = 64


class CrossFrames(nn.Module):
    """The layers of a merger, by the names of the checkpoint."""

    def __init__(self, channels: int, head_size: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, ENTRY_EPSILON)
        self.proj_in = nn.Linear(channels, channels)
        self.attention = Attention(channels, head_size)
        self.proj_out = nn.Linear(channels, channels)


class Merger(nn.Module):
    """x [rows * frames, C, h, w], y [rows * condition frames, C, h, w] -> x plus what its frames take from those of y.

    No mask and no positions; y is read as it is, without a norm.
    """

    def __init__(self, channels: int, head_size: int = HEAD_SIZE, groups: int = GROUPS) -> None:
        super().__init__()
        self.temporal_transformer = CrossFrames(channels, head_size, groups)

    def forward(self, x: Tensor, y: Tensor, frames: int) -> Tensor:
        parts = self.temporal_transformer
        attention = parts.attention
        h = parts.proj_in(over_frames(parts.norm, x, frames))  # [rows, frames, places, C]
        keys, values = (layer(by_row(y, h)) for layer in (attention.to_k, attention.to_v))
        out = attend(attention.to_q(h), keys, values, attention.head_size)
        return x + back(parts.proj_out(attention.to_out[0](out)), x)


def by_row(y: Tensor, like: Tensor) -> Tensor:
    """[rows * condition frames, C, h, w] -> [rows, condition frames, places, C]"""
    return y.flatten(2).transpose(1, 2).reshape(like.shape[0], -1, *like.shape[2:])


def attend(q: Tensor, k: Tensor, v: Tensor, head_size: int) -> Tensor:
    """Attention across frames, apart for every place. q [rows, frames, places, C], k and v [rows, others, places, C] -> as q."""
    places = q.shape[2]
    q, k, v = (part.unflatten(-1, (-1, head_size)).permute(0, 2, 3, 1, 4).flatten(0, 1) for part in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v).unflatten(
        0, (-1, places)
    )  # [rows, places, heads, frames, head size]
    return out.permute(0, 3, 1, 2, 4).flatten(3)
