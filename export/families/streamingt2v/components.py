"""The networks as a bundle holds them: what is constant is split off what runs at every step.

    constant over         component       gives
    a prompt              text_encoder    text: the tokens of the prompt and of the empty or negative prompt
    a video               image_encoder   anchor: the tokens of the anchor frame and of a grey one
    prompt and anchor     appearance      keys and values of the denoiser's 16 and of the extractor's 7 cross-attentions
    a chunk               condition       the encoded condition frames, once for both branches of guidance
    for ever              (tables)        what the residual blocks add at each of the 1000 timesteps, and products of merger matrices

The denoiser runs extractor and UNet in one graph, and up to the first cross-attention once for both branches. `cached.py` computes what
is kept in tables and products; until it has, those parameters are zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...layers.frame_autoencoder import FrameAutoencoder
from .appearance import ImageTokens
from .enhancer import Enhancer
from .extractor import ConditionEncoder, Extractor
from .layers import Residual, TextKeys, back
from .merger import Merger, attend, by_row
from .modelscope import ModelScopeUNet
from .networks import SCALE
from .trunk import Trunk, Walk

TIMESTEPS = 1000


class TimeTable(nn.Module):
    """level [n] -> what each residual block of these networks adds at that level, [n, width] each.

    Level l is timestep 1000 l - 1; the table has one row per timestep. `timesteps`: where there are not 1000 of them.
    """

    def __init__(self, *trunks: Trunk, timesteps: int = TIMESTEPS) -> None:
        super().__init__()
        self.timesteps = timesteps
        self.widths = [_width(block) for trunk in trunks for block in trunk.residuals()]
        device = next(trunks[0].parameters()).device
        self.rows = nn.Parameter(torch.zeros(timesteps, sum(self.widths), device=device))

    def forward(self, level: Tensor) -> list[Tensor]:
        timestep = (level * self.timesteps).round().to(torch.int64) - 1
        return list(self.rows[timestep.clamp(0, self.timesteps - 1)].split(self.widths, -1))


def _width(block: Residual) -> int:
    return block.parts().embedding.out_features


class FusedMerger(nn.Module):
    """A merger with its two projections on either side of the attention as one each, the norm's affine in the first."""

    def __init__(self, merger: Merger) -> None:
        super().__init__()
        parts = merger.temporal_transformer
        channels = parts.proj_in.in_features
        self.groups, self.epsilon = parts.norm.num_groups, parts.norm.eps
        device = parts.proj_in.weight.device
        self.query, self.out = (nn.Linear(channels, channels, device=device) for _ in range(2))
        for layer in (self.query, self.out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.to_k, self.to_v = parts.attention.to_k, parts.attention.to_v
        self.head_size = parts.attention.head_size

    def forward(self, x: Tensor, y: Tensor, frames: int) -> Tensor:
        video = x.flatten(2).unflatten(0, (-1, frames)).transpose(1, 2)  # [rows, C, frames, places]
        q = self.query(F.group_norm(video, self.groups, eps=self.epsilon).permute(0, 2, 3, 1))
        rows = by_row(y, q)
        return x + back(self.out(attend(q, self.to_k(rows), self.to_v(rows), self.head_size)), x)


class Denoiser(nn.Module):
    """latents [streams, frames, 4, h, w], level [streams, frames], condition [streams, condition frames, C, h, w] and the text ->
    prediction [branches, streams, frames, 4, h, w].

    The condition frames belong to the first rows of the window. `text_key`, `text_value` are those of `appearance`, with an axis of
    streams: [branches, streams, heads, tokens, head size] each; `cam_text_key`, `cam_text_value` are the extractor's.
    """

    def __init__(self, base: ModelScopeUNet, extractor: Extractor, timesteps: int = TIMESTEPS) -> None:
        super().__init__()
        self.base, self.extractor = base, extractor
        self.table, self.cam_table = (TimeTable(part, timesteps=timesteps) for part in (base, extractor))
        self.mergers = nn.ModuleList(FusedMerger(merger) for merger in base.mergers())

    def forward(
        self,
        latents: Tensor,
        level: Tensor,
        condition: Tensor,
        text_key: Sequence[Tensor],
        text_value: Sequence[Tensor],
        cam_text_key: Sequence[Tensor],
        cam_text_value: Sequence[Tensor],
    ) -> Tensor:
        branches, streams = text_key[0].shape[:2]
        frames, seen = latents.shape[1], condition.shape[1]
        cam = Walk(
            self.cam_table(level[:, :seen].flatten()), _texts(cam_text_key, cam_text_value), seen, branches
        )
        features = self.extractor.features(latents[:, :seen].flatten(0, 1), cam, condition.flatten(0, 1))
        walk = Walk(self.table(level.flatten()), _texts(text_key, text_value), frames, branches)
        prediction = self.base.denoise(latents.flatten(0, 1), walk, features, list(self.mergers))
        return prediction.unflatten(0, (branches, streams, frames))


class TextDenoiser(nn.Module):
    """latents [streams, frames, 4, h, w], level [streams, frames] and the text -> prediction [branches, streams, frames, 4, h, w].

    ModelScope's own UNet, which predicts noise and makes a first clip; `GuidedDenoiser` for the enhancer.
    """

    def __init__(self, unet: Enhancer | ModelScopeUNet, timesteps: int = TIMESTEPS) -> None:
        super().__init__()
        self.unet, self.table = unet, TimeTable(unet, timesteps=timesteps)

    def forward(
        self, latents: Tensor, level: Tensor, text_key: Sequence[Tensor], text_value: Sequence[Tensor]
    ) -> Tensor:
        branches, streams = text_key[0].shape[:2]
        frames = latents.shape[1]
        walk = Walk(self.table(level.flatten()), _texts(text_key, text_value), frames, branches)
        return self.unet.denoise(latents.flatten(0, 1), walk).unflatten(0, (branches, streams, frames))


class GuidedDenoiser(TextDenoiser):
    """The same, guided in the network: guidance [branches, streams], rescale [streams] -> prediction [1, streams, frames, 4, h, w].

    guidance  weights of the branches, of which the first is the prompt's and all together are 1
    rescale   share by which the deviation of what is guided, over the whole chunk, is drawn to that of the first branch (Lin et al.
              2023, arXiv:2305.08891); that takes all frames of a chunk at once, so no sampler could do it row by row
    """

    def forward(  # type: ignore[override]
        self,
        latents: Tensor,
        level: Tensor,
        guidance: Tensor,
        rescale: Tensor,
        text_key: Sequence[Tensor],
        text_value: Sequence[Tensor],
    ) -> Tensor:
        each = super().forward(latents, level, text_key, text_value)
        guided = (guidance[..., None, None, None, None] * each).sum(0)
        ratio = _deviation(each[0]) / (_deviation(guided) + 1e-12)
        scale = rescale * ratio + (1 - rescale)
        return (guided * scale[:, None, None, None, None])[None]


def _deviation(x: Tensor) -> Tensor:
    """x [streams, ...] -> [streams], with divisor N - 1."""
    flat = x.flatten(1)
    flat = flat - flat.mean(1, keepdim=True)
    return ((flat * flat).mean(1) * (flat.shape[1] / (flat.shape[1] - 1))).sqrt()


def _texts(keys: Sequence[Tensor], values: Sequence[Tensor]) -> list[TextKeys]:
    pairs = zip(keys, values, strict=True)
    return [TextKeys(key.flatten(0, 1), value.flatten(0, 1)) for key, value in pairs]


class TextEncoder(nn.Module):
    """ids [77] of the prompt -> text [2, 77, channels]: its tokens and those of the null branch's prompt, behind the final norm.

    `tower` is a CLIP text model of `transformers`; `null` the ids of the empty or of a negative prompt. No attention mask, as released.
    """

    def __init__(self, tower: nn.Module, null: Tensor) -> None:
        super().__init__()
        self.tower = tower
        self.register_buffer("null", null)

    def forward(self, ids: Tensor) -> Tensor:
        both = torch.stack([ids, self.get_buffer("null")])
        return self.tower(input_ids=both).last_hidden_state


class AnchorEncoder(nn.Module):
    """pixels [3, H, W] of the anchor in [-1, 1] -> anchor [2, 16, channels]: its tokens, and a grey picture's for the null branch.

    `encoder`: pictures to embeddings, an `ImageEncoder`.
    """

    def __init__(self, encoder: nn.Module, tokens: ImageTokens) -> None:
        super().__init__()
        self.encoder, self.tokens = encoder, tokens

    def forward(self, pixels: Tensor) -> Tensor:
        return self.tokens(self.encoder(torch.stack([pixels, torch.zeros_like(pixels)])))


class Appearance(nn.Module):
    """text [2, 77, channels], anchor [2, 16, channels] -> keys and values, [2, heads, 77, head size] each.

    In turn text_key.0, text_value.0, ... of the denoiser, then cam_text_key.0, ... of the extractor, which sees the text alone.
    """

    def __init__(self, base: ModelScopeUNet, extractor: Extractor) -> None:
        super().__init__()
        self.base, self.extractor = base, extractor

    def forward(self, text: Tensor, anchor: Tensor) -> tuple[Tensor, ...]:
        found = [*self.base.text_keys(torch.cat([text, anchor], 1)), *self.extractor.text_keys(text)]
        return tuple(each for pair in found for each in pair)


class TextProjector(nn.Module):
    """text [2, 77, channels] -> text_key.0, text_value.0, ..., [2, heads, 77, head size] each, of a network that knows no anchor."""

    def __init__(self, unet: Trunk) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, text: Tensor) -> tuple[Tensor, ...]:
        return tuple(each for pair in self.unet.text_keys(text) for each in pair)


class Condition(nn.Module):
    """pixels [streams, frames, 3, H, W] in [-1, 1] -> condition [streams, frames, C, H / 8, W / 8]."""

    def __init__(self, encoder: ConditionEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, pixels: Tensor) -> Tensor:
        return self.encoder(pixels.flatten(0, 1)).unflatten(0, pixels.shape[:2])


class VideoDecoder(nn.Module):
    """latents [chunk, 4, h, w] -> uint8 frames [chunk, 1, H, W, 3], truncated, and the pixels [chunk, 3, H, W] in [-1, 1] that they are
    made of, for the condition of the next chunk.
    """

    def __init__(self, vae: FrameAutoencoder) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        pixels = self.vae.decode(latents / SCALE).clamp(-1, 1)
        frames = ((pixels + 1) * 127.5).to(torch.uint8)
        return frames.permute(0, 2, 3, 1)[:, None], pixels


class VideoEncoder(nn.Module):
    """uint8 frames [chunk, 1, H, W, 3] -> latents [chunk, 4, h, w], the mean of the posterior, and pixels [chunk, 3, H, W] in [-1, 1]."""

    def __init__(self, vae: FrameAutoencoder) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        weight = self.vae.quant_conv.weight
        pixels = frames[:, 0].permute(0, 3, 1, 2).to(weight.dtype) / 127.5 - 1
        return self.vae.moments(pixels).chunk(2, 1)[0] * SCALE, pixels
