"""All that is trained of ART-V, in one module: UNet, adapter, mask head and anchor encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from .adapter import Adapter
from .anchor import AnchorEncoder, without
from .config import ArtvConfig
from .layers import Context
from .masked import MaskHead, NoiseTable, mixed, static
from .unet import UNet


class Predicted(NamedTuple):
    """What the network says of a frame: with the reference mixed in, the mask [streams, 1, h, w], and without."""

    mixed: Tensor
    mask: Tensor
    alone: Tensor


class Denoiser(nn.Module):
    """One frame of every stream at its noise level."""

    def __init__(self, config: ArtvConfig, anchor_hidden: int = 128, anchor_halvings: int = 2) -> None:
        super().__init__()
        self.config = config
        channels = config.unet.channels
        self.unet = UNet(config.unet)
        self.adapter = Adapter(config.adapter)
        self.mask = MaskHead(config.unet.widths[0], channels)
        self.anchor = AnchorEncoder(channels, config.unet.anchor_width, anchor_hidden, anchor_halvings)
        self.table = NoiseTable(config)

    def references(self, references: Tensor, present: Tensor) -> list[Tensor]:
        """The adapter's features, zero for streams that have no reference. [streams, K * channels, H, W], present [streams]"""
        return [without(each, present) for each in self.adapter(references)]

    def anchors(self, latent: Tensor, present: Tensor) -> list[Tensor]:
        """What each cross-attention reads of the anchor, zero for streams that have none. latent [streams, channels, h, w]"""
        return [without(each, present) for each in self.unet.of_anchor(self.anchor(latent))]

    def predict(
        self,
        latents: Tensor,
        timesteps: Tensor,
        augmentation: Tensor,
        reference: Tensor,
        present: Tensor,
        features: Sequence[Tensor],
        contexts: Sequence[Context],
        branches: int | None = None,
    ) -> Predicted:
        """latents, and the reference that the mask copies, [streams, channels, h, w]; the rest as `UNet.forward`; with `branches` all
        but the mask have them in front. All branches share the mask of the first, the one with the prompt.
        """
        predicted, last = self.unet(latents, timesteps, augmentation, features, contexts, branches)
        if branches is not None:
            predicted, last = (each.unflatten(0, (branches, -1)) for each in (predicted, last))
        mask = self.mask(last if branches is None else last[0], latents, reference)
        mask = mask * present.reshape(-1, 1, 1, 1).to(mask.dtype)
        signal, noise = self.table.at(timesteps)
        still = static(latents, reference, signal, noise, self.config.predicts)
        return Predicted(mixed(mask, still, predicted), mask, predicted)


class Streaming(nn.Module):
    """The denoiser as it ships: what is constant over steps comes from the other components."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(
        self,
        latents: Tensor,
        level: Tensor,
        present: Tensor,
        augmentation: Tensor,
        reference: Tensor,
        text: Sequence[Tensor],
        anchor: Sequence[Tensor],
        feature: Sequence[Tensor],
    ) -> Tensor:
        """latents [streams, 1, channels, h, w], level [streams, 1]; present, augmentation [streams, 1] float; reference [streams,
        channels, h, w]; text: per transformer [branches, streams, 2, heads, words, head size]; anchor: per transformer [streams, 2,
        heads, tokens, head size]; feature: per level [streams, width, ..]. Returns [branches, streams, 1, channels, h, w].
        """
        branches = text[0].shape[0]
        timesteps = (level[:, 0].float() * self.denoiser.config.timesteps).round().long() - 1
        timesteps = timesteps.clamp(min=0)
        contexts = [Context(one.flatten(0, 1), other) for one, other in zip(text, anchor, strict=True)]
        predicted = self.denoiser.predict(
            latents[:, 0], timesteps, augmentation[:, 0], reference, present[:, 0], feature, contexts, branches
        )
        return predicted.mixed.unsqueeze(2)


class References(nn.Module):
    """The adapter as it ships, once per frame."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, latents: Tensor, present: Tensor, augmentation: Tensor) -> tuple[Tensor, ...]:
        """latents [K, channels, h, w], the newest first; present, augmentation [1] -> the reference that the mask copies, `present` and
        `augmentation` as the denoiser takes them, and the adapter's features [1, width, ..] per level.
        """
        reference = without(latents[:1], present)
        features = self.denoiser.references(latents.flatten(0, 1)[None], present)
        return reference, present[:, None].float(), augmentation[:, None].float(), *features


class Anchor(nn.Module):
    """The anchor's keys and values, once per stream."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, latents: Tensor, present: Tensor) -> tuple[Tensor, ...]:
        """latents [1, channels, h, w], present [1] -> [1, 2, heads, tokens, head size] per transformer."""
        return tuple(self.denoiser.anchors(latents, present))


__all__ = ["Anchor", "Denoiser", "Predicted", "References", "Streaming"]
