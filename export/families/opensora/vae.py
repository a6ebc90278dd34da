"""The two-stage video autoencoder of Open-Sora v1.2: chunks of 17 frames become 5 latent frames, each chunk on its own.

frames --2-D--> * 0.18215 --causal 3-D, 17 at a time--> (z - shift) / scale
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyengine.errors import ConfigError, ShapeError

from ...layers.frame_autoencoder import FrameAutoencoder
from .vae_temporal import TimeAutoencoder

SCALING_FACTOR = 0.18215
MICRO_BATCH = 4
SHIFT, SCALE = (-0.10, 0.34, 0.27, 0.98), (3.85, 2.32, 2.33, 3.06)
# Keys of either stage that change no result. The released config.json names classes instead of sizes; theirs are the defaults.
_IDLE = frozenset(
    {"type", "from_pretrained", "subfolder", "cache_dir", "local_files_only", "sample_size", "force_upcast"}
    | {"latents_mean", "latents_std", "shift_factor", "_class_name", "_diffusers_version", "_name_or_path"}
)
# Keys whose other values would be another network.
_ONLY: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "activation_fn": ("swish",),
    "mid_block_add_attention": (True,),
    "use_quant_conv": (True,),
    "use_post_quant_conv": (True,),
}
_BLOCK_TYPES = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}


class _Wrapped(nn.Module):
    """The checkpoint keeps the frame autoencoder one level deeper, as `spatial_vae.module`."""

    def __init__(self, module: FrameAutoencoder) -> None:
        super().__init__()
        self.module = module


class VideoAutoencoder(nn.Module):
    """`VideoAutoencoder(**config)`: config.json of the released model, or `spatial` and `temporal` with explicit sizes."""

    def __init__(
        self,
        spatial: Mapping[str, Any] | None = None,
        temporal: Mapping[str, Any] | None = None,
        micro_frame_size: int | None = 17,
        shift: Sequence[float] | float = SHIFT,
        scale: Sequence[float] | float = SCALE,
        vae_2d: Mapping[str, Any] | None = None,
        vae_temporal: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        frame = _sizes(spatial if spatial is not None else vae_2d)
        self.scaling_factor = float(frame.pop("scaling_factor", SCALING_FACTOR))
        batch = frame.pop("micro_batch_size", MICRO_BATCH)
        self.micro_batch_size: int | None = batch
        self.micro_frame_size = micro_frame_size
        if micro_frame_size is not None and micro_frame_size < 1:
            raise ConfigError(f"expected micro_frame_size of at least 1, or none, but got {micro_frame_size}")
        try:
            self.spatial_vae = _Wrapped(FrameAutoencoder(**frame))
            self.temporal_vae = TimeAutoencoder(**_sizes(temporal if temporal is not None else vae_temporal))
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"expected the sizes of an autoencoder but they do not fit ({error}); give Open-Sora's VAE v1.2"
            ) from error
        for name, values in (("scale", scale), ("shift", shift)):
            tensor = torch.tensor(values, dtype=torch.float32)
            self.register_buffer(name, tensor[None, :, None, None, None] if tensor.ndim else tensor)

    @property
    def chunk_latents(self) -> int | None:
        """Latents of a whole chunk."""
        return None if self.micro_frame_size is None else self.latents(self.micro_frame_size)

    def latents(self, frames: int) -> int:
        """Latent frames that so many frames become."""
        size, per = self.micro_frame_size or frames, self.temporal_vae.frames_per_latent
        whole, rest = divmod(frames, size)
        return whole * -(-size // per) + -(-rest // per)

    def encode(self, x: Tensor) -> Tensor:
        """Posterior mean of frames [B, 3, T, H, W] in [-1, 1] -> [B, 4, T', H / 8, W / 8]. Raises ShapeError."""
        _expect("frames", x, self.spatial_vae.module.encoder.conv_in.in_channels)
        return self.normalised(self.encode_time(self.encode_frames(x)))

    def decode(self, z: Tensor, num_frames: int) -> Tensor:
        """Frames [B, 3, num_frames, 8 h, 8 w] of latents [B, 4, T', h, w], not clipped. Raises ShapeError."""
        _expect("latents", z, self.temporal_vae.post_quant_conv.conv.in_channels)
        return self.decode_frames(self.decode_time(self.denormalised(z), num_frames))

    def encode_frames(self, x: Tensor) -> Tensor:
        """First stage: mean of each frame, scaled. [B, 3, T, H, W] -> [B, 4, T, h, w]"""
        moments = [self.spatial_vae.module.moments(part) for part in self._batches(x)]
        mean = torch.cat(moments).chunk(2, 1)[0] * self.scaling_factor
        return mean.unflatten(0, (x.shape[0], -1)).transpose(1, 2)

    def encode_time(self, x: Tensor) -> Tensor:
        """Second stage: mean of each chunk. [B, 4, T, h, w] -> [B, 4, T', h, w]"""
        chunks = x.split(self.micro_frame_size or x.shape[2], 2)
        return torch.cat([self.temporal_vae.moments(chunk).chunk(2, 1)[0] for chunk in chunks], 2)

    def decode_time(self, z: Tensor, num_frames: int) -> Tensor:
        """Second stage backwards, chunk by chunk. [B, 4, T', h, w] -> [B, 4, num_frames, h, w]"""
        size = self.micro_frame_size or num_frames
        parts = []
        for index, chunk in enumerate(z.split(self.chunk_latents or z.shape[2], 2)):
            parts.append(self.temporal_vae.decode(chunk, min(size, num_frames - index * size)))
        return torch.cat(parts, 2)

    def decode_frames(self, x: Tensor) -> Tensor:
        """First stage backwards. [B, 4, T, h, w] -> [B, 3, T, 8 h, 8 w]"""
        frames = [self.spatial_vae.module.decode(part / self.scaling_factor) for part in self._batches(x)]
        return torch.cat(frames).unflatten(0, (x.shape[0], -1)).transpose(1, 2)

    def normalised(self, z: Tensor) -> Tensor:
        return (z - self.get_buffer("shift")) / self.get_buffer("scale")

    def denormalised(self, z: Tensor) -> Tensor:
        return z * self.get_buffer("scale") + self.get_buffer("shift")

    def _batches(self, x: Tensor) -> tuple[Tensor, ...]:
        """All frames of all samples, a few at a time."""
        frames = x.transpose(1, 2).flatten(0, 1)
        return frames.split(self.micro_batch_size or len(frames))


def _expect(what: str, given: Tensor, channels: int) -> None:
    if given.ndim != 5 or given.shape[1] != channels or not given.shape[2]:
        raise ShapeError(
            f"[autoencoder] expected {what} [batch, {channels}, T, H, W] but got {list(given.shape)}"
        )


def _sizes(config: Mapping[str, Any] | None) -> dict[str, Any]:
    """The sizes in one stage's config. Raises ConfigError for what would be another network."""
    sizes = {}
    for name, value in (config or {}).items():
        allowed = _ONLY.get(name)
        if (allowed and value not in allowed) or (
            name in _BLOCK_TYPES and set(value) != {_BLOCK_TYPES[name]}
        ):
            raise ConfigError(
                f"expected an autoencoder with {name} {_BLOCK_TYPES.get(name) or allowed[0]} but got {value!r}; give Open-Sora's VAE v1.2"  # type: ignore[index]
            )
        if not (allowed or name in _BLOCK_TYPES or name in _IDLE):
            sizes[name] = value
    if (config or {}).get("type") == "VAE_Temporal":  # the class itself; VAE_Temporal_SD is the released one
        sizes.setdefault("temporal_downsample", (True, True, False))
    return sizes
