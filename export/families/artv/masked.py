"""Masked diffusion: where the mask is 1 a frame is a copy of the reference, where it is 0 what the network predicts.

    x0 = m * reference + (1 - m) * x0 of the network

As every step is affine in x0, that is the same as mixing the network's noise with the *static* noise, from which the noisy latent would
become the reference, or its velocity with the static one. The guidance that mixes branches commutes with it as long as they share m.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyengine.schedule.samplers import Prediction, alphas_cumprod

from .config import ArtvConfig


class MaskHead(nn.Module):
    """How much of the reference each place takes, from the UNet's last features, the noisy latent and the reference."""

    def __init__(self, width: int, channels: int, hidden: int = 32) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(width + 2 * channels, hidden, 3, padding=1)
        self.conv_out = nn.Conv2d(hidden, 1, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.constant_(self.conv_out.bias, -2.0)  # type: ignore[arg-type]

    def forward(self, features: Tensor, noisy: Tensor, reference: Tensor) -> Tensor:
        """features [streams, width, h, w]; latents [streams, channels, h, w] -> [streams, 1, h, w] in 0..1."""
        return torch.sigmoid(self.conv_out(F.silu(self.conv_in(torch.cat([features, noisy, reference], 1)))))


class NoiseTable(nn.Module):
    """Square roots of alpha bar and of 1 - alpha bar by timestep: cosine and sine of an angle, which an export keeps in float32."""

    angle: Tensor

    def __init__(self, config: ArtvConfig) -> None:
        super().__init__()
        alpha_bar = torch.from_numpy(alphas_cumprod(*config.betas, config.timesteps))
        angle = torch.atan2((1 - alpha_bar).sqrt(), alpha_bar.sqrt())
        self.register_buffer("angle", angle.float(), persistent=False)

    def at(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """[streams] int64 -> two of [streams, 1, 1, 1]."""
        angle = self.angle[timesteps].reshape(-1, 1, 1, 1)
        return angle.cos(), angle.sin()


def static(noisy: Tensor, reference: Tensor, signal: Tensor, noise: Tensor, predicts: Prediction) -> Tensor:
    """What a network would predict that took the noisy latent for the reference with noise on it."""
    if predicts == "epsilon":
        return (noisy - signal * reference) / noise
    return (signal * noisy - reference) / noise


def mixed(mask: Tensor, still: Tensor, predicted: Tensor) -> Tensor:
    """The prediction of masked diffusion, in the terms in which both are; `predicted` may have branches of guidance in front."""
    return mask * still + (1 - mask) * predicted
