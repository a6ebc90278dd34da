"""LVDM (He et al. 2022, arXiv:2211.13221): latent video diffusion with a 3-D UNet, and videos of a thousand frames in two levels.

    UNet(**config)           the released yaml's `unet_config.params`; unet(x, timesteps, y=None, context=None)
    Autoencoder3D(**config)  its `first_stage_config.params`, or the encoder's keys flat; encode(x) -> (mean, logvar), decode(z)
    AutoencoderKL(**config)  the per-frame autoencoder of text to video

Parameters keep the names of the released checkpoints below their prefix.
"""

from __future__ import annotations

from .autoencoder2d import AutoencoderKL
from .autoencoder3d import Autoencoder3D
from .unet import UNet

__all__ = ["Autoencoder3D", "AutoencoderKL", "UNet"]
