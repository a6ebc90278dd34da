"""The small ART-V that ships as `shapes-artv`: its sizes, and a text tower for the captions of `shapes`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..shapes.autoencoder import LATENT_CHANNELS
from ..shapes.captions import MAX_TOKENS, vocabulary
from ..shapes.text_encoder import MASKED, PAD_ID, TextLayer
from .config import REFERENCES, AdapterConfig, ArtvConfig, UNetConfig
from .denoiser import Denoiser

TEXT_WIDTH, TEXT_LAYERS = 64, 2
WIDTHS = (48, 72)
CONFIG = ArtvConfig(
    unet=UNetConfig(
        channels=LATENT_CHANNELS,
        widths=WIDTHS,
        layers=1,
        heads=(3, 3),
        text_width=TEXT_WIDTH,
        anchor_width=64,
        groups=8,
    ),
    adapter=AdapterConfig(
        channels=LATENT_CHANNELS, unshuffle=1, widths=WIDTHS, blocks=1, references=REFERENCES
    ),
    predicts="velocity",
)


class TextTower(nn.Module):
    """Word ids [rows, 20] int64 -> a token per word [rows, 20, 64]."""

    def __init__(self) -> None:
        super().__init__()
        self.word = nn.Embedding(len(vocabulary()), TEXT_WIDTH)
        self.place = nn.Parameter(torch.randn(MAX_TOKENS, TEXT_WIDTH) * 0.02)
        self.layers = nn.ModuleList(TextLayer(TEXT_WIDTH, 4) for _ in range(TEXT_LAYERS))
        self.norm = nn.LayerNorm(TEXT_WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        mask = (ids == PAD_ID).float() * MASKED
        x = self.word(ids) + self.place
        for layer in self.layers:
            x = layer(x, mask)
        return self.norm(x)


def small_denoiser() -> Denoiser:
    """The untrained network of `shapes-artv`."""
    return Denoiser(CONFIG, anchor_hidden=48, anchor_halvings=1)
