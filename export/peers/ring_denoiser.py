"""The denoiser as a PyTorch user would stream it: keys and values of clean frames written in place."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..families.shapes.denoiser import Block, Denoiser, TemporalAttention, modulate
from ..families.shapes.text_encoder import TextFeatures

MASKED = -3e4  # finite: a row of an absent frame sees nothing, and must not become NaN; and a float16


class RingDenoiser(nn.Module):
    """Weights of a Denoiser, and per block tensors [ring | active] of keys and values as attention reads.

    Keys are stored rotated by their absolute frame, as language models cache them, so a call rotates its
    active frames only. With `ring` 0 the window itself holds whatever context there is.
    """

    def __init__(
        self, denoiser: Denoiser, *, ring: int, rows: int, branches: int, dtype: torch.dtype
    ) -> None:
        super().__init__()
        config = denoiser.config
        self.denoiser, self.ring, self.fused = denoiser.to(dtype), ring, True
        # Typed, and not registered twice.
        self._blocks = tuple(cast(Block, block) for block in denoiser.blocks)
        shape = (branches * config.tokens_per_frame, config.heads, ring + rows, config.head_size)
        for index in range(config.depth):
            self.register_buffer(f"key{index}", torch.zeros(shape, dtype=dtype))
            self.register_buffer(f"value{index}", torch.zeros(shape, dtype=dtype))

    def forward(
        self, latents: Tensor, level: Tensor, cosine: Tensor, sine: Tensor, mask: Tensor, text: TextFeatures
    ) -> Tensor:
        """latents [frames, channels, height, width]; level [frames] float32; cosine, sine [frames,
        head size / 2]; mask [frames, ring + frames] is added to scores. Returns [branches, frames, ...].
        """
        model = self.denoiser
        branches = text.vector.shape[0]
        condition = model.condition(level.expand(branches, -1), text.vector)
        shared = model.modulation(condition)
        x = model.patch_in(model.patchify(latents[None])) + model.place
        x = x.expand(branches, -1, -1, -1)
        for index, block in enumerate(self._blocks):
            mods = block.modulation(shared)
            x = block.before_temporal(x, mods, text.key[index], text.value[index], text.mask)
            x = x + mods[5] * self._temporal(
                index, block.temporal, modulate(x, mods[3], mods[4]), cosine, sine, mask
            )
            x = block.after_temporal(x, mods)
        return model.head(x, condition)

    def append(self, first_row: int, slots: list[int]) -> None:
        """Keeps keys and values of the rows from `first_row` on, which became clean, in these ring slots."""
        rows = slice(self.ring + first_row, self.ring + first_row + len(slots))
        for tensor in self.buffers():
            tensor[:, :, slots] = tensor[:, :, rows]

    def _temporal(
        self, index: int, layer: TemporalAttention, x: Tensor, cosine: Tensor, sine: Tensor, mask: Tensor
    ) -> Tensor:
        branches, frames, tokens, width = x.shape
        q, k, v = layer.packed(x).unbind(3)
        q, k = (
            F.rms_norm(q, q.shape[-1:], layer.q_gain, 1e-6),
            F.rms_norm(k, k.shape[-1:], layer.k_gain, 1e-6),
        )
        # Each [branches, tokens, heads, frames, head size]
        q, k, v = (part.permute(0, 2, 3, 1, 4) for part in (q, k, v))
        q, k = _rotate(q, cosine, sine), _rotate(k, cosine, sine)
        if self.ring:
            end = self.ring + frames
            keys, values = (
                self.get_buffer(f"key{index}")[:, :, :end],
                self.get_buffer(f"value{index}")[:, :, :end],
            )
            keys.unflatten(0, (branches, tokens))[:, :, :, self.ring :] = k
            values.unflatten(0, (branches, tokens))[:, :, :, self.ring :] = v
        else:
            keys, values = k.flatten(0, 1), v.flatten(0, 1)
        q = q.flatten(0, 1)
        if self.fused:
            out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        else:
            scores = torch.matmul(q, keys.transpose(-1, -2)) * q.shape[-1] ** -0.5 + mask
            out = torch.matmul(scores.softmax(-1), values)
        out = (
            out.unflatten(0, (branches, tokens))
            .permute(0, 3, 1, 2, 4)
            .reshape(branches, frames, tokens, width)
        )
        return layer.proj(out)


def angles(index: Tensor, head_size: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary embedding. index [frames] -> each [frames, head size / 2]."""
    rate = theta ** (-torch.arange(head_size // 2, dtype=torch.float64) / (head_size // 2))
    angle = index.double()[:, None] * rate
    return angle.cos().to(dtype), angle.sin().to(dtype)


def visible(level: Tensor, frame: Tensor, chunk: Tensor, ring_index: Tensor) -> Tensor:
    """Which frame (row) sees which slot or frame (column): [frames, ring + frames] bool.

    Noise-causal. Clean frames of the window, when the context is recomputed, see each other as they did when
    they became clean: their own chunk and earlier ones.
    """
    row, column = level[:, None], level[None]
    seen = (column < row) | ((column == row) & ((row > 0) | (chunk[None] <= chunk[:, None])))
    present = frame >= 0
    ring = (ring_index >= 0).expand(len(level), -1)
    return torch.cat([ring, seen & present[None]], 1) & present[:, None]


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Interleaved rotary embedding of x [..., frames, head size]."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cosine - odd * sine, even * sine + odd * cosine], -1).flatten(-2)
