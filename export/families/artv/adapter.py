"""The T2I-Adapter (Mou et al. 2023, arXiv:2302.08453) by the parameter names of diffusers' full one: a feature map per level of the UNet.

It knows no noise level, so that its features hold for all steps of a frame.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from .config import AdapterConfig


class Residual(nn.Module):
    """A 3x3 and a 1x1 convolution beside the input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.block1, self.block2 = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block2(F.relu(self.block1(x)))


class Stage(nn.Module):
    """One level: half the size unless it is the first, its width, and residual blocks."""

    def __init__(self, inputs: int, outputs: int, blocks: int, halves: bool) -> None:
        super().__init__()
        self.halves = halves
        self.in_conv = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else None
        self.resnets = nn.Sequential(*[Residual(outputs) for _ in range(blocks)])

    def forward(self, x: Tensor) -> Tensor:
        if self.halves:
            x = F.avg_pool2d(x, 2, 2, ceil_mode=True)
        return self.resnets(x if self.in_conv is None else self.in_conv(x))


class Adapter(nn.Module):
    """References -> what is added at the end of each level."""

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.widths
        entering = config.references * config.channels * config.unshuffle**2
        self.conv_in = nn.Conv2d(entering, widths[0], 3, padding=1)
        pairs = zip((widths[0], *widths[:-1]), widths, strict=True)
        self.body = nn.ModuleList(Stage(i, o, config.blocks, level > 0) for level, (i, o) in enumerate(pairs))

    def forward(self, references: Tensor) -> list[Tensor]:
        """[streams, K * channels, H, W], the newest first; pictures in -1..1 or latents -> one [streams, width, h, w] per level."""
        x = self.conv_in(F.pixel_unshuffle(references, self.config.unshuffle))
        features = []
        for stage in self.body:
            x = stage(x)
            features.append(x)
        return features
