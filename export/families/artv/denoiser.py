"""All that is denoised with, in one module: UNet, adapter, mask head and anchor encoder."""

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
        masked: Tensor,
        features: Sequence[Tensor],
        contexts: Sequence[Context],
        branches: int | None = None,
    ) -> Predicted:
        """latents, and the reference that the mask copies, [streams, channels, h, w]; masked [streams]: 0 where nothing is copied; the
        rest as `UNet.forward`. With `branches` all but the mask have them in front, and all branches share the mask of the first, the one
        with the prompt.
        """
        predicted, last = self.unet(latents, timesteps, augmentation, features, contexts, branches)
        if branches is not None:
            predicted, last = (each.unflatten(0, (branches, -1)) for each in (predicted, last))
        mask = self.mask(last if branches is None else last[0], latents, reference)
        mask = mask * masked.reshape(-1, 1, 1, 1).to(mask.dtype)
        signal, noise = self.table.at(timesteps)
        still = static(latents, reference, signal, noise, self.config.predicts)
        return Predicted(mixed(mask, still, predicted), mask, predicted)
