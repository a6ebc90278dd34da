"""STDiT3 as it is exported: a window of every stream, all guidance branches, temporal attention through our op.

The prompt enters as the keys and values of every block, which `TextProjector` computes once per prompt. Conditioning (size, frame rate) is
fixed at export, so its embeddings are constants of the graph.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...ops.frame_window_attention import frame_window_attention
from .layers import NORM_EPSILON, Block, RMSNorm, Rotary, modulate
from .stdit3 import STDiT3

BRANCHES = ("prompt", "null")
# Added to the scores of padding: exactly nothing is left after softmax, and bf16 stays free of NaN.
MASKED = -1e4
TIMESTEPS = 1000.0  # of level 1


class StreamingSTDiT3(nn.Module):
    """Velocity of the frames of a window. `ring`: whether context comes from cached keys and values beside what is in the window."""

    def __init__(
        self, model: STDiT3, latent: tuple[int, int], size: tuple[int, int], fps: float, ring: bool = False
    ) -> None:
        """latent: height and width of the latents; size: those of the video, which condition the model."""
        super().__init__()
        self.model, self.latent, self.has_ring = model, latent, ring
        config = model.config
        rows, columns = config.grid(*latent)
        self.tokens = rows * columns
        self.register_buffer("place_table", model.places(rows, columns, float(size[0]), float(size[1])))
        self.register_buffer("fps", torch.tensor([float(fps)]))

    def forward(
        self,
        latents: Tensor,
        level: Tensor,
        frame_index: Tensor,
        text_mask: Tensor,
        text_key: Sequence[Tensor],
        text_value: Sequence[Tensor],
        ring_index: Tensor | None = None,
        ring_key: Sequence[Tensor] | None = None,
        ring_value: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, ...]:
        """latents [streams, frames, c, h, w]; level [streams, frames] in 0..1; frame_index [streams, frames] int64; text_mask
        [branches, streams, words], 0 or MASKED; text_key and text_value one per block in running order, [branches, streams, heads,
        words, head size]; ring_* as FrameWindowAttention, one pair per temporal block, branch by branch. Returns the predicted
        velocity [branches, streams, frames, c, h, w], then with a ring key 0, value 0, key 1, ... of the window.
        """
        model, config = self.model, self.model.config
        branches = text_mask.shape[0]
        rate = model.fps_embedder(self.get_buffer("fps"))
        condition = model.t_embedder(level * TIMESTEPS) + rate
        condition = condition.expand(branches, -1, -1, -1)  # [branches, streams, frames, width]
        by_branch = model.t_block(condition)
        shared = by_branch.flatten(0, 1)  # [branches * streams, frames, 6 * width]
        bias = text_mask.flatten(0, 1)[:, None, None].to(latents.dtype)
        x = model.x_embedder(latents.transpose(1, 2)) + self.get_buffer("place_table")
        appended: list[Tensor] = []
        for index, (spatial, temporal) in enumerate(model.pairs()):
            if index == 0:
                # Nothing before the first prompt depends on the branch.
                x = spatial.spatial_attention(x, spatial.modulation(by_branch[0]))
                x = x.expand(branches, -1, -1, -1, -1).flatten(0, 1)
                mods = spatial.modulation(shared)
            else:
                mods = spatial.modulation(shared)
                x = spatial.spatial_attention(x, mods)
            x = spatial.after_attention(x, mods, *_text(text_key, text_value, 2 * index), bias)
            mods = temporal.modulation(shared)
            ring = (
                (ring_key[index], ring_value[index])
                if ring_key is not None and ring_value is not None
                else (None, None)
            )
            out, key, value = self._attend(temporal, x, mods, level, frame_index, (*ring, ring_index))
            x = x + mods[2] * temporal.attn.proj(out)
            x = temporal.after_attention(x, mods, *_text(text_key, text_value, 2 * index + 1), bias)
            appended += [key, value]
        values = model.final_layer.linear(model.final_layer.modulated(x, condition))
        video = model.unpatchify(values, (latents.shape[1], *self.latent))[:, :, : config.in_channels]
        prediction = video.transpose(2, 3)
        return (prediction, *appended) if self.has_ring else (prediction,)

    def _attend(
        self,
        block: Block,
        x: Tensor,
        mods: tuple[Tensor, ...],
        level: Tensor,
        frame_index: Tensor,
        ring: tuple[Tensor | None, Tensor | None, Tensor | None],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Every frame sees every other: PA-VDM runs the model bidirectionally, with positions counted from the oldest visible frame."""
        attn, config = block.attn, self.model.config
        packed = attn.qkv(modulate(x, mods[0], mods[1])).unflatten(
            -1, (3, config.num_heads, config.head_size)
        )
        gains = [norm.weight if isinstance(norm, RMSNorm) else None for norm in (attn.q_norm, attn.k_norm)]
        return frame_window_attention(
            packed,
            level,
            frame_index,
            *ring,
            q_gain=gains[0],
            k_gain=gains[1],
            scope="temporal",
            mask="bidirectional",
            theta=Rotary.THETA,
            rotary_dim=config.head_size,
            interleaved=True,
            epsilon=NORM_EPSILON,
        )


def _text(keys: Sequence[Tensor], values: Sequence[Tensor], index: int) -> tuple[Tensor, Tensor]:
    """Keys and values of one block as a batch, [branches * streams, heads, words, head size] each."""
    return keys[index].flatten(0, 1), values[index].flatten(0, 1)


class TextProjector(nn.Module):
    """Text states of a prompt to what the blocks read: keys and values of the prompt and of the learned null text."""

    def __init__(self, model: STDiT3, words: int) -> None:
        super().__init__()
        self.words = words
        self.y_embedder = model.y_embedder
        self.layers = nn.ModuleList(block.cross_attn.kv_linear for pair in model.pairs() for block in pair)
        self.heads = model.config.num_heads

    def forward(self, states: Tensor, words: Tensor) -> tuple[Tensor, ...]:
        """states [words, caption channels]; words [words] int64, 1 = a word, 0 = padding. Returns text_mask [branches, words], then
        text_key of every block, then text_value of every block, each [branches, heads, words, head size]. The null text has the
        prompt's length.
        """
        text = self.y_embedder(torch.stack((states, self.y_embedder.y_embedding[: self.words])))
        keys, values = [], []
        for layer in self.layers:
            key, value = layer(text).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
            keys.append(key)
            values.append(value)
        mask = (words == 0).to(states.dtype) * MASKED
        return (mask.expand(len(BRANCHES), -1), *keys, *values)
