"""Sizes of the family's networks: those of Stable Diffusion 2.1, and the small ones of `shapes-artv`."""

from __future__ import annotations

from dataclasses import dataclass

from pyengine.errors import ConfigError
from pyengine.schedule.samplers import Prediction

REFERENCES = 2  # K, earlier frames that a frame is conditioned on


@dataclass(frozen=True)
class UNetConfig:
    """A UNet2DConditionModel of diffusers with attention at every level but the last, and in the middle.

    channels       of the latent
    widths         of each level; each has half the size of the one before
    layers         residual blocks of a level on the way down; one more on the way up
    heads          of every level
    text_width     of the text's tokens
    anchor_width   of the anchor's tokens
    groups         of every GroupNorm
    """

    channels: int = 4
    widths: tuple[int, ...] = (320, 640, 1280, 1280)
    layers: int = 2
    heads: tuple[int, ...] = (5, 10, 20, 20)
    text_width: int = 1024
    anchor_width: int = 1024
    groups: int = 32

    def __post_init__(self) -> None:
        if len(self.widths) < 2 or len(self.heads) != len(self.widths):
            raise ConfigError(
                f"[artv] expected two levels or more with a number of heads each but got widths {self.widths}, heads {self.heads}"
            )
        for width, heads in zip(self.widths, self.heads, strict=True):
            if width % self.groups or width % heads:
                raise ConfigError(
                    f"[artv] expected widths that groups {self.groups} and the level's heads {heads} divide but got {width}"
                )


@dataclass(frozen=True)
class AdapterConfig:
    """A full T2I-Adapter of diffusers over K references, stacked on their channels.

    channels     of one reference: 3 of a picture, or those of the latent
    unshuffle    pixels to a side that become channels first: 8 for pictures, 1 for latents
    """

    channels: int = 3
    unshuffle: int = 8
    widths: tuple[int, ...] = (320, 640, 1280, 1280)
    blocks: int = 2
    references: int = REFERENCES


@dataclass(frozen=True)
class ArtvConfig:
    """All networks of a model but the text tower and the codec.

    predicts   what the UNet names, as in `samplers.ddim`
    betas      first and last, linear in the square root between them
    """

    unet: UNetConfig = UNetConfig()
    adapter: AdapterConfig = AdapterConfig()
    predicts: Prediction = "velocity"
    betas: tuple[float, float] = (0.00085, 0.012)
    timesteps: int = 1000
