"""GroupNorm on channels-last data, in PyTorch's own form or, where a graph is exported, in one that its compilers run fast.

The temporal norm of a UNet has a group of a few numbers at each of thousands of places. As one reduction per group that is slower on
OpenVINO than the attention behind it, and needs its data transposed; as reductions over frames or places, whole vectors of channels at a
time, and two small matrix products that gather channels into groups, it costs almost nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

GROUPS = 32


def group_norm(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """`norm` over axis 1 and the channels of each group, apart for every other axis. x [B, reduced, ..., C] -> the same."""
    if torch.compiler.is_exporting():
        return _by_products(x, norm)
    rows = x.movedim(1, -1)  # [B, ..., C, reduced]
    normed = F.group_norm(rows.flatten(0, -3), norm.num_groups, norm.weight, norm.bias, norm.eps)
    return normed.reshape(rows.shape).movedim(-1, 1)


def _by_products(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """The same in reductions over axis 1 and products with 0-1 matrices, which any precision holds exactly."""
    size = norm.num_channels // norm.num_groups
    group = torch.arange(norm.num_channels, device=x.device) // size
    member = F.one_hot(group, norm.num_groups).to(x.dtype)  # [C, groups]
    mean = x.mean(1, keepdim=True) @ member / size
    centred = x - mean @ member.T
    variance = centred.square().mean(1, keepdim=True) @ member / size
    scale = torch.rsqrt(variance + norm.eps) @ member.T
    return centred * (scale * norm.weight) + norm.bias
