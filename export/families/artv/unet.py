"""The UNet of Stable Diffusion 2.1 with ART-V's conditions: what diffusers calls UNet2DConditionModel, a T2I-Adapter's features added at
the end of every level, an anchor beside the text, and the noise level of the references beside the timestep.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import UNetConfig
from .layers import EPSILON, Context, CrossAttention, Down, Residual, TimeEmbedding, Transformer, Up


class Level(nn.Module):
    """One size on the way down (`resize` "downsamplers") or up ("upsamplers"): `inputs` are the widths that enter each residual block."""

    def __init__(
        self, config: UNetConfig, level: int, inputs: Sequence[int], attends: bool, resize: str | None
    ) -> None:
        super().__init__()
        width, heads = config.widths[level], config.heads[level]
        embedding = 4 * config.widths[0]
        self.resnets = nn.ModuleList(Residual(each, width, embedding, config.groups) for each in inputs)
        if attends:
            sizes = (width, heads, config.text_width, config.anchor_width, config.groups)
            self.attentions = nn.ModuleList(Transformer(*sizes) for _ in inputs)
        self.attends, self.resize = attends, resize
        if resize is not None:
            self.add_module(resize, nn.ModuleList([(Down if resize == "downsamplers" else Up)(width)]))

    def layers(self) -> Iterator[tuple[nn.Module, nn.Module | None]]:
        """Each residual block and the transformer behind it."""
        for index, block in enumerate(self.resnets):
            yield block, self.attentions[index] if self.attends else None

    def resized(self, x: Tensor) -> Tensor:
        return x if self.resize is None else self.get_submodule(f"{self.resize}.0")(x)


class Middle(nn.Module):
    """Residual, transformer, residual at the smallest size."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        width, embedding = config.widths[-1], 4 * config.widths[0]
        sizes = (width, config.heads[-1], config.text_width, config.anchor_width, config.groups)
        self.attentions = nn.ModuleList([Transformer(*sizes)])
        self.resnets = nn.ModuleList(Residual(width, width, embedding, config.groups) for _ in range(2))


class Walk:
    """The conditions that layers take in turn, and whether the branches of guidance have parted yet.

    The branches see the same latents, level, references and anchor: they differ first behind an attention to the text. Until then there
    is one row per stream, and behind it one per branch and stream, branch by branch.
    """

    def __init__(self, embedding: Tensor, contexts: Sequence[Context], branches: int | None) -> None:
        self._embedding, self._contexts = embedding, iter(contexts)
        self._branches = branches
        self.parted = branches is None

    def through(self, block: nn.Module, transformer: nn.Module | None, x: Tensor) -> Tensor:
        """A residual block and, where there is one, the transformer behind it."""
        x = block(x, self.part(self._embedding) if self.parted else self._embedding)
        if not isinstance(transformer, Transformer):
            return x
        h = transformer.before_text(x)
        if not self.parted:
            x, h, self.parted = self.part(x), self.part(h), True
        context = next(self._contexts)
        return transformer.after_text(x, h, Context(context.text, self.part(context.anchor)))

    def part(self, x: Tensor) -> Tensor:
        """One row per stream -> one per branch and stream."""
        return x if self._branches is None else x.expand(self._branches, *x.shape).flatten(0, 1)

    def noted(self, x: Tensor) -> tuple[Tensor, bool]:
        """A skip tensor, and whether it has a row per branch."""
        return x, self.parted

    def recalled(self, skip: Tensor, parted: bool) -> Tensor:
        """A skip tensor with the rows of now."""
        return skip if parted or not self.parted else self.part(skip)


class UNet(nn.Module):
    """Prediction and last features of one frame of every stream, for every branch of guidance."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        widths, layers = config.widths, config.layers
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.channels, widths[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(widths[0])
        self.augmentation_embedding = TimeEmbedding(widths[0])
        nn.init.zeros_(self.augmentation_embedding.linear_2.weight)
        nn.init.zeros_(self.augmentation_embedding.linear_2.bias)
        self.down_blocks = nn.ModuleList(
            Level(
                config,
                level,
                [widths[max(level - 1, 0)], *[width] * (layers - 1)],
                attends=level < last,
                resize="downsamplers" if level < last else None,
            )
            for level, width in enumerate(widths)
        )
        self.mid_block = Middle(config)
        skips = [widths[0]]
        for level, width in enumerate(widths):
            skips += [width] * (layers + (level < last))
        current, ups = widths[-1], []
        for level in reversed(range(len(widths))):
            inputs = []
            for _ in range(layers + 1):
                inputs.append(current + skips.pop())
                current = widths[level]
            ups.append(Level(config, level, inputs, level < last, "upsamplers" if level else None))
        self.up_blocks = nn.ModuleList(ups)
        self.conv_norm_out = nn.GroupNorm(config.groups, widths[0], EPSILON)
        self.conv_out = nn.Conv2d(widths[0], config.channels, 3, padding=1)

    def transformers(self) -> list[Transformer]:
        """Every transformer in the order of the walk."""
        parts = [*self.down_blocks, self.mid_block, *self.up_blocks]
        return [layer for part in parts for layer in part.modules() if isinstance(layer, Transformer)]

    def cross_attentions(self) -> list[CrossAttention]:
        return [layer.block.attn2 for layer in self.transformers()]

    def of_text(self, tokens: Tensor) -> list[Tensor]:
        """What each cross-attention reads of a text. tokens [rows, words, text width]"""
        return [attention.of_text(tokens) for attention in self.cross_attentions()]

    def of_anchor(self, tokens: Tensor) -> list[Tensor]:
        """What each cross-attention reads of an anchor. tokens [rows, places, anchor width]"""
        return [attention.of_anchor(tokens) for attention in self.cross_attentions()]

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        augmentation: Tensor,
        features: Sequence[Tensor],
        contexts: Sequence[Context],
        branches: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The prediction [branches * streams, channels, h, w], branch by branch, and the features [.., widths[0], h, w] that it is made of.

        x [streams, channels, h, w]; timesteps, and those to which the references are noised, [streams]; features: of the adapter, one per
        level, [streams, width, ..]; contexts: one per transformer, texts with a row per branch and stream, anchors with one per stream.
        `branches` None: a row per stream all the way, texts too.
        """
        embedding = F.silu(self.time_embedding(timesteps) + self.augmentation_embedding(augmentation))
        walk = Walk(embedding, contexts, branches)
        x = self.conv_in(x)
        skips = [walk.noted(x)]
        for level, feature in zip(self.down_blocks, features, strict=True):
            assert isinstance(level, Level)
            *layers, (block, transformer) = level.layers()
            for layer in layers:
                x = walk.through(*layer, x)
                skips.append(walk.noted(x))
            x = walk.through(block, transformer, x)
            x = x + (walk.part(feature) if walk.parted else feature)
            skips.append(walk.noted(x))
            if level.resize is not None:
                x = level.resized(x)
                skips.append(walk.noted(x))
        middle = self.mid_block
        x = walk.through(middle.resnets[0], middle.attentions[0], x)
        x = walk.through(middle.resnets[1], None, x)
        for level in self.up_blocks:
            assert isinstance(level, Level)
            for block, transformer in level.layers():
                x = walk.through(block, transformer, torch.cat([x, walk.recalled(*skips.pop())], 1))
            x = level.resized(x)
        last = F.silu(self.conv_norm_out(x))
        return self.conv_out(last), last
