"""MS-Vid2Vid-XL's UNet, the second stage: the graph of ModelScope's under the names of latent diffusion, and two differences in geometry.

Halving pads two rows above and below, and doubling drops the first and the last row, so that 90 rows become 46, 24, 13 and 90 again.
The release computes every temporal attention twice, to the same result; here it is computed once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .layers import (
    EPSILON,
    GROUPS,
    Attention,
    Residual,
    ResidualParts,
    SpatialTransformer,
    TemporalConv,
    TemporalTransformer,
)
from .modelscope import LAYERS, RELEASED, Widths
from .trunk import Layers, Trunk, Walk, per_frame, rows_of, video_of


class ResBlock(Residual):
    """The residual block by its names in latent diffusion, with the temporal convolutions that follow it; theirs is misspelt."""

    def __init__(self, channels: int, out: int, time_channels: int) -> None:
        super().__init__()
        self.in_layers = nn.ModuleList(
            [nn.GroupNorm(GROUPS, channels, EPSILON), nn.SiLU(), nn.Conv2d(channels, out, 3, padding=1)]
        )
        self.emb_layers = nn.ModuleList([nn.SiLU(), nn.Linear(time_channels, out)])
        self.out_layers = nn.ModuleList(
            [
                nn.GroupNorm(GROUPS, out, EPSILON),
                nn.SiLU(),
                nn.Dropout(0.0),
                nn.Conv2d(out, out, 3, padding=1),
            ]
        )
        self.skip_connection = nn.Conv2d(channels, out, 1) if channels != out else None
        self.temopral_conv = TemporalConv(out)

    def parts(self) -> ResidualParts:
        norm1, _, conv1 = self.in_layers
        norm2, _, _, conv2 = self.out_layers
        embedding, shortcut = self.emb_layers[1], self.skip_connection
        return ResidualParts(norm1, conv1, embedding, norm2, conv2, shortcut)  # type: ignore[arg-type]


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, 2, padding=(2, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest")[:, :, 1:-1])


class Enhancer(Trunk):
    """enhancer(x [rows, 4, frames, h, w], t [rows], text [rows, 77, 1024]) -> v, of x's shape. h must be 2 more than a multiple of 8."""

    def __init__(self, widths: Widths = RELEASED) -> None:
        super().__init__()
        first, time = widths.channels[0], widths.time_channels
        self.channels = first
        self.time_embed = nn.ModuleList([nn.Linear(first, time), nn.SiLU(), nn.Linear(time, time)])

        def layers(inputs: int, out: int, attends: bool) -> nn.ModuleList:
            found: list[nn.Module] = [ResBlock(inputs, out, time)]
            if attends:
                attention = Attention(out, widths.head_size, widths.text_channels)
                found.append(SpatialTransformer(out, widths.head_size, attention))
                found.append(TemporalTransformer(out, widths.head_size, convolutions=True))
            return nn.ModuleList(found)

        stem = TemporalTransformer(first, widths.head_size, widths.stem_heads, convolutions=True)
        self.input_blocks = nn.ModuleList(
            [nn.ModuleList([nn.Conv2d(widths.latent_channels, first, 3, padding=1), stem])]
        )
        skips, channels, last = [first], first, len(widths.channels) - 1
        for level, out in enumerate(widths.channels):
            for _ in range(LAYERS):
                self.input_blocks.append(layers(channels, out, level < last))
                channels = out
                skips.append(out)
            if level < last:
                self.input_blocks.append(Downsample(out))
                skips.append(out)
        self.middle_block = nn.ModuleList(
            [*layers(channels, channels, True), ResBlock(channels, channels, time)]
        )
        self.output_blocks = nn.ModuleList()
        for level, out in reversed(list(enumerate(widths.channels))):
            for index in range(LAYERS + 1):
                block = layers(channels + skips.pop(), out, level < last)
                channels = out
                if level > 0 and index == LAYERS:
                    block.append(Upsample(out))
                self.output_blocks.append(block)
        self.out = nn.Sequential(
            nn.GroupNorm(GROUPS, first, EPSILON),
            nn.SiLU(),
            nn.Conv2d(first, widths.latent_channels, 3, padding=1),
        )

    def encoder(self) -> list[Layers]:
        return [_flat(block) for block in self.input_blocks]

    def middle(self) -> Layers:
        return _flat(self.middle_block)

    def decoder(self) -> list[Layers]:
        """The layers behind each skip tensor, from the last one on."""
        return [_flat(block) for block in self.output_blocks]

    def layers(self) -> Iterator[nn.Module]:
        yield from super().layers()
        for step in self.decoder():
            yield from step

    def time_layers(self) -> tuple[nn.Linear, nn.Linear]:
        first, second = self.time_embed[0], self.time_embed[2]
        assert isinstance(first, nn.Linear)
        assert isinstance(second, nn.Linear)
        return first, second

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        frames = x.shape[2]
        walk = Walk(per_frame(self.embed(t), frames), self.text_keys(text), frames)
        return video_of(self.denoise(rows_of(x), walk), frames)

    def denoise(self, x: Tensor, walk: Walk) -> Tensor:
        """Frames to v, with all that the walk has been given. x [rows * frames, 4, h, w]"""
        skips: list[tuple[Tensor, bool]] = []
        for step in self.encoder():
            x = walk.run(step, x)
            skips.append((x, walk.parted))
        x = walk.run(self.middle(), x)
        for step in self.decoder():
            skip, parted = skips.pop()
            x = walk.run(step, torch.cat([x, skip if parted else walk.part(skip)], 1))
        return self.out(x)


def _flat(block: nn.Module) -> list[nn.Module]:
    """The layers of a block, the temporal convolutions of a residual block behind it."""
    found: list[nn.Module] = []
    for layer in block if isinstance(block, nn.ModuleList) else [block]:
        found += [layer, layer.temopral_conv] if isinstance(layer, ResBlock) else [layer]
    return found
