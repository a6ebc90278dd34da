"""Rotary embedding over time, height and width, each with its own share of a head's channels.

Of the d / 2 pairs of a head, a third (rounded down) belongs to the height, as many to the width, and the others, which come first, to
time: 22, 21 and 21 pairs of a head of 128. Pairs are neighbours (2k, 2k + 1). On an axis with n channels pair k turns by
position * 10000^(-2k / n), so every axis begins at rate 1 again.

Height and width never change while a frame is visible, so they are rotated before our op, and a ring keeps keys rotated in space.
Time is rotated by the op when it reads, from frame numbers.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

THETA = 10000.0


def time_channels(head_size: int) -> int:
    """Channels of a head that time rotates: the first ones."""
    pairs = head_size // 2
    return 2 * (pairs - 2 * (pairs // 3))


def rates(channels: int) -> Tensor:
    """How far each pair turns from one position to the next. float64 [channels / 2]"""
    exponent = torch.arange(0, channels, 2, dtype=torch.float64) / -channels
    return torch.pow(torch.tensor(THETA, dtype=torch.float64), exponent)


@lru_cache(maxsize=16)
def _space_angles(rows: int, columns: int, head_size: int) -> Tensor:
    """Angles of every token of a frame in row order. float64 [rows * columns, (head_size - time channels) / 2]"""
    each = (head_size - time_channels(head_size)) // 2
    rate = rates(each)
    row = torch.arange(rows).double()[:, None, None] * rate
    column = torch.arange(columns).double()[None, :, None] * rate
    both = torch.cat((row.expand(-1, columns, -1), column.expand(rows, -1, -1)), -1)
    return both.flatten(0, 1)


def space_tables(rows: int, columns: int, head_size: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine of height and width. float64 [rows * columns, 1, pairs] each, to be cast where they are used."""
    angles = _space_angles(rows, columns, head_size)[:, None]
    return angles.cos(), angles.sin()


def rotate_space(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """x [..., tokens, heads, head size] with the channels behind those of time rotated; the others as they are."""
    pairs = cosine.shape[-1]
    start = x.shape[-1] - 2 * pairs
    first, second = x[..., start:].unflatten(-1, (pairs, 2)).unbind(-1)
    turned = torch.stack((first * cosine - second * sine, second * cosine + first * sine), -1)
    return torch.cat((x[..., :start], turned.flatten(-2)), -1)
