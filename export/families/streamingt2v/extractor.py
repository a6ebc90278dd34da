"""The conditional attention module's extractor (`unet.` in the checkpoint): features of the last frames of the chunk before.

A copy of the denoiser's encoder, run on the first 8 frames of the same noisy latents at the same level, with the 8 condition frames added
behind the stem. Its features depend on the latents, so it runs at every step; the encoding of the condition frames alone does not.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from .modelscope import RELEASED, ModelScopeTrunk, Widths
from .trunk import Walk, per_frame, rows_of


class ConditionEncoder(nn.Module):
    """RGB frames [n, 3, 8 h, 8 w] in [-1, 1] -> [n, C, h, w]. No norms: the released weights have none, other than the paper says.

    Each width but the first halves the frames' sides, so a single one is for frames that are latents already.
    """

    def __init__(self, widths: Sequence[int], out: int, channels: int = 3) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for inputs, outputs in itertools.pairwise(widths):
            self.blocks.append(nn.Conv2d(inputs, inputs, 3, padding=1))
            self.blocks.append(nn.Conv2d(inputs, outputs, 3, 2, padding=1))
        self.conv_out = nn.Conv2d(widths[-1], out, 3, padding=1)

    def forward(self, frames: Tensor) -> Tensor:
        x = F.silu(self.conv_in(frames))
        for conv in self.blocks:
            x = F.silu(conv(x))
        return self.conv_out(x)


class Extractor(ModelScopeTrunk):
    """unet(x [rows, 4, 8, h, w], t [rows], text [rows, 77, 1024], condition [8, 3, 8 h, 8 w]) -> 12 skip tensors and the middle,
    [rows * 8, C, h', w'] each. All rows have the same condition frames. Of a longer context the text alone is read.
    """

    def __init__(
        self,
        widths: Widths = RELEASED,
        condition_widths: Sequence[int] = (32, 96, 256, 512),
        condition_channels: int = 3,
    ) -> None:
        super().__init__(widths)
        self.controlnet_cond_embedding = ConditionEncoder(
            condition_widths, widths.channels[0], condition_channels
        )

    def forward(self, x: Tensor, t: Tensor, text: Tensor, condition: Tensor) -> list[Tensor]:
        frames = x.shape[2]
        walk = Walk(
            per_frame(self.embed(t), frames), self.text_keys(text[:, : self.widths.text_tokens]), frames
        )
        encoded = self.controlnet_cond_embedding(condition)
        return self.features(rows_of(x), walk, encoded.repeat(x.shape[0], 1, 1, 1))

    def features(self, x: Tensor, walk: Walk, encoded: Tensor) -> list[Tensor]:
        """As `forward`, with all that the walk has been given. `encoded` [rows * 8, C, h, w]: of the condition frames."""
        stem, *steps = self.encoder()
        x = walk.run(stem, x) + encoded
        found = [x]
        for step in steps:
            x = walk.run(step, x)
            found.append(x)
        return [*found, walk.run(self.middle(), x)]
