"""The walk through a 3-D UNet, whatever its checkpoint calls the layers: encoder, middle and decoder are lists of layers.

What depends on the noise level alone (`project`) or on the text alone (`text_keys`) is computed apart, and may come from elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from .layers import (
    Attention,
    FramePositions,
    Residual,
    SpatialTransformer,
    TemporalConv,
    TemporalTransformer,
    TextKeys,
    timestep_embedding,
)

Layers = Sequence[nn.Module]


class Walk:
    """What layers take in turn, and whether the branches of guidance have parted yet.

    The branches see the same latents, level and conditions: they differ first behind a cross-attention. Until then there is one row per
    stream, and behind it one per branch and stream, branch by branch.

    projected   of every residual block in turn, [streams * frames, width]
    texts       of every cross-attention in turn, [branches * streams, heads, tokens, head size]
    branches    None: the rows that come in are those of the texts, and nothing is shared
    """

    def __init__(
        self, projected: Sequence[Tensor], texts: Sequence[TextKeys], frames: int, branches: int | None = None
    ) -> None:
        self._projected, self._texts = iter(projected), iter(texts)
        self._branches = 1 if branches is None else branches
        self.frames = frames
        self.parted = branches is None

    def run(self, layers: Layers, x: Tensor) -> Tensor:
        """x [rows * frames, C, h, w] -> the same, through these layers."""
        for layer in layers:
            x = self._layer(layer, x)
        return x

    def _layer(self, layer: nn.Module, x: Tensor) -> Tensor:
        if isinstance(layer, Residual):
            projected = next(self._projected)
            return layer(x, self.part(projected) if self.parted else projected)
        if isinstance(layer, SpatialTransformer):
            h = layer.before_text(x)
            if not self.parted:
                x, h, self.parted = self.part(x), self.part(h), True
            return layer.after_text(x, h, next(self._texts), self.frames)
        if isinstance(layer, (FramePositions, TemporalConv, TemporalTransformer)):
            return layer(x, self.frames)
        return layer(x)

    def part(self, x: Tensor) -> Tensor:
        """One row per stream -> one per branch and stream. x [streams * frames, ...]"""
        return x.expand(self._branches, *x.shape).flatten(0, 1)


class Trunk(nn.Module):
    """A UNet without its decoder: stem, encoder and middle. A subclass has the layers, by the names of its checkpoint.

    channels  of the first level, which the sinusoid of the timestep has as well
    """

    channels: int

    def encoder(self) -> list[Layers]:
        """The layers that lead to each skip tensor; the first are the stem."""
        raise NotImplementedError

    def middle(self) -> Layers:
        raise NotImplementedError

    def time_layers(self) -> tuple[nn.Linear, nn.Linear]:
        raise NotImplementedError

    def layers(self) -> Iterator[nn.Module]:
        """Every layer in the order of the walk."""
        for step in self.encoder():
            yield from step
        yield from self.middle()

    def residuals(self) -> list[Residual]:
        return [layer for layer in self.layers() if isinstance(layer, Residual)]

    def cross_attentions(self) -> list[Attention]:
        return [layer.block.attn2 for layer in self.layers() if isinstance(layer, SpatialTransformer)]

    def embed(self, timesteps: Tensor) -> list[Tensor]:
        """What each residual block adds at these timesteps: constant per level. [n] integers -> one [n, width] per block."""
        first, second = self.time_layers()
        emb = timestep_embedding(timesteps, self.channels).to(first.weight.dtype)
        emb = F.silu(second(F.silu(first(emb))))
        return [block.parts().embedding(emb) for block in self.residuals()]

    def text_keys(self, context: Tensor) -> list[TextKeys]:
        """What each cross-attention reads: constant per prompt. context [rows, tokens, channels]"""
        return [attention.keys(context) for attention in self.cross_attentions()]


def rows_of(x: Tensor) -> Tensor:
    """A video [rows, C, frames, h, w] as frames [rows * frames, C, h, w]."""
    return x.transpose(1, 2).flatten(0, 1)


def video_of(x: Tensor, frames: int) -> Tensor:
    """The reverse."""
    return x.unflatten(0, (-1, frames)).transpose(1, 2)


def per_frame(projected: Sequence[Tensor], frames: int) -> list[Tensor]:
    """The same level for all frames of a row: [rows, width] -> [rows * frames, width]."""
    return [each.repeat_interleave(frames, 0) for each in projected]
