"""STDiT3, the denoiser of Open-Sora v1.2, as its checkpoint names it: `STDiT3(**config)` takes the keys of config.json.

One timestep per sample, as Open-Sora samples, or one per frame, as PA-VDM does (arXiv:2410.08151, section 3): the only change is that the
modulation differs from frame to frame. `streaming.py` has the form that is exported; this one is the reference, and returns what the
original returns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from pyengine.errors import ConfigError, ShapeError

from .layers import (
    Block,
    CaptionEmbedder,
    FinalLayer,
    PatchEmbedder,
    Rotary,
    SinusoidEmbedder,
    place_embedding,
)

Numbers = Tensor | Sequence[float] | float


@dataclass(frozen=True)
class STDiT3Config:
    """What of config.json shapes the network. Keys that matter in training or to a kernel alone are accepted and change nothing."""

    in_channels: int = 4
    patch_size: tuple[int, int, int] = (1, 2, 2)
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    pred_sigma: bool = True
    caption_channels: int = 4096
    model_max_length: int = 300
    qk_norm: bool = True
    input_sq_size: int = 512
    skip_y_embedder: bool = False

    @classmethod
    def of(cls, config: dict[str, Any]) -> STDiT3Config:
        """From the keys of a config.json. Raises ConfigError for another model or sizes that cannot be."""
        kind = config.get("model_type", "STDiT3")
        if kind != "STDiT3":
            raise ConfigError(
                f"expected a config of model_type STDiT3 but got {kind!r}; give Open-Sora v1.2's checkpoint"
            )
        names = {field.name for field in fields(cls)}
        known = {name: value for name, value in config.items() if name in names}
        patch = known.setdefault("patch_size", cls.patch_size)
        if not isinstance(patch, Sequence) or len(patch) != 3 or min(patch) < 1:
            raise ConfigError(
                f"expected patch_size of time, height and width, such as [1, 2, 2], but got {patch!r}"
            )
        made = cls(**{**known, "patch_size": tuple(patch)})
        if made.num_heads < 1 or made.hidden_size % made.num_heads or made.hidden_size % 4:
            raise ConfigError(
                "expected hidden_size to be a multiple of 4 and of num_heads but got "
                f"hidden_size {made.hidden_size} with num_heads {made.num_heads}"
            )
        return made

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def out_channels(self) -> int:
        """Velocity, then with `pred_sigma` as many channels that no sampler reads."""
        return self.in_channels * (2 if self.pred_sigma else 1)

    def grid(self, *size: int) -> tuple[int, ...]:
        """Patches along time, height and width (or the last of these) of a latent of that size."""
        return tuple(
            -(-extent // patch) for extent, patch in zip(size, self.patch_size[-len(size) :], strict=True)
        )


class STDiT3(nn.Module):
    """Velocity x0 - eps of a latent video."""

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.config = c = STDiT3Config.of(config)
        width = c.hidden_size
        self.rope = Rotary(c.head_size)
        self.x_embedder = PatchEmbedder(c.patch_size, c.in_channels, width)
        self.t_embedder, self.fps_embedder = SinusoidEmbedder(width), SinusoidEmbedder(width)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.y_embedder = CaptionEmbedder(c.caption_channels, width, c.model_max_length)
        block = (width, c.num_heads, c.mlp_ratio, c.qk_norm)
        self.spatial_blocks = nn.ModuleList(Block(*block) for _ in range(c.depth))
        self.temporal_blocks = nn.ModuleList(Block(*block) for _ in range(c.depth))
        time, height, width_ = c.patch_size
        self.final_layer = FinalLayer(width, time * height * width_ * c.out_channels)

    def pairs(self) -> list[tuple[Block, Block]]:
        """Each spatial block with the temporal one that follows it."""
        both = zip(self.spatial_blocks, self.temporal_blocks, strict=True)
        return [(s, t) for s, t in both if isinstance(s, Block) and isinstance(t, Block)]

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        y: Tensor,
        mask: Tensor | Sequence[int] | None = None,
        x_mask: Tensor | None = None,
        fps: Numbers | None = None,
        height: Numbers | None = None,
        width: Numbers | None = None,
        **_: Any,
    ) -> Tensor:
        """x [B, C, T, H, W]; timestep [B] or [B, T] in 0..1000; y [B, 1, L, caption_channels]; mask [B or 1, L], 1 = word.

        fps, height, width [B] or [1]: conditioning, the size of the first sample counts. x_mask [B, T] bool: False = that frame is
        clean, at timestep 0. With skip_y_embedder y is [1, sum of words, hidden_size] and mask the number of words of each sample.
        Returns float32 [B, out_channels, T, H, W].
        """
        if fps is None or height is None or width is None:
            raise ConfigError(
                "[stdit3] expected fps, height and width but got None; give the conditioning size of the video"
            )
        config = self.config
        _expect(
            "x",
            x,
            x.ndim == 5 and x.shape[1] == config.in_channels,
            f"[batch, {config.in_channels}, T, H, W]",
        )
        dtype, batch, size = self.x_embedder.proj.weight.dtype, x.shape[0], tuple(x.shape[2:])
        frames, rows, columns = config.grid(*size)
        fits = tuple(timestep.shape) in ((batch,), (batch, frames))
        _expect("timestep", timestep, fits, f"[{batch}] or [{batch}, {frames}]")
        channels = config.hidden_size if config.skip_y_embedder else config.caption_channels
        _expect("y", y, y.shape[-1] == channels, f"[{batch}, 1, words, {channels}]")
        timestep = timestep.to(dtype).reshape(batch, -1)  # [B, T or 1]
        rate = self.fps_embedder(self._rate(fps, batch, x.device))[:, None]  # [B, 1, width]
        condition = self.t_embedder(timestep) + rate
        shared = self.t_block(condition)
        clean = None
        if x_mask is not None:
            fits = x_mask.ndim == 2 and x_mask.shape[0] in (1, batch) and x_mask.shape[1] in (1, frames)
            _expect("x_mask", x_mask, fits, f"[{batch} or 1, {frames} or 1]")
            x_mask = x_mask.bool().expand(batch, frames)
            clean = self.t_embedder(torch.zeros_like(timestep)) + rate
            shared = torch.where(x_mask[..., None], shared, self.t_block(clean))
        text, bias = self.encode_text(y.to(dtype), mask, batch)
        tokens = self.x_embedder(x.to(dtype))
        tokens = tokens + self.places(rows, columns, _first(height), _first(width), x.device)
        for spatial, temporal in self.pairs():
            mods = spatial.modulation(shared)
            tokens = spatial.spatial_attention(tokens, mods)
            tokens = spatial.after_attention(tokens, mods, *spatial.cross_attn.keys_values(text), bias)
            mods = temporal.modulation(shared)
            tokens = temporal.temporal_attention(tokens, mods, self.rope)
            tokens = temporal.after_attention(tokens, mods, *temporal.cross_attn.keys_values(text), bias)
        final = self.final_layer.modulated(tokens, condition)
        if x_mask is not None and clean is not None:
            # The original modulates clean frames on top of the noisy modulation; samplers discard them.
            final = torch.where(x_mask[..., None, None], final, self.final_layer.modulated(final, clean))
        return self.unpatchify(self.final_layer.linear(final), size).float()

    def places(
        self, rows: int, columns: int, height: float, width: float, device: torch.device | None = None
    ) -> Tensor:
        """The table that is added to every frame. [rows * columns, hidden_size]"""
        scale = (height * width) ** 0.5 / self.config.input_sq_size
        dtype = self.x_embedder.proj.weight.dtype
        return place_embedding(rows, columns, self.config.hidden_size, scale, dtype, device)

    def unpatchify(self, values: Tensor, size: tuple[int, ...]) -> Tensor:
        """[..., T', S', patch * channels], channels last -> [..., channels, *size], padding cut off."""
        grid, (time, high, wide) = self.config.grid(*size), self.config.patch_size
        split = values.unflatten(-1, (time, high, wide, self.config.out_channels)).unflatten(-5, grid[1:])
        lead = split.dim() - 7
        order = (*range(lead), *(lead + axis for axis in (6, 0, 3, 1, 4, 2, 5)))
        joined = split.permute(order).flatten(-2).flatten(-3, -2).flatten(-4, -3)
        return joined[..., : size[0], : size[1], : size[2]]

    def encode_text(
        self, y: Tensor, mask: Tensor | Sequence[int] | None, batch: int
    ) -> tuple[Tensor, Tensor | None]:
        """Projected text [B, L, hidden_size], and what is added to the scores of its words, [B, 1, 1, L]."""
        if self.config.skip_y_embedder:
            return self._unpack(y, mask, batch)
        text = self.y_embedder(y).squeeze(1)
        if mask is None:
            return text, None
        seen = torch.as_tensor(mask, device=y.device)
        words = text.shape[1]
        fits = seen.ndim > 1 and seen.shape[-1] == words and batch % seen.shape[0] == 0
        _expect("mask", seen, fits, f"[{batch} or 1, {words}]")
        seen = seen.reshape(seen.shape[0], -1).repeat(batch // seen.shape[0], 1)
        return text, _bias(seen != 0, text.dtype)

    def _unpack(
        self, y: Tensor, lengths: Tensor | Sequence[int] | None, batch: int
    ) -> tuple[Tensor, Tensor | None]:
        """Text that was embedded before, samples one after another, as rows of equal length."""
        rows = y.reshape(-1, self.config.hidden_size)
        if lengths is None:  # as in the original, every sample then reads the whole of it
            return rows.expand(batch, -1, -1), None
        counts = [int(n) for n in torch.as_tensor(lengths)]
        parts = rows.split(counts)
        text = nn.utils.rnn.pad_sequence(list(parts), batch_first=True)
        seen = torch.arange(text.shape[1]) < torch.tensor(counts)[:, None]
        return text, _bias(seen.to(y.device), text.dtype)

    def _rate(self, fps: Numbers, batch: int, device: torch.device) -> Tensor:
        rate = torch.as_tensor(fps, device=device).reshape(-1)
        _expect("fps", rate, len(rate) > 0 and batch % len(rate) == 0, f"[{batch}] or [1]")
        return rate.repeat(batch // len(rate))


def _expect(name: str, given: Tensor, fits: bool, shape: str) -> None:
    if not fits:
        raise ShapeError(f"[stdit3] expected {name} {shape} but got {list(given.shape)}")


def _bias(seen: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, -torch.inf)[
        :, None, None
    ]


def _first(numbers: Numbers) -> float:
    return float(torch.as_tensor(numbers).reshape(-1)[0])
