"""The parts of STDiT3 (Open-Sora v1.2). Parameter names are those of the checkpoint.

Tokens are [batch, frames, places, width] throughout: places are the patches of one latent frame, row by row.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NORM_EPSILON = 1e-6
WAVES = 256  # sizes of the sinusoid that a timestep or a frame rate becomes


class RMSNorm(nn.Module):
    """x over its root mean square, in float32, times a learned gain."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        unit = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + NORM_EPSILON)
        return self.weight * unit.to(x.dtype)


class Rotary(nn.Module):
    """Frequencies of the temporal rotary embedding, stored in the checkpoint as `rope.freqs`."""

    THETA = 10000.0

    def __init__(self, head_size: int) -> None:
        super().__init__()
        self.freqs = nn.Parameter(
            1.0 / self.THETA ** (torch.arange(0, head_size, 2)[: head_size // 2].float() / head_size),
            requires_grad=False,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Rotates neighbouring pairs of x [..., frames, head size] by position 0, 1, ... in the window."""
        angle = torch.arange(x.shape[-2], device=x.device, dtype=self.freqs.dtype)[:, None] * self.freqs
        cosine, sine = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        pairs = 2 * self.freqs.numel()
        even, odd = x[..., 0:pairs:2], x[..., 1:pairs:2]
        turned = torch.stack((even * cosine - odd * sine, odd * cosine + even * sine), -1).flatten(-2)
        return torch.cat((turned, x[..., pairs:]), -1)


class Attention(nn.Module):
    """Self-attention with normalised queries and keys. [sequences, length, width] -> the same."""

    def __init__(self, width: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm: nn.Module = RMSNorm(width // heads) if qk_norm else nn.Identity()
        self.k_norm: nn.Module = RMSNorm(width // heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, rotary: Rotary | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)  # [sequences, heads, length, head size]
        if rotary is not None:
            q, k = rotary(q), rotary(k)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Attention from every token to the words of its sample's prompt."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_linear, self.kv_linear = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def keys_values(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """text [batch, words, width] -> keys and values, each [batch, heads, words, head size]."""
        key, value = self.kv_linear(text).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return key, value

    def forward(self, x: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        """x [batch, frames, places, width]; bias [batch, 1, 1, words] is added to the scores."""
        batch, frames, places, width = x.shape
        query = self.q_linear(x).reshape(batch, frames * places, self.heads, -1).transpose(1, 2)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return self.proj(out.transpose(1, 2).reshape(batch, frames, places, width))


class Mlp(nn.Module):
    """Linear, GELU (tanh form), linear."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(inputs, hidden), nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Adaptive layer norm: normalise without gain, then scale and shift (Peebles & Xie 2023)."""
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPSILON) * (1 + scale) + shift


class Block(nn.Module):
    """A spatial or temporal block: self-attention, attention to the text (neither normed nor gated), feed-forward."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, qk_norm: bool) -> None:
        super().__init__()
        self.attn = Attention(width, heads, qk_norm)
        self.cross_attn = CrossAttention(width, heads)
        self.mlp = Mlp(width, int(width * mlp_ratio), width)
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)

    def modulation(self, shared: Tensor) -> tuple[Tensor, ...]:
        """shared [batch, frames or 1, 6 * width] -> shift, scale, gate of attention, then of the feed-forward.

        Each is [batch, frames or 1, 1, width].
        """
        table = self.scale_shift_table + shared.unflatten(-1, (6, -1))
        return tuple(table.unsqueeze(2).unbind(3))

    def after_attention(
        self, x: Tensor, mods: tuple[Tensor, ...], key: Tensor, value: Tensor, bias: Tensor | None
    ) -> Tensor:
        """The prompt and the feed-forward."""
        x = x + self.cross_attn(x, key, value, bias)
        return x + mods[5] * self.mlp(modulate(x, mods[3], mods[4]))

    def spatial_attention(self, x: Tensor, mods: tuple[Tensor, ...]) -> Tensor:
        """Among the places of each frame."""
        out = self.attn(modulate(x, mods[0], mods[1]).flatten(0, 1))
        return x + mods[2] * out.reshape(x.shape)

    def temporal_attention(self, x: Tensor, mods: tuple[Tensor, ...], rotary: Rotary) -> Tensor:
        """Among the frames at each place, all of them visible."""
        batch, frames, places, width = x.shape
        rows = modulate(x, mods[0], mods[1]).transpose(1, 2).reshape(batch * places, frames, width)
        out = self.attn(rows, rotary).reshape(batch, places, frames, width).transpose(1, 2)
        return x + mods[2] * out


class SinusoidEmbedder(nn.Module):
    """A number becomes waves, and those a vector; of timesteps and of frame rates. [...] -> [..., width]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(WAVES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, number: Tensor) -> Tensor:
        half = WAVES // 2
        rate = torch.exp(
            -math.log(10000.0) * torch.arange(half, device=number.device, dtype=torch.float32) / half
        )
        weight = self.mlp[0].get_parameter("weight")
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        angle = number.to(wide)[..., None] * rate.to(wide)
        return self.mlp(torch.cat((angle.cos(), angle.sin()), -1).to(weight.dtype))


class CaptionEmbedder(nn.Module):
    """Text states to the width of the network, and the learned states of the empty prompt."""

    def __init__(self, channels: int, width: int, tokens: int) -> None:
        super().__init__()
        self.y_embedding = nn.Parameter(torch.randn(tokens, channels) / channels**0.5)
        self.y_proj = Mlp(channels, width, width)

    def forward(self, states: Tensor) -> Tensor:
        return self.y_proj(states)


class PatchEmbedder(nn.Module):
    """Patches of the latent video, zero-padded behind to whole ones. [b, c, t, h, w] -> [b, frames, places, width]."""

    def __init__(self, patch: tuple[int, int, int], channels: int, width: int) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv3d(channels, width, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        missing = [-size % patch for size, patch in zip(x.shape[2:], self.patch, strict=True)]
        if any(missing):
            x = F.pad(x, (0, missing[2], 0, missing[1], 0, missing[0]))
        return self.proj(x).flatten(3).permute(0, 2, 3, 1)


class FinalLayer(nn.Module):
    """The last modulation and the values of every patch."""

    def __init__(self, width: int, values: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, values)
        self.scale_shift_table = nn.Parameter(torch.randn(2, width) / width**0.5)

    def modulated(self, x: Tensor, condition: Tensor) -> Tensor:
        """x [batch, frames, places, width]; condition [..., frames or 1, width], the sum of timestep and frame-rate vectors, whose
        leading axes multiply to the batch, or are it. [..., frames, places, width]
        """
        shift, scale = (self.scale_shift_table + condition[..., None, :]).unsqueeze(-3).unbind(-2)
        return modulate(x.reshape(*condition.shape[:-2], *x.shape[-3:]), shift, scale)


def place_embedding(
    rows: int,
    columns: int,
    width: int,
    scale: float,
    dtype: torch.dtype,
    device: torch.device | None = None,
) -> Tensor:
    """2-D sine and cosine table [rows * columns, width], columns before rows; `scale` is the conditioning size over base."""
    base = round((rows * columns) ** 0.5)
    rate = 1.0 / 10000 ** (torch.arange(0, width // 2, 2, device=device).float() / (width // 2))
    rate = rate.to(dtype)  # a buffer of the original, rounded with the model's weights
    parts = []
    axes = (
        (torch.arange(columns, device=device).repeat(rows), columns),
        (torch.arange(rows, device=device).repeat_interleave(columns), rows),
    )
    for index, count in axes:
        angle = (index.float() / scale * (base / count))[:, None] * rate
        parts += [angle.sin(), angle.cos()]
    return torch.cat(parts, -1).to(dtype)
