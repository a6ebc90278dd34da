"""The 3-D UNet: ResBlocks of (1, 3, 3) convolutions, factorised attention, skips. Both families of released configurations.

GroupNorm statistics run over time and space at once (epsilon 1e-5), so no feature of a clean frame can be cached exactly: it depends
on the noisy frames beside it. What can be kept is the time embedding's table, the keys and values of the text, and the first
convolution of what does not change.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyengine.errors import ConfigError, ShapeError

from .attention import STAttentionBlock
from .config import refuse_unknown, refuse_value
from .group_norm import GROUPS
from .transformer import SpatialTemporalTransformer, TransformerBlock

# Keys of the released constructor that do not change the function.
_IGNORED = ("image_size", "use_checkpoint", "use_fp16", "dropout", "num_heads_upsample")
_IGNORED_CLASSES = ("ST_transformer_module", "ST_transformer_class")  # there is one of each
_ACTIVATIONS: dict[str, type[nn.Module]] = {"silu": nn.SiLU, "leaky_relu": nn.LeakyReLU}


class UNet(nn.Module):
    """unet(x, timesteps, y=None, context=None) -> predicted noise [B, out_channels, T, H, W].

    x          [B, in_channels, T, H, W] latents; for prediction and interpolation the mask is the last channel
    timesteps  [B] integer steps of training, 0..999
    y          [B] integer perturbation level, a row of `label_emb`; None adds nothing (the unconditional branch)
    context    [B, tokens, context_dim] text, where `use_temporal_transformer`
    Takes the keys of the released `unet_config.params`, with the released defaults. Raises ConfigError, ShapeError.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int,
        model_channels: int,
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        channel_mult: Sequence[int] = (1, 2, 4, 8),
        num_heads: int = -1,
        num_head_channels: int = -1,
        num_classes: int | None = None,
        use_scale_shift_norm: bool = False,
        use_temporal_transformer: bool = False,
        transformer_depth: int = 1,
        context_dim: int | None = None,
        temporal_length: int | None = None,
        use_relative_position: bool = False,
        kernel_size_t: int = 1,
        padding_t: int = 1,
        conv_resample: bool = True,
        resblock_updown: bool = False,
        legacy: bool = True,
        nonlinearity_type: str = "silu",
        **rest: Any,
    ) -> None:
        super().__init__()
        refuse_value("UNet", "dims", rest.pop("dims", 3), 3)
        # Embeds the perturbation level per frame: neither shipped configuration does.
        mode = rest.pop("cond_aug_mode", None)  # "learned_embed" is a name for nothing, as released
        refuse_value("UNet", "cond_aug_mode", None if mode == "learned_embed" else mode, None)
        refuse_unknown("UNet", rest, (*_IGNORED, *_IGNORED_CLASSES))
        if nonlinearity_type not in _ACTIVATIONS:
            raise ConfigError(
                f"[UNet] expected nonlinearity_type out of {', '.join(_ACTIVATIONS)} but got {nonlinearity_type!r}"
            )
        if use_temporal_transformer != (context_dim is not None):
            raise ConfigError("[UNet] expected context_dim exactly when use_temporal_transformer is true")
        if num_heads == -1 and num_head_channels == -1:
            raise ConfigError("[UNet] expected num_heads or num_head_channels but got neither")
        if use_relative_position and temporal_length is None:
            raise ConfigError("[UNet] expected temporal_length with use_relative_position but got none")
        self.model_channels, self.in_channels, self.out_channels = model_channels, in_channels, out_channels
        self.context_dim, self.num_classes = context_dim, num_classes
        embedding = 4 * model_channels
        reach = temporal_length if use_relative_position else None
        activation = _ACTIVATIONS[nonlinearity_type]

        def conv(channels: int, out: int, stride: int = 1) -> nn.Conv3d:
            return nn.Conv3d(channels, out, (kernel_size_t, 3, 3), (1, stride, stride), (padding_t, 1, 1))

        def residual(channels: int, out: int, resize: nn.Module | None = None) -> ResBlock:
            return ResBlock(channels, out, embedding, conv, use_scale_shift_norm, activation, resize)

        def halved(channels: int) -> nn.Module:
            pool = nn.AvgPool3d((1, 2, 2))
            if resblock_updown:
                return residual(channels, channels, pool)
            return Downsample(conv(channels, channels, 2) if conv_resample else pool)

        def doubled(channels: int) -> nn.Module:
            if resblock_updown:
                return residual(channels, channels, Upsample(nn.Identity()))
            return Upsample(conv(channels, channels) if conv_resample else nn.Identity())

        def attention(channels: int) -> nn.Module:
            if num_head_channels == -1:
                heads, size = num_heads, channels // num_heads
            else:
                heads, size = channels // num_head_channels, num_head_channels
            if context_dim is not None:
                size = channels // heads if legacy else size
                return SpatialTemporalTransformer(
                    channels, heads, size, transformer_depth, context_dim, reach
                )
            # As released: by the size, also where the number of heads that was given does not divide.
            if not legacy and size and channels % size == 0:
                heads = channels // size
            if heads * size != channels:
                raise ConfigError(
                    f"[UNet] expected heads that divide {channels} channels but got {heads} of {size}; "
                    "change num_heads or num_head_channels"
                )
            return STAttentionBlock(channels, heads, reach)

        self.time_embed = nn.Sequential(
            nn.Linear(model_channels, embedding), activation(), nn.Linear(embedding, embedding)
        )
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, embedding)
        widths = [mult * model_channels for mult in channel_mult]
        factors = [2**level for level in range(len(widths))]
        self.shrinks = factors[-1]
        channels = model_channels
        skips = [channels]
        self.input_blocks = nn.ModuleList([nn.ModuleList([conv(in_channels, channels)])])
        for width, factor in zip(widths, factors, strict=True):
            for _ in range(num_res_blocks):
                layers: list[nn.Module] = [residual(channels, width)]
                channels = width
                layers += [attention(channels)] if factor in attention_resolutions else []
                self.input_blocks.append(nn.ModuleList(layers))
                skips.append(channels)
            if factor != factors[-1]:
                self.input_blocks.append(nn.ModuleList([halved(channels)]))
                skips.append(channels)
        self.middle_block = nn.ModuleList(
            [residual(channels, channels), attention(channels), residual(channels, channels)]
        )
        self.output_blocks = nn.ModuleList()
        for width, factor in reversed(list(zip(widths, factors, strict=True))):
            for place in range(num_res_blocks + 1):
                layers = [residual(channels + skips.pop(), width)]
                channels = width
                layers += [attention(channels)] if factor in attention_resolutions else []
                if factor > 1 and place == num_res_blocks:
                    layers.append(doubled(channels))
                self.output_blocks.append(nn.ModuleList(layers))
        self.out = nn.Sequential(nn.GroupNorm(GROUPS, channels), activation(), conv(channels, out_channels))
        nn.init.zeros_(self.out[2].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.out[2].bias)  # type: ignore[arg-type]

    def forward(
        self, x: Tensor, timesteps: Tensor, y: Tensor | None = None, context: Tensor | None = None
    ) -> Tensor:
        self._check(x, y, context)
        texts = None if context is None else self.text_keys(context)
        return self.denoise(x, self.project(self.embed(timesteps, y)), texts)

    def _check(self, x: Tensor, y: Tensor | None, context: Tensor | None) -> None:
        if x.ndim != 5 or x.shape[1] != self.in_channels or any(side % self.shrinks for side in x.shape[3:]):
            raise ShapeError(
                f"[UNet] expected x [batch, {self.in_channels}, frames, height, width] with height and width in multiples "
                f"of {self.shrinks} but got {list(x.shape)}"
            )
        if y is not None and self.num_classes is None:
            raise ConfigError("[UNet] expected no y but got one; num_classes of the configuration is none")
        if self.context_dim is not None and (context is None or context.shape[-1] != self.context_dim):
            got = "none" if context is None else str(list(context.shape))
            raise ShapeError(f"[UNet] expected context [batch, tokens, {self.context_dim}] but got {got}")

    def embed(self, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        """The embedding that every ResBlock reads, which depends on nothing else. [B, 4 * model_channels]"""
        weight = self.time_embed[0].get_parameter("weight")
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels).to(weight.dtype))
        return emb if y is None else emb + self.label_emb(y)

    def project(self, emb: Tensor) -> Tensor:
        """What each ResBlock makes of the embedding, side by side: constant per timestep, so a table for a whole schedule.

        [B, 4 * model_channels] -> [B, sum of projected widths]
        """
        return torch.cat([block.emb_layers(emb) for block in self.residual_blocks()], -1)

    def text_keys(self, context: Tensor) -> list[Tensor]:
        """Keys and values of the text for every cross-attention in turn: constant per prompt. Each [B, heads, tokens, d]."""
        found = []
        for layer in self.modules():
            if isinstance(layer, TransformerBlock):
                found += layer.attn2.keys(context)
        return found

    def residual_blocks(self) -> list[ResBlock]:
        """In the order of the forward pass."""
        return [layer for layer in self.modules() if isinstance(layer, ResBlock)]

    def denoise(self, x: Tensor, projected: Tensor, texts: Sequence[Tensor] | None = None) -> Tensor:
        """The network behind what is constant per timestep and per prompt."""
        widths = [block.emb_layers[1].out_features for block in self.residual_blocks()]
        given = _Given(iter(projected.split(widths, -1)), iter(texts or ()))
        skips = []
        h = x
        for block in self.input_blocks:
            h = run(block, h, given)  # type: ignore[arg-type]
            skips.append(h)
        h = run(self.middle_block, h, given)
        for block in self.output_blocks:
            h = run(block, torch.cat([h, skips.pop()], 1), given)  # type: ignore[arg-type]
        return self.out(h)


class _Given(NamedTuple):
    """What the layers take in turn."""

    embeddings: Iterator[Tensor]
    texts: Iterator[Tensor]


def run(block: nn.ModuleList, h: Tensor, given: _Given) -> Tensor:
    for layer in block:
        if isinstance(layer, ResBlock):
            h = layer.with_projection(h, next(given.embeddings))
        elif isinstance(layer, SpatialTemporalTransformer):
            h = layer.with_keys(h, given.texts)
        else:
            h = layer(h)
    return h


class ResBlock(nn.Module):
    """x [B, C, T, H, W], emb [B, E] -> [B, out, T, H, W]. The embedding scales and shifts (FiLM) or is added.

    `resize` halves or doubles height and width, between the activation and the first convolution, and beside them.
    """

    def __init__(
        self,
        channels: int,
        out: int,
        embedding: int,
        conv: Any,
        film: bool,
        activation: type[nn.Module],
        resize: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.film, self.resize = film, resize
        self.in_layers = nn.Sequential(nn.GroupNorm(GROUPS, channels), activation(), conv(channels, out))
        self.emb_layers = nn.Sequential(activation(), nn.Linear(embedding, 2 * out if film else out))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(GROUPS, out), activation(), nn.Dropout(0.0), conv(out, out)
        )
        self.skip_connection = nn.Identity() if channels == out else nn.Conv3d(channels, out, 1)
        nn.init.zeros_(self.out_layers[3].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.out_layers[3].bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.with_projection(x, self.emb_layers(emb))

    def with_projection(self, x: Tensor, projected: Tensor) -> Tensor:
        """`projected` [B, out or 2 out]: the embedding behind `emb_layers`."""
        norm, active, conv = self.in_layers
        h = active(norm(x))
        if self.resize is not None:
            h, x = self.resize(h), self.resize(x)
        h = conv(h)
        e = projected[:, :, None, None, None]
        norm, active, _, conv = self.out_layers
        assert isinstance(norm, nn.GroupNorm)
        if self.film:
            scale, shift = e.chunk(2, 1)
            weight, bias = (value[None, :, None, None, None] for value in (norm.weight, norm.bias))
            # The norm's own affine and FiLM's as one: half the passes over h. Not nn.GroupNorm followed by FiLM also because
            # OpenVINO 2026.4 crashes where it fuses the two in float32.
            h = normalised(h, norm) * (weight * (1 + scale)) + (bias * (1 + scale) + shift)
        else:
            h = norm(h + e)
        return self.skip_connection(x) + conv(active(h))


def normalised(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """GroupNorm without its affine, over all frames. [B, C, T, H, W]"""
    rows = x.reshape(-1, norm.num_groups, math.prod(x.shape[1:]) // norm.num_groups)
    return F.layer_norm(rows, rows.shape[2:], eps=norm.eps).reshape(-1, *x.shape[1:])


class Downsample(nn.Module):
    """Halves height and width: a strided convolution, or the mean."""

    def __init__(self, op: nn.Module) -> None:
        super().__init__()
        self.op = op

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """Doubles height and width: nearest neighbour, then a convolution or nothing."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=(1.0, 2.0, 2.0), mode="nearest"))


def timestep_embedding(timesteps: Tensor, channels: int) -> Tensor:
    """[B] integers -> [B, channels] float32: cosines, then sines, of t * 10000^(-i / half)."""
    half = channels // 2
    index = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    frequencies = torch.exp(-math.log(10000.0) * index / half)
    angle = timesteps[:, None].float() * frequencies
    embedding = torch.cat([angle.cos(), angle.sin()], -1)
    return F.pad(embedding, (0, channels % 2))
