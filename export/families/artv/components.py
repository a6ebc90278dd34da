"""The networks as a bundle holds them: what is constant is split off what runs at every step.

constant over   component       gives
a prompt        text_encoder    keys and values of every cross-attention, of the prompt and of the null branch's
a stream        anchor          those of the first frame
a frame         references      the adapter's features of the K newest frames
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...layers.frame_autoencoder import FrameAutoencoder
from .denoiser import Denoiser
from .layers import Context
from .unet import UNet


class StepDenoiser(nn.Module):
    """One step of one frame of every stream.

    latents [streams, 2, channels, h, w]: the reference that the mask copies, clean, and the frame; level [streams, 2], of which the
    frame's counts; condition [streams, 2]: what the mask is multiplied by, and the timestep to which references are noised; text: per
    transformer [branches, streams, 2, heads, words, head size]; anchor: per transformer [streams, 2, heads, tokens, head size]; feature:
    per level [streams, width, ..]. Returns the prediction [branches, streams, 2, channels, h, w], zero for the reference.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(
        self,
        latents: Tensor,
        level: Tensor,
        condition: Tensor,
        text: Sequence[Tensor],
        anchor: Sequence[Tensor],
        feature: Sequence[Tensor],
    ) -> Tensor:
        branches = text[0].shape[0]
        # Timestep t stands at level (t + 1) / T. Streams that are absent have level 0.
        timesteps = (level[:, 1:] * self.denoiser.config.timesteps).round().to(torch.int64) - 1
        contexts = [Context(one.flatten(0, 1), other) for one, other in zip(text, anchor, strict=True)]
        predicted = self.denoiser.predict(
            latents[:, 1],
            timesteps.clamp(0, self.denoiser.config.timesteps - 1)[:, 0],
            condition[:, 1],
            latents[:, 0],
            condition[:, 0],
            feature,
            contexts,
            branches,
        )
        return torch.stack([torch.zeros_like(predicted.mixed), predicted.mixed], 2)


class References(nn.Module):
    """latents [K, channels, h, w], the newest first, of one stream; present, masked, augmentation [1] -> the denoiser's condition [2] and
    the adapter's features [width, ..] per level, zero where no reference is present. `masked` 0: the mask takes nothing of the newest one.

    `vae` and `scale`: of an adapter over pictures, which sees the frames decoded.
    """

    def __init__(self, denoiser: Denoiser, vae: FrameAutoencoder | None = None, scale: float = 1.0) -> None:
        super().__init__()
        self.denoiser, self.vae, self.scale = denoiser, vae, scale

    def forward(
        self, latents: Tensor, present: Tensor, masked: Tensor, augmentation: Tensor
    ) -> tuple[Tensor, ...]:
        seen = latents
        if self.vae is not None:
            seen = self.vae.decode(latents / self.scale).clamp(-1, 1)
        features = self.denoiser.references(seen.flatten(0, 1)[None], present)
        return torch.cat([present * masked, augmentation]), *(each[0] for each in features)


class Anchor(nn.Module):
    """latents [1, channels, h, w] of the first frame of one stream, present [1] -> [2, heads, tokens, head size] per transformer, zero
    where no anchor is present.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, latents: Tensor, present: Tensor) -> tuple[Tensor, ...]:
        return tuple(each[0] for each in self.denoiser.anchors(latents, present))


class TextEncoder(nn.Module):
    """ids [words] of the prompt -> [2, 2, heads, words, head size] per transformer: branches (prompt, null), then keys and values.

    `tower` gives a token per word, or is a CLIP text model of `transformers`; `null` are the ids of the empty or of a negative prompt.
    """

    def __init__(self, tower: nn.Module, unet: UNet, null: Tensor) -> None:
        super().__init__()
        self.tower, self.unet = tower, unet
        self.register_buffer("null", null)

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        tokens = self.tower(torch.stack([ids, self.get_buffer("null")]))
        if not isinstance(tokens, Tensor):
            tokens = tokens.last_hidden_state
        return tuple(self.unet.of_text(tokens))


class PictureDecoder(nn.Module):
    """latents [chunk, channels, h, w] -> uint8 frames [chunk, 1, H, W, 3]."""

    def __init__(self, vae: FrameAutoencoder, scale: float) -> None:
        super().__init__()
        self.vae, self.scale = vae, scale

    def forward(self, latents: Tensor) -> Tensor:
        pixels = self.vae.decode(latents / self.scale).clamp(-1, 1)
        frames = ((pixels + 1) * 127.5 + 0.5).clamp(0, 255).to(torch.uint8)
        return frames.permute(0, 2, 3, 1)[:, None]


class PictureEncoder(nn.Module):
    """uint8 frames [chunk, 1, H, W, 3] -> latents [chunk, channels, h, w], the mean of the posterior."""

    def __init__(self, vae: FrameAutoencoder, scale: float) -> None:
        super().__init__()
        self.vae, self.scale = vae, scale

    def forward(self, frames: Tensor) -> Tensor:
        weight = self.vae.quant_conv.weight
        pixels = frames[:, 0].permute(0, 3, 1, 2).to(weight.dtype) / 127.5 - 1
        return self.vae.moments(pixels).chunk(2, 1)[0] * self.scale
