"""The denoiser of `shapes`: a diffusion transformer whose frames each carry their own noise level.

Attention is factorised: `spatial` within a latent frame, `temporal` across frames through FrameWindowAttention (noise-causal, with the
ring of clean frames), and cross-attention to the prompt. Levels enter by adaptive layer norm, one modulation per frame. The network
predicts the rectified-flow velocity v = x0 - eps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...ops.frame_window_attention import frame_window_attention
from .text_encoder import TextFeatures


@dataclass(frozen=True)
class DenoiserConfig:
    """Sizes of the network. The defaults are the bundled model."""

    latent_channels: int = 8
    latent_size: int = 8
    patch: int = 2
    width: int = 256
    depth: int = 6
    heads: int = 4
    mlp_ratio: int = 3
    rope_theta: float = 100.0

    @property
    def head_size(self) -> int:
        return self.width // self.heads

    @property
    def tokens_per_frame(self) -> int:
        return (self.latent_size // self.patch) ** 2


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Adaptive layer norm (Peebles & Xie 2023): normalise without gain, then scale and shift per frame."""
    return F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift


def rotate(x: Tensor, index: Tensor, theta: float) -> Tensor:
    """Interleaved rotary embedding. x [..., frames, head size], index [frames]."""
    half = x.shape[-1] // 2
    rate = theta ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = index.float()[:, None] * rate
    even, odd = x.float().unflatten(-1, (half, 2)).unbind(-1)
    turned = torch.stack([even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos()], -1)
    return turned.flatten(-2).to(x.dtype)


class TemporalAttention(nn.Module):
    """A token attends to the same place in the other frames."""

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__()
        self.config = config
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)
        self.q_gain = nn.Parameter(torch.ones(config.head_size))
        self.k_gain = nn.Parameter(torch.ones(config.head_size))

    def packed(self, x: Tensor) -> Tensor:
        """[batch, frames, tokens, width] -> [batch, frames, tokens, 3, heads, head size]."""
        return self.qkv(x).unflatten(-1, (3, self.config.heads, self.config.head_size))

    def over_clip(self, x: Tensor, allowed: Tensor) -> Tensor:
        """Training: the whole clip at once; allowed [batch, frames, frames] says which frame sees which."""
        q, k, v = self.packed(x).permute(3, 0, 2, 4, 1, 5)  # each [batch, tokens, heads, frames, head size]
        index = torch.arange(x.shape[1], device=x.device)
        q = rotate(F.rms_norm(q, q.shape[-1:], self.q_gain.to(q.dtype), 1e-6), index, self.config.rope_theta)
        k = rotate(F.rms_norm(k, k.shape[-1:], self.k_gain.to(k.dtype), 1e-6), index, self.config.rope_theta)
        mask = allowed[:, None, None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(out.permute(0, 3, 1, 2, 4).flatten(3))

    def over_window(
        self,
        x: Tensor,
        level: Tensor,
        frame_index: Tensor,
        ring_key: Tensor,
        ring_value: Tensor,
        ring_index: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Streaming: the active frames of the window and the ring, through the op. Also the frames' own keys and values."""
        out, key, value = frame_window_attention(
            self.packed(x),
            level,
            frame_index,
            ring_key,
            ring_value,
            ring_index,
            q_gain=self.q_gain,
            k_gain=self.k_gain,
            scope="temporal",
            mask="noise_causal",
            theta=self.config.rope_theta,
            rotary_dim=self.config.head_size,
            interleaved=True,
            epsilon=1e-6,
        )
        return self.proj(out), key, value


class Block(nn.Module):
    """Spatial attention, cross-attention, temporal attention, feed-forward; `table` is the block's own part of the modulation."""

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.table = nn.Parameter(torch.zeros(9, width))
        self.spatial_qkv, self.spatial_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.cross_norm = nn.LayerNorm(width)
        self.cross_q, self.cross_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.temporal = TemporalAttention(config)
        self.mlp_in, self.mlp_out = (
            nn.Linear(width, config.mlp_ratio * width),
            nn.Linear(config.mlp_ratio * width, width),
        )
        nn.init.zeros_(self.cross_proj.weight)

    def modulation(self, shared: Tensor) -> tuple[Tensor, ...]:
        """shared [batch, frames, 9 * width] -> nine of [batch, frames, 1, width]."""
        return (shared.unflatten(-1, (9, -1)) + self.table).unsqueeze(2).unbind(3)

    def before_temporal(
        self, x: Tensor, mods: tuple[Tensor, ...], key: Tensor, value: Tensor, mask: Tensor
    ) -> Tensor:
        """x [batch, frames, tokens, width]; key, value [batch, heads, words, head size]; mask [batch, words]."""
        batch, frames, tokens, width = x.shape
        q, k, v = (
            self.spatial_qkv(modulate(x, mods[0], mods[1]))
            .flatten(0, 1)
            .unflatten(-1, (3, self.heads, -1))
            .permute(2, 0, 3, 1, 4)
        )
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, frames, tokens, width)
        x = x + mods[2] * self.spatial_proj(out)
        q = self.cross_q(self.cross_norm(x)).flatten(1, 2).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        out = F.scaled_dot_product_attention(
            q, key.to(q.dtype), value.to(q.dtype), attn_mask=mask[:, None, None].to(q.dtype)
        )
        return x + self.cross_proj(out.transpose(1, 2).reshape(batch, frames, tokens, width))

    def after_temporal(self, x: Tensor, mods: tuple[Tensor, ...]) -> Tensor:
        """The feed-forward, with squared ReLU (So et al. 2021): as good as GELU here and a tenth of its cost on a CPU."""
        return x + mods[8] * self.mlp_out(F.relu(self.mlp_in(modulate(x, mods[6], mods[7]))).square())


class Denoiser(nn.Module):
    """Velocity of every active frame, for every guidance branch."""

    def __init__(self, config: DenoiserConfig = DenoiserConfig()) -> None:
        super().__init__()
        self.config = config
        width, patch_values = config.width, config.latent_channels * config.patch**2
        self.patch_in = nn.Linear(patch_values, width)
        self.place = nn.Parameter(torch.randn(config.tokens_per_frame, width) * 0.02)
        self.level_mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.modulation = nn.Linear(width, 9 * width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_table = nn.Parameter(torch.zeros(2, width))
        self.patch_out = nn.Linear(width, patch_values)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)
        nn.init.zeros_(self.patch_out.weight)

    def layers(self) -> list[Block]:
        """The blocks, first to last."""
        return [block for block in self.blocks if isinstance(block, Block)]

    def condition(self, level: Tensor, vector: Tensor) -> Tensor:
        """level [..., frames] in [0, 1] and text vector [..., width] -> [..., frames, width]."""
        half = self.config.width // 2
        rate = torch.exp(
            torch.arange(half, device=level.device, dtype=torch.float32) * (-math.log(10000.0) / half)
        )
        angle = level.float()[..., None] * 1000.0 * rate
        wave = torch.cat([angle.cos(), angle.sin()], -1).to(self.place.dtype)
        return F.silu(self.level_mlp(wave) + vector[..., None, :])

    def patchify(self, latents: Tensor) -> Tensor:
        """[batch, frames, channels, height, width] -> [batch, frames, tokens, channels * patch^2]."""
        p = self.config.patch
        side = self.config.latent_size // p
        # [batch, frames, channels, side, p, side, p]
        split = latents.unflatten(-1, (side, p)).unflatten(-3, (side, p))
        return split.permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(2, 3)

    def unpatchify(self, values: Tensor) -> Tensor:
        """The inverse of patchify. [..., tokens, channels * patch^2] -> [..., channels, height, width]."""
        p, c = self.config.patch, self.config.latent_channels
        side = self.config.latent_size // p
        # [..., side, side, channels, p, p]
        split = values.unflatten(-1, (c, p, p)).unflatten(-4, (side, side))
        lead = split.dim() - 5
        order = (*range(lead), lead + 2, lead, lead + 3, lead + 1, lead + 4)
        return split.permute(order).flatten(-2).flatten(-3, -2)

    def head(self, x: Tensor, condition: Tensor) -> Tensor:
        """x [batch, frames, tokens, width]; condition [..., frames, width], whose leading axes multiply to the batch, or are it.

        Returns [..., frames, channels, height, width].
        """
        shift, scale = (condition[..., None, None, :] + self.final_table).unbind(-2)
        x = x.reshape(*condition.shape[:-1], *x.shape[-2:])
        return self.unpatchify(self.patch_out(modulate(x, shift, scale)))

    def over_clip(self, latents: Tensor, level: Tensor, text: TextFeatures, allowed: Tensor) -> Tensor:
        """Training: clips [batch, frames, 8, 8, 8], level [batch, frames], allowed [batch, frames, frames] -> velocity."""
        condition = self.condition(level, text.vector)
        shared = self.modulation(condition)
        x = self.patch_in(self.patchify(latents)) + self.place
        for index, block in enumerate(self.layers()):
            mods = block.modulation(shared)
            x = block.before_temporal(x, mods, text.key[index], text.value[index], text.mask)
            x = x + mods[5] * block.temporal.over_clip(modulate(x, mods[3], mods[4]), allowed)
            x = block.after_temporal(x, mods)
        return self.head(x, condition)

    def forward(
        self,
        latents: Tensor,
        level: Tensor,
        frame_index: Tensor,
        ring_index: Tensor,
        text_key: Tensor,
        text_value: Tensor,
        text_mask: Tensor,
        text_vector: Tensor,
        ring_key: Sequence[Tensor],
        ring_value: Sequence[Tensor],
    ) -> tuple[Tensor, ...]:
        """Streaming: one window of every stream, for every guidance branch.

        latents [streams, frames, 8, 8, 8]; level [streams, frames]; frame_index [streams, frames] and ring_index [streams, ring]
        int64; text_key, text_value [depth, branches, streams, heads, words, head size]; text_mask [branches, streams, words];
        text_vector [branches, streams, width]; ring_key and ring_value: one per block, [branches * streams, ring, tokens, heads,
        head size], branch by branch. Returns the predicted velocity [branches, streams, frames, 8, 8, 8], then the active frames'
        key 0, value 0, key 1, ... as the ring wants them.
        """
        branches = text_vector.shape[0]
        condition = self.condition(level, text_vector)  # [branches, streams, frames, width]
        shared = self.modulation(condition).flatten(0, 1)
        x = self.patch_in(self.patchify(latents)) + self.place
        x = x.expand(branches, -1, -1, -1, -1).flatten(0, 1)
        mask = text_mask.flatten(0, 1)
        appended: list[Tensor] = []
        for index, block in enumerate(self.layers()):
            mods = block.modulation(shared)
            text = (text_key[index].flatten(0, 1), text_value[index].flatten(0, 1), mask)
            x = block.before_temporal(x, mods, *text)
            out, key, value = block.temporal.over_window(
                modulate(x, mods[3], mods[4]),
                level,
                frame_index,
                ring_key[index],
                ring_value[index],
                ring_index,
            )
            x = block.after_temporal(x + mods[5] * out, mods)
            appended += [key, value]
        return (self.head(x, condition), *appended)
