"""The released configurations: the `params` of their yaml files, and what the sampling scripts set."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pyengine.errors import ConfigError

_UNET_A: dict[str, Any] = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 256,
    "attention_resolutions": [8, 4, 2],
    "num_res_blocks": 3,
    "channel_mult": [1, 2, 3, 4],
    "num_heads": 4,
    "use_temporal_transformer": False,
    "kernel_size_t": 1,
    "padding_t": 0,
    "temporal_length": 4,
    "use_relative_position": True,
    "use_scale_shift_norm": True,
}
_UNET_B: dict[str, Any] = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "attention_resolutions": [4, 2, 1],
    "num_res_blocks": 2,
    "channel_mult": [1, 2, 4, 4],
    "num_heads": 8,
    "transformer_depth": 1,
    "context_dim": 768,
    "kernel_size_t": 1,
    "padding_t": 0,
    "use_temporal_transformer": True,
    "temporal_length": 16,
    "use_relative_position": True,
}
_AUTOENCODER_3D: dict[str, Any] = {"embed_dim": 4, "n_hiddens": 32, "downsample": [4, 8, 8], "z_channels": 4}
_AUTOENCODER_2D: dict[str, Any] = {
    "embed_dim": 4,
    "ddconfig": {"z_channels": 4, "ch": 128, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2},
}
_CONDITIONED = {"in_channels": 5, "num_classes": 251}


@dataclass(frozen=True)
class Configuration:
    """One released model. `clip_frames` latents of `channels` x 32 x 32, decoded 4 frames each, or 1 for text to video."""

    unet: dict[str, Any]
    autoencoder: dict[str, Any]
    scale_factor: float
    shift_factor: float
    betas: tuple[float, float] = (0.0015, 0.0155)
    clip_frames: int = 4
    is_text: bool = False
    method: dict[str, Any] = field(default_factory=dict)

    @property
    def frames_per_latent(self) -> int:
        return 1 if self.is_text else 4


def _long(**changes: Any) -> dict[str, Any]:
    return _UNET_A | _CONDITIONED | changes


CONFIGURATIONS: dict[str, Configuration] = {
    "sky": Configuration(_UNET_A, _AUTOENCODER_3D, 0.33422927, 1.4606637),
    "taichi": Configuration(_UNET_A, _AUTOENCODER_3D, 0.175733933, 0.03291025),
    "ucf": Configuration(_UNET_A, _AUTOENCODER_3D, 0.220142075, 0.5837740898),
    "sky_pred": Configuration(_long(), _AUTOENCODER_3D, 0.33422927, 1.4606637),
    "sky_interp": Configuration(
        _long(temporal_length=5), _AUTOENCODER_3D, 0.33422927, 1.4606637, clip_frames=5
    ),
    "text2video": Configuration(
        _UNET_B, _AUTOENCODER_2D, 0.18215, 0.0, (0.00085, 0.012), clip_frames=16, is_text=True
    ),
}


def configuration(name: str) -> Configuration:
    """A released configuration by name. Raises ConfigError."""
    if name not in CONFIGURATIONS:
        raise ConfigError(f"expected a configuration out of {', '.join(CONFIGURATIONS)} but got {name!r}")
    return CONFIGURATIONS[name]
