"""The causal Wan transformer (Wan 2.1 as Self-Forcing, CausVid, Rolling Forcing and LongLive run it), by the names of its checkpoints.

Network and parameters are those of Wan2.1-T2V. What makes it causal is who sees whom, and that every frame has its own timestep. `forward`
takes a whole clip, as in training; `step` takes a few frames beside the cached keys and values of others. `streaming.py` has the form
that is exported. All return the flow, noise - clean; the engine's velocity is its negative.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyengine.errors import ConfigError, ShapeError

from ...ops.frame_window_attention import frame_window_attention
from .layers import Attend, Block, Head
from .rotary import THETA, rates, rotate_space, space_tables, time_channels

TIMESTEPS = 1000.0  # of level 1


@dataclass(frozen=True)
class WanConfig:
    """Sizes of the network, by the original's names."""

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    patch_size: tuple[int, int, int] = (1, 2, 2)
    text_len: int = 512
    in_dim: int = 16
    out_dim: int = 16
    freq_dim: int = 256
    text_dim: int = 4096
    eps: float = 1e-6

    @classmethod
    def of(cls, config: dict[str, Any]) -> WanConfig:
        """From keywords or a config.json. Raises ConfigError for another model or sizes that cannot be."""
        for name in ("qk_norm", "cross_attn_norm"):
            if config.get(name, True) is not True:
                raise ConfigError(f"expected {name} true, as in every Wan 2.1, but got {config[name]!r}")
        kind = config.get("model_type", "t2v")
        if kind != "t2v":
            raise ConfigError(
                f"expected a text-to-video model (model_type t2v) but got {kind!r}; causal checkpoints are made of Wan2.1-T2V"
            )
        names = {field.name for field in fields(cls)}
        known = {name: value for name, value in config.items() if name in names}
        known["patch_size"] = tuple(known.get("patch_size", cls.patch_size))
        try:
            made = cls(**known)
        except TypeError as error:
            raise ConfigError(f"expected the sizes of a Wan transformer but {error}") from error
        if len(made.patch_size) != 3 or made.patch_size[0] != 1 or min(made.patch_size) < 1:
            raise ConfigError(
                f"expected patch_size of one latent frame, such as [1, 2, 2], but got {list(made.patch_size)}"
            )
        if made.num_heads < 1 or made.dim % made.num_heads or made.head_size % 2 or made.head_size < 6:
            raise ConfigError(
                f"expected dim to be num_heads times an even head size of 6 or more but got dim {made.dim} with num_heads {made.num_heads}"
            )
        return made

    @property
    def head_size(self) -> int:
        return self.dim // self.num_heads

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of a latent. Raises ShapeError where they do not come out even."""
        _, high, wide = self.patch_size
        if height % high or width % wide:
            raise ShapeError(f"[wan] expected latents in patches of {high}x{wide} but got {height}x{width}")
        return height // high, width // wide


class CausalWan(nn.Module):
    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.config = c = WanConfig.of(config)
        self.patch_embedding = nn.Conv3d(c.in_dim, c.dim, c.patch_size, c.patch_size)
        self.text_embedding = nn.Sequential(
            nn.Linear(c.text_dim, c.dim), nn.GELU("tanh"), nn.Linear(c.dim, c.dim)
        )
        self.time_embedding = nn.Sequential(nn.Linear(c.freq_dim, c.dim), nn.SiLU(), nn.Linear(c.dim, c.dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(c.dim, 6 * c.dim))
        self.blocks = nn.ModuleList(Block(c.dim, c.ffn_dim, c.num_heads, c.eps) for _ in range(c.num_layers))
        self.head = Head(c.dim, c.patch_size[1] * c.patch_size[2] * c.out_dim, c.eps)

    def forward(
        self, x: Tensor, timestep: Tensor, context: Tensor, blocks: Sequence[int], local_frames: int = -1
    ) -> Tensor:
        """A whole clip without a cache.

        x [B, in_dim, F, h, w]; timestep [B, F] in 0..1000; context [B, text_len, text_dim], rows of zeros for padding, which is attended
        to; blocks: frames of each block, F in all. A frame sees the frames before the end of its block, with `local_frames` those alone
        that are less than so many before that end. -> flow [B, out_dim, F, h, w]
        """
        frames, grid = x.shape[2], self.config.grid(*x.shape[3:])
        if sum(blocks) != frames or min(blocks, default=0) < 1:
            raise ShapeError(f"[wan] expected blocks of {frames} frames in all but got {list(blocks)}")
        seen = clip_mask(blocks, local_frames)  # [F, F]
        tokens = grid[0] * grid[1]
        mask = seen.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1).to(x.device)
        cosine, sine = time_tables(torch.arange(frames), self.config.head_size, x)
        space = self.space(*grid, x)

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            query, key = (rotate_time(rotate_space(part, *space), cosine, sine) for part in (query, key))
            # [B, heads, F * N, head size]
            q, k, v = (part.flatten(1, 2).transpose(1, 2) for part in (query, key, value))
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
            return out.reshape(*query.shape[:3], -1)

        return self._flow(x, timestep, context, lambda _: attend)

    def step(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        frame_index: Tensor,
        ring_index: Tensor,
        ring_key: Sequence[Tensor],
        ring_value: Sequence[Tensor],
        mask: str = "noise_causal",
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """A few frames beside a ring of R slots of earlier ones.

        x [B, in_dim, f, h, w]; timestep [B, f]; context as in `forward`; frame_index [f] int64, absolute; ring_index [R] int64, -1 = empty
        slot; ring_key, ring_value: one [B, R, N, heads, head size] per block, keys as this method returned them. Frame i sees every filled
        slot and, "noise_causal", frame j where timestep_j <= timestep_i; "bidirectional" every j.
        -> flow, and keys and values of each block as a ring keeps them: keys normalised and rotated in space, not in time
        """
        batch, grid = x.shape[0], self.config.grid(*x.shape[3:])
        index = [part.expand(batch, -1) for part in (frame_index, ring_index)]
        space = self.space(*grid, x)
        keys: list[Tensor] = []
        values: list[Tensor] = []

        def attend_at(block: int) -> Attend:
            def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
                window = pack(query, key, value, space)
                out, kept, plain = frame_window_attention(
                    window,
                    timestep / TIMESTEPS,
                    index[0],
                    ring_key[block],
                    ring_value[block],
                    index[1],
                    **attention_attributes(self.config, mask),
                )
                keys.append(kept)
                values.append(plain)
                return out

            return attend

        return self._flow(x, timestep, context, attend_at), keys, values

    def _flow(
        self, x: Tensor, timestep: Tensor, context: Tensor, attend_at: Callable[[int], Attend]
    ) -> Tensor:
        frames = x.transpose(1, 2)  # [B, F, c, h, w]
        e, e0 = self.time(timestep)
        text = self.text(context)
        tokens = self.patches(frames)
        for number, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            tokens = block(tokens, block.modulation + e0, block.cross_attn.text(text), attend_at(number))
        flow = self.head(tokens, self.head.modulation + e[:, :, None])
        return self.unpatchify(flow, *self.config.grid(*x.shape[3:])).transpose(1, 2)

    def time(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """timestep [B, F] -> the embedding [B, F, width], and the six tables that every block adds to its own [B, F, 6, width]."""
        vector = sinusoid(timestep, self.config.freq_dim).to(self.patch_embedding.weight.dtype)
        e = self.time_embedding(vector)
        return e, self.time_projection(e).unflatten(-1, (6, -1))

    def text(self, context: Tensor) -> Tensor:
        """States [B, L, text_dim], L up to text_len -> [B, text_len, width]. Padding becomes the same vector everywhere, not zero."""
        missing = self.config.text_len - context.shape[1]
        return self.text_embedding(F.pad(context, (0, 0, 0, missing)) if missing else context)

    def patches(self, frames: Tensor) -> Tensor:
        """[B, F, c, h, w] -> [B, F, tokens, width]"""
        weight = self.patch_embedding.weight.squeeze(2)
        stride = self.config.patch_size[1:]
        flat = F.conv2d(frames.flatten(0, 1), weight, self.patch_embedding.bias, stride)
        return flat.flatten(2).transpose(1, 2).unflatten(0, frames.shape[:2])

    def unpatchify(self, values: Tensor, rows: int, columns: int) -> Tensor:
        """[B, F, tokens, values of a patch] -> [B, F, out_dim, h, w]. Of a patch the channel is what varies fastest."""
        _, high, wide = self.config.patch_size
        split = values.unflatten(-1, (high, wide, self.config.out_dim)).unflatten(2, (rows, columns))
        return split.permute(0, 1, 6, 2, 4, 3, 5).flatten(5).flatten(3, 4)

    def space(self, rows: int, columns: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine of height and width in the dtype of `like`, which for half precision is float32."""
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        cosine, sine = space_tables(rows, columns, self.config.head_size)
        return cosine.to(like.device, dtype), sine.to(like.device, dtype)


def attention_attributes(config: WanConfig, mask: str) -> dict[str, Any]:
    """How our op is used: no gains, since q and k are normalised over the whole width before it."""
    return {
        "scope": "frame",
        "mask": mask,
        "theta": THETA,
        "rotary_dim": time_channels(config.head_size),
        "interleaved": True,
        "epsilon": config.eps,
    }


def pack(query: Tensor, key: Tensor, value: Tensor, space: tuple[Tensor, Tensor]) -> Tensor:
    """What our op takes, q and k rotated in space: [B, F, N, 3, heads, head size]"""
    turned = (rotate_space(part, *space).to(value.dtype) for part in (query, key))
    return torch.stack((*turned, value), 3)


def sinusoid(timestep: Tensor, channels: int) -> Tensor:
    """Cosines, then sines, of a timestep that need not be whole. float64 [..., channels]"""
    half = channels // 2
    rate = torch.pow(
        torch.tensor(10000.0, dtype=torch.float64, device=timestep.device),
        -torch.arange(half, dtype=torch.float64, device=timestep.device) / half,
    )
    angle = timestep.double()[..., None] * rate
    return torch.cat((angle.cos(), angle.sin()), -1)


def time_tables(positions: Tensor, head_size: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of frame numbers [F]. [F, 1, 1, pairs]"""
    angles = (positions.double()[:, None] * rates(time_channels(head_size)))[:, None, None]
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return angles.cos().to(like.device, dtype), angles.sin().to(like.device, dtype)


def rotate_time(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """x [B, F, N, heads, head size] with its first channels rotated by the frame's number."""
    pairs = cosine.shape[-1]
    first, second = x[..., : 2 * pairs].unflatten(-1, (pairs, 2)).unbind(-1)
    turned = torch.stack((first * cosine - second * sine, second * cosine + first * sine), -1)
    return torch.cat((turned.flatten(-2), x[..., 2 * pairs :]), -1)


def clip_mask(blocks: Sequence[int], local_frames: int) -> Tensor:
    """[F, F] bool: which frames (columns) each frame (row) of a clip sees."""
    ends = torch.tensor([end for end, size in zip(_ends(blocks), blocks, strict=True) for _ in range(size)])
    frame = torch.arange(len(ends))
    seen = frame[None] < ends[:, None]
    return seen & (frame[None] >= ends[:, None] - local_frames) if local_frames > 0 else seen


def _ends(blocks: Sequence[int]) -> list[int]:
    return [sum(blocks[: index + 1]) for index in range(len(blocks))]
