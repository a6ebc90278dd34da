"""Appearance preservation (StreamingT2V, arXiv:2403.14773, section 4.2): one frame of the first chunk, the anchor, joins the text.

Its CLIP embedding becomes 16 tokens, and each cross-attention of the denoiser mixes those into the 77 of the text with weights of its
own. Nothing of this depends on the latents: it is computed once per prompt and anchor.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from .layers import Attention, TextKeys

TEXT_TOKENS, IMAGE_TOKENS = 77, 16


class AppearanceAttention(Attention):
    """Cross-attention whose context [rows, 93, channels] is the text and then the anchor.

    The convolution takes tokens for channels: 93 in, 77 out, and its kernel slides along the channels of a token.
    """

    def __init__(
        self,
        channels: int,
        head_size: int,
        context_channels: int,
        text_tokens: int = TEXT_TOKENS,
        image_tokens: int = IMAGE_TOKENS,
    ) -> None:
        super().__init__(channels, head_size, context_channels)
        self.text_tokens = text_tokens
        self.conv = nn.Conv1d(text_tokens + image_tokens, text_tokens, 3, padding=1)
        self.conv_ln = nn.LayerNorm(context_channels)
        # Zero: a new layer sees the text alone.
        self.alpha = nn.Parameter(self.conv.weight.new_zeros(()))

    def mix(self, context: Tensor) -> Tensor:
        """What the keys and values are made of, [rows, 77, channels]. Without the anchor's tokens: the context as it is."""
        if context.shape[1] == self.text_tokens:
            return context
        return context[:, : self.text_tokens] + F.silu(self.alpha) * self.conv_ln(self.conv(context))

    def keys(self, context: Tensor) -> TextKeys:
        return super().keys(self.mix(context))


class ImageTokens(nn.Module):
    """A CLIP embedding [n, 1024] -> 16 tokens [n, 16, channels]: the checkpoint's `resampler`."""

    def __init__(
        self, embedding: int = 1024, hidden: int = 1280, channels: int = 1024, tokens: int = IMAGE_TOKENS
    ) -> None:
        super().__init__()
        self.tokens = tokens
        self.context_embedding = nn.Sequential(
            nn.Linear(embedding, hidden), nn.SiLU(), nn.Linear(hidden, tokens * channels)
        )

    def forward(self, embedding: Tensor) -> Tensor:
        return self.context_embedding(embedding).unflatten(-1, (self.tokens, -1))
