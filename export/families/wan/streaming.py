"""The transformer as it is exported: a window of every stream, all attention through our op, and nothing computed twice.

- The prompt enters as keys and values of every block, which `TextProjector` computes once per prompt.
- A network of few steps sees few timesteps: what every block makes of them is a table, of which each frame takes the row of its level.
- Height and width are rotated before the op, so a ring keeps keys that only time still turns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...ops.frame_window_attention import frame_window_attention
from .causal_wan import CausalWan, WanConfig, attention_attributes, pack, sinusoid
from .layers import Attend, Block
from .rotary import space_tables

BRANCHES = ("prompt",)
Read = Callable[[str], Tensor]


class Tables(NamedTuple):
    """What the network makes of its timesteps, one row per level, lowest first: [T, 6, width] of every block, [T, 2, width] of the head."""

    blocks: tuple[Tensor, ...]
    head: Tensor

    @classmethod
    def of(cls, read: Read, config: WanConfig, timesteps: Sequence[float]) -> Tables:
        """From the weights by name, in float64."""

        def linear(x: Tensor, name: str) -> Tensor:
            return F.linear(x, read(f"{name}.weight").double(), read(f"{name}.bias").double())

        vector = sinusoid(torch.tensor(timesteps, dtype=torch.float64), config.freq_dim)
        e = linear(F.silu(linear(vector, "time_embedding.0")), "time_embedding.2")
        e0 = linear(F.silu(e), "time_projection.1").unflatten(-1, (6, -1))
        blocks = (read(f"blocks.{index}.modulation").double() + e0 for index in range(config.num_layers))
        head = read("head.modulation").double() + e[:, None]
        return cls(tuple(table.float() for table in blocks), head.float())


class StreamingWan(nn.Module):
    """Velocity (clean - noise) of the frames of a window, and the keys and values that the ring keeps of them."""

    def __init__(
        self,
        model: CausalWan,
        tables: Tables,
        latent: tuple[int, int],
        levels: Sequence[float],
        mask: str = "noise_causal",
    ) -> None:
        """latent: height and width; levels: those of the tables' rows, rising; mask: between the rows of a window, as of our op."""
        super().__init__()
        self.model = model
        self.grid = model.config.grid(*latent)
        self.attributes = attention_attributes(model.config, mask)
        self.register_buffer("borders", (torch.tensor(levels[1:]) + torch.tensor(levels[:-1])) / 2)
        for index, table in enumerate(tables.blocks):
            self.register_buffer(f"table_{index}", table)
        self.register_buffer("head_table", tables.head)
        for name, part in zip(
            ("cosine", "sine"), space_tables(*self.grid, model.config.head_size), strict=True
        ):
            self.register_buffer(name, part.float())

    def forward(
        self,
        latents: Tensor,
        level: Tensor,
        frame_index: Tensor,
        ring_index: Tensor,
        ring_key: Sequence[Tensor],
        ring_value: Sequence[Tensor],
        text_key: Sequence[Tensor],
        text_value: Sequence[Tensor],
    ) -> tuple[Tensor, ...]:
        """latents [streams, frames, c, h, w]; level, frame_index [streams, frames]; ring_index [streams, ring]; ring_key, ring_value one
        [branches * streams, ring, tokens, heads, head size] per block; text_key, text_value one [branches, streams, heads, words, head
        size] per block. A level takes the row of the nearest of the tables' levels.

        Returns the velocity [branches, streams, frames, c, h, w], then key and value of every block.
        """
        branches = text_key[0].shape[0]
        row = (level[..., None] > self.get_buffer("borders")).long().sum(-1)
        row = row.expand(branches, -1, -1).flatten(0, 1)  # [branches * streams, frames]
        x = self.model.patches(latents).expand(branches, -1, -1, -1, -1).flatten(0, 1)
        space = (self.get_buffer("cosine"), self.get_buffer("sine"))
        kept: list[Tensor] = []

        def attend_at(index: int) -> Attend:
            def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
                out, new_key, new_value = frame_window_attention(
                    pack(query, key, value, space),
                    level,
                    frame_index,
                    ring_key[index],
                    ring_value[index],
                    ring_index,
                    **self.attributes,
                )
                kept.extend((new_key, new_value))
                return out

            return attend

        for index, block in enumerate(self.model.blocks):
            assert isinstance(block, Block)
            modulation = self.get_buffer(f"table_{index}")[row]
            text = (text_key[index].flatten(0, 1), text_value[index].flatten(0, 1))
            x = block(x, modulation, text, attend_at(index))
        flow = self.model.head(x, self.get_buffer("head_table")[row])
        velocity = -self.model.unpatchify(flow, *self.grid)
        return (velocity.unflatten(0, (branches, -1)), *kept)


class TextProjector(nn.Module):
    """Text states of a prompt to the keys and values of every block. Padding is zero before the projection, and stays visible."""

    def __init__(self, model: CausalWan) -> None:
        super().__init__()
        self.text_embedding = model.text_embedding
        self.layers = nn.ModuleList([block.cross_attn for block in model.blocks if isinstance(block, Block)])

    def forward(self, states: Tensor, words: Tensor) -> tuple[Tensor, ...]:
        """states [words, text_dim]; words [words] int64, 1 = a word, 0 = padding. Returns text_key of every block, then text_value of
        every block, each [1 branch, heads, words, head size].
        """
        text = self.text_embedding(states * (words != 0).to(states.dtype)[:, None])[None]
        keys, values = zip(*(layer.text(text) for layer in self.layers), strict=True)  # type: ignore[operator]
        return (*keys, *values)
