"""The text encoder of `shapes`: a two-layer transformer over words, ending in each denoiser layer's keys and values.

The denoiser reads the prompt through cross-attention; projecting to keys and values here means it happens once per prompt, not per call.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .captions import MAX_TOKENS, vocabulary

PAD_ID, NULL_ID = 0, 1
MASKED = -1e4  # added to the scores of padding; finite so that bf16 stays free of NaN


class TextFeatures(NamedTuple):
    """What the denoiser reads of a batch of prompts."""

    key: Tensor  # [depth, batch, heads, tokens, head size]
    value: Tensor  # [depth, batch, heads, tokens, head size]
    mask: Tensor  # [batch, tokens]: 0 for words, MASKED for padding
    vector: Tensor  # [batch, width]: the mean word, which joins the noise level in the adaptive layer norm


class TextLayer(nn.Module):
    """Pre-norm transformer layer. [batch, tokens, width] -> the same."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm_attention(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.proj(
            F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None].to(q.dtype))
            .transpose(1, 2)
            .flatten(2)
        )
        return x + self.mlp(self.norm_mlp(x))


class WordEncoder(nn.Module):
    """Word ids [batch, 20] int64 -> one vector per word, [batch, 20, text width], each of which knows the others."""

    def __init__(self, text_width: int = 128, text_layers: int = 2) -> None:
        super().__init__()
        self.word = nn.Embedding(len(vocabulary()), text_width)
        self.place = nn.Parameter(torch.randn(MAX_TOKENS, text_width) * 0.02)
        self.layers = nn.ModuleList(TextLayer(text_width, 4) for _ in range(text_layers))
        self.norm = nn.LayerNorm(text_width)

    def words(self, ids: Tensor) -> Tensor:
        x, mask = self.word(ids) + self.place, padding_mask(ids)
        for layer in self.layers:
            x = layer(x, mask)
        return self.norm(x)

    def forward(self, ids: Tensor) -> Tensor | TextFeatures:
        return self.words(ids)


def padding_mask(ids: Tensor) -> Tensor:
    """What is added to the scores: 0 for words, MASKED for padding. [batch, tokens]"""
    return (1 - (ids != PAD_ID).float()) * MASKED


class TextEncoder(WordEncoder):
    """Word ids [batch, 20] int64 -> TextFeatures."""

    def __init__(
        self, depth: int, width: int, heads: int, text_width: int = 128, text_layers: int = 2
    ) -> None:
        super().__init__(text_width, text_layers)
        self.depth, self.heads = depth, heads
        self.key_value = nn.Linear(text_width, depth * 2 * width)
        self.vector = nn.Linear(text_width, width)

    def forward(self, ids: Tensor) -> TextFeatures:
        present, mask = (ids != PAD_ID).float(), padding_mask(ids)
        x = self.words(ids)
        key, value = (
            self.key_value(x).unflatten(-1, (self.depth, 2, self.heads, -1)).permute(3, 2, 0, 4, 1, 5)
        )
        mean = (x * present[..., None]).sum(1) / present.sum(1, keepdim=True)
        return TextFeatures(key, value, mask, self.vector(mean))


class PromptEncoder(nn.Module):
    """The text encoder as it ships: one prompt [20] in, features of both guidance branches out (0 = prompt, 1 = null)."""

    def __init__(self, encoder: TextEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.encoder(torch.stack([ids, null_ids().to(ids.device)])))


def null_ids() -> Tensor:
    """The empty prompt of classifier-free guidance. [20] int64."""
    return torch.tensor([NULL_ID] + [PAD_ID] * (MAX_TOKENS - 1))
