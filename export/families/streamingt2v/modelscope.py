"""ModelScope's text-to-video UNet (Wang et al. 2023, arXiv:2308.06571) by its diffusers names, whole and without its decoder.

The whole one is StreamingT2V's denoiser (`base_model.` in its checkpoint), with a merger on every skip tensor and on the middle, and with
appearance mixed into its texts; or, with neither, the published model that makes a first clip.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .appearance import IMAGE_TOKENS, TEXT_TOKENS, AppearanceAttention
from .layers import (
    CONVOLUTIONS,
    EPSILON,
    GROUPS,
    HIDDEN,
    Attention,
    FramePositions,
    Residual,
    ResidualParts,
    SpatialTransformer,
    TemporalConv,
    TemporalTransformer,
)
from .merger import HEAD_SIZE, Merger
from .trunk import Layers, Trunk, Walk, per_frame, rows_of, video_of

LAYERS = 2  # per level, and one more in the decoder


@dataclass(frozen=True)
class Widths:
    """Sizes of a UNet. All levels but the last attend to the text, or `attends` says which do.

    channels       of each level, multiples of `groups`, which every norm has
    head_size      of every attention but the mergers', `merger_head_size`
    stem_heads     of the temporal transformer of the stem
    text_channels  of a token of the text; of it there are `text_tokens`, and `image_tokens` of the anchor
    layers         per level, and one more in the decoder
    hidden         width of a feed-forward layer, over that of its input
    convolutions   of a temporal convolution
    frames         of the window, each with a learned position; None, as released, for none
    """

    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    head_size: int = 64
    stem_heads: int = 8
    text_channels: int = 1024
    latent_channels: int = 4
    merger_head_size: int = HEAD_SIZE
    groups: int = GROUPS
    layers: int = LAYERS
    hidden: int = HIDDEN
    convolutions: int = CONVOLUTIONS
    text_tokens: int = TEXT_TOKENS
    image_tokens: int = IMAGE_TOKENS
    attends: tuple[bool, ...] | None = None
    frames: int | None = None

    def attends_at(self, level: int) -> bool:
        """Whether this level has transformers."""
        return level < len(self.channels) - 1 if self.attends is None else self.attends[level]

    @property
    def time_channels(self) -> int:
        return 4 * self.channels[0]


RELEASED = Widths()


class ResnetBlock(Residual):
    """The residual block by its diffusers names."""

    def __init__(self, channels: int, out: int, widths: Widths) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(widths.groups, channels, EPSILON)
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1)
        self.time_emb_proj = nn.Linear(widths.time_channels, out)
        self.norm2 = nn.GroupNorm(widths.groups, out, EPSILON)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(channels, out, 1) if channels != out else None

    def parts(self) -> ResidualParts:
        return ResidualParts(
            self.norm1, self.conv1, self.time_emb_proj, self.norm2, self.conv2, self.conv_shortcut
        )


class Resize(nn.Module):
    """Half the height and width (`stride` 2), or twice by nearest neighbours (1), with a convolution."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(channels, channels, 3, stride, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x if self.stride == 2 else F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The layers at one size: lists by kind, as the checkpoint has them; `steps` gives them in the order they run."""

    def __init__(
        self, inputs: Sequence[int], out: int, widths: Widths, attends: bool, appearance: bool
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(each, out, widths) for each in inputs)
        self.temp_convs = nn.ModuleList(temporal_conv(out, widths) for _ in inputs)
        if attends:
            spatial, temporal = attention_layers(out, widths, appearance, len(inputs))
            self.attentions, self.temp_attentions = spatial, temporal
        self.attends = attends

    def steps(self) -> list[Layers]:
        kinds = [self.resnets, self.temp_convs]
        kinds += [self.attentions, self.temp_attentions] if self.attends else []
        return [list(layers) for layers in zip(*kinds, strict=True)]


class Middle(nn.Module):
    """Residual, attention, residual at the smallest size."""

    def __init__(self, channels: int, widths: Widths, appearance: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, widths) for _ in range(2))
        self.temp_convs = nn.ModuleList(temporal_conv(channels, widths) for _ in range(2))
        self.attentions, self.temp_attentions = attention_layers(channels, widths, appearance, 1)

    def steps(self) -> Layers:
        first, last = zip(self.resnets, self.temp_convs, strict=True)
        return [*first, self.attentions[0], self.temp_attentions[0], *last]


def attention_layers(
    channels: int, widths: Widths, appearance: bool, count: int
) -> tuple[nn.ModuleList, nn.ModuleList]:
    """Spatial and temporal transformers, so many of each."""
    size, groups, hidden = widths.head_size, widths.groups, widths.hidden

    def to_text() -> Attention:
        if not appearance:
            return Attention(channels, size, widths.text_channels)
        return AppearanceAttention(
            channels, size, widths.text_channels, widths.text_tokens, widths.image_tokens
        )

    return (
        nn.ModuleList(SpatialTransformer(channels, size, to_text(), groups, hidden) for _ in range(count)),
        nn.ModuleList(
            TemporalTransformer(channels, size, groups=groups, hidden=hidden) for _ in range(count)
        ),
    )


def temporal_conv(channels: int, widths: Widths) -> TemporalConv:
    return TemporalConv(channels, widths.groups, widths.convolutions)


class ModelScopeTrunk(Trunk):
    """Stem, encoder and middle.

    appearance  whether cross-attentions mix the anchor's tokens into the text
    """

    def __init__(self, widths: Widths = RELEASED, appearance: bool = False) -> None:
        super().__init__()
        first, last = widths.channels[0], widths.channels[-1]
        self.widths, self.channels = widths, first
        self.conv_in = nn.Conv2d(widths.latent_channels, first, 3, padding=1)
        self.time_embedding = nn.ModuleDict(
            {
                "linear_1": nn.Linear(first, widths.time_channels),
                "linear_2": nn.Linear(widths.time_channels, widths.time_channels),
            }
        )
        self.transformer_in = TemporalTransformer(
            first, widths.head_size, widths.stem_heads, groups=widths.groups, hidden=widths.hidden
        )
        self.positions = None if widths.frames is None else FramePositions(widths.frames, first)
        self.down_blocks = nn.ModuleList()
        inputs = first
        for index, out in enumerate(widths.channels):
            is_last = index == len(widths.channels) - 1
            level = Level(
                [inputs, *[out] * (widths.layers - 1)], out, widths, widths.attends_at(index), appearance
            )
            if not is_last:
                level.downsamplers = nn.ModuleList([Resize(out, 2)])
            self.down_blocks.append(level)
            inputs = out
        self.mid_block = Middle(last, widths, appearance)

    def encoder(self) -> list[Layers]:
        positions = [] if self.positions is None else [self.positions]
        found: list[Layers] = [[self.conv_in, *positions, self.transformer_in]]
        for level in self.down_blocks:
            assert isinstance(level, Level)
            found += level.steps()
            if isinstance(resize := getattr(level, "downsamplers", None), nn.ModuleList):
                found.append(list(resize))
        return found

    def middle(self) -> Layers:
        return self.mid_block.steps()

    def time_layers(self) -> tuple[nn.Linear, nn.Linear]:
        first, second = self.time_embedding["linear_1"], self.time_embedding["linear_2"]
        assert isinstance(first, nn.Linear)
        assert isinstance(second, nn.Linear)
        return first, second

    def skip_channels(self) -> list[int]:
        """Of each skip tensor, and of the middle."""
        found = [self.widths.channels[0]]
        for index, out in enumerate(self.widths.channels):
            found += [out] * (self.widths.layers + (index < len(self.widths.channels) - 1))
        return [*found, self.widths.channels[-1]]


class ModelScopeUNet(ModelScopeTrunk):
    """unet(x [rows, 4, frames, h, w], t [rows], context [rows, tokens, 1024], features) -> predicted noise, of x's shape.

    merges   whether it has mergers: one per skip tensor and one for the middle, which take the extractor's `features`,
             [rows * condition frames, C, h', w'] each. Without features they are left out
    """

    def __init__(self, widths: Widths = RELEASED, appearance: bool = False, merges: bool = False) -> None:
        super().__init__(widths, appearance)
        skips = self.skip_channels()[:-1]
        self.up_blocks = nn.ModuleList()
        inputs = widths.channels[-1]
        for index, out in enumerate(reversed(widths.channels)):
            inner = [inputs, *[out] * widths.layers]
            sums = [channels + skips.pop() for channels in inner]
            level = Level(sums, out, widths, widths.attends_at(len(widths.channels) - 1 - index), appearance)
            if index < len(widths.channels) - 1:
                level.upsamplers = nn.ModuleList([Resize(out, 1)])
            self.up_blocks.append(level)
            inputs = out
        self.conv_norm_out = nn.GroupNorm(widths.groups, widths.channels[0], EPSILON)
        self.conv_out = nn.Conv2d(widths.channels[0], widths.latent_channels, 3, padding=1)
        self.merges = merges
        if merges:
            *down, middle = (
                Merger(channels, widths.merger_head_size, widths.groups) for channels in self.skip_channels()
            )
            self.cross_attention_merger_down_blocks = nn.ModuleList(down)
            self.cross_attention_merger_mid_block = middle

    def decoder(self) -> list[Layers]:
        """The layers behind each skip tensor, from the last one on."""
        found: list[Layers] = []
        for level in self.up_blocks:
            assert isinstance(level, Level)
            steps = level.steps()
            if isinstance(resize := getattr(level, "upsamplers", None), nn.ModuleList):
                steps[-1] = [*steps[-1], *resize]
            found += steps
        return found

    def layers(self) -> Iterator[nn.Module]:
        yield from super().layers()
        for step in self.decoder():
            yield from step

    def mergers(self) -> list[Merger]:
        """One per feature of the extractor, in its order. Empty without."""
        if not self.merges:
            return []
        found = [*self.cross_attention_merger_down_blocks, self.cross_attention_merger_mid_block]
        return [each for each in found if isinstance(each, Merger)]

    def forward(
        self, x: Tensor, t: Tensor, context: Tensor, features: Sequence[Tensor] | None = None
    ) -> Tensor:
        frames = x.shape[2]
        walk = Walk(per_frame(self.embed(t), frames), self.text_keys(context), frames)
        return video_of(self.denoise(rows_of(x), walk, features), frames)

    def denoise(
        self,
        x: Tensor,
        walk: Walk,
        features: Sequence[Tensor] | None = None,
        mergers: Sequence[nn.Module] | None = None,
    ) -> Tensor:
        """Frames to predicted noise, as `forward`, with all that the walk has been given. x [rows * frames, 4, h, w]. Its own mergers
        unless others are given.

        The mergers act on the skip tensors and on the middle; the encoder runs as without them. A feature that was made before the
        branches parted belongs to a skip tensor of which that is true as well.
        """
        skips: list[tuple[Tensor, bool]] = []
        for step in self.encoder():
            x = walk.run(step, x)
            skips.append((x, walk.parted))
        x = walk.run(self.middle(), x)
        if features is not None:
            mergers = self.mergers() if mergers is None else mergers
            x = mergers[-1](x, features[-1], walk.frames)
            pairs = zip(mergers[:-1], skips, features[:-1], strict=True)
            skips = [(merge(skip, y, walk.frames), parted) for merge, (skip, parted), y in pairs]
        for step in self.decoder():
            skip, parted = skips.pop()
            x = walk.run(step, torch.cat([x, skip if parted else walk.part(skip)], 1))
        return self.conv_out(F.silu(self.conv_norm_out(x)))
