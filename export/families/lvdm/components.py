"""The networks as a bundle holds them: what is constant per timestep or per prompt is split off the UNet."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .autoencoder2d import AutoencoderKL
from .autoencoder3d import Autoencoder3D
from .unet import UNet


class Embedding(nn.Module):
    """timesteps, level [steps] -> projected [2, steps, values]: projected for every ResBlock, with the perturbation level and without.

    A UNet without labels takes no level and gives [1, steps, values].
    """

    def __init__(self, unet: UNet) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, timesteps: Tensor, level: Tensor | None = None) -> Tensor:
        plain = self.unet.embed(timesteps)
        both = [plain] if level is None else [plain + self.unet.label_emb(level), plain]
        return self.unet.project(torch.stack(both))


class Denoiser(nn.Module):
    """latents [streams, T, C, h, w], embedding [branches, streams, values], and by model mask [branches, streams, T] or the text ->
    prediction [branches, streams, T, C, h, w].

    The network sees clips that know nothing of each other: a stream is a user's, or one interval of a batch of them. They may
    stand at different timesteps. `text_key`, `text_value`: one per cross-attention, [branches, streams, heads, tokens, d].
    """

    def __init__(self, unet: UNet) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self,
        latents: Tensor,
        embedding: Tensor,
        mask: Tensor | None = None,
        text_key: Sequence[Tensor] | None = None,
        text_value: Sequence[Tensor] | None = None,
    ) -> Tensor:
        branches, streams, _ = embedding.shape
        x = latents.transpose(1, 2).expand(branches, -1, -1, -1, -1, -1).flatten(0, 1)
        if mask is not None:
            spread = mask.flatten(0, 1)[:, None, :, None, None] * torch.ones_like(x[:, :1])
            x = torch.cat([x, spread], 1)
        pairs = zip(text_key or (), text_value or (), strict=True)
        texts = [text.flatten(0, 1) for pair in pairs for text in pair]
        predicted = self.unet.denoise(x, embedding.flatten(0, 1), texts)
        return predicted.transpose(1, 2).unflatten(0, (branches, streams))


class VideoDecoder(nn.Module):
    """Model latents of a clip [chunk, C, h, w] -> uint8 frames [chunk, frames per latent, H, W, 3], truncated as released."""

    def __init__(self, autoencoder: Autoencoder3D | AutoencoderKL, scale: float, shift: float) -> None:
        super().__init__()
        self.autoencoder, self.scale, self.shift = autoencoder, scale, shift

    def forward(self, latents: Tensor) -> Tensor:
        z = latents / self.scale - self.shift
        if isinstance(self.autoencoder, Autoencoder3D):
            per_latent = self.autoencoder.factors[0]
            pixels = self.autoencoder.decode(z.transpose(0, 1)[None])[0].permute(1, 2, 3, 0)
        else:
            per_latent = 1
            pixels = self.autoencoder.decode(z).permute(0, 2, 3, 1)
        frames = ((pixels + 1) * 127.5).clamp(0, 255).to(torch.uint8)
        return frames.reshape(-1, per_latent, *frames.shape[1:])


class TextEncoder(nn.Module):
    """ids [tokens] -> keys and values of every cross-attention, [2, heads, tokens, d] each: the prompt's and the empty prompt's.

    `clip` is the text tower of `transformers`, `empty` the ids of "". No attention mask, as released; the last hidden state behind
    the final norm.
    """

    def __init__(self, clip: nn.Module, unet: UNet, empty: Tensor) -> None:
        super().__init__()
        self.clip, self.unet = clip, unet
        self.register_buffer("empty", empty)

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        both = torch.stack([ids, self.empty])  # type: ignore[list-item]
        hidden = self.clip(input_ids=both).last_hidden_state
        return tuple(self.unet.text_keys(hidden))
