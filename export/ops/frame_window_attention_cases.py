"""The shapes that FrameWindowAttention is tested and timed on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class AttentionCase:
    """One set of shapes and attributes. `absent` and `empty`: frames and ring slots of stream 0 whose index is -1.

    Every further stream stands elsewhere: at another frame, with its ring turned further, with chunks that begin
    at another row and with other frames absent. Those of `absent_streams` are not there at all.
    """

    name: str
    branches: int = 2
    streams: int = 1
    frames: int = 8
    tokens: int = 4
    heads: int = 2
    head_dim: int = 64
    ring: int = 8
    chunk_frames: int = 1  # neighbours that share a level
    absent: tuple[int, ...] = ()
    empty: tuple[int, ...] = ()
    gains: bool = True
    first_index: int = 100
    reach: int = 0  # of mask "ranged"
    absent_streams: tuple[int, ...] = ()
    descending: bool = False  # levels fall along the window, so the causal mask is the other triangle
    attributes: dict[str, Any] = field(default_factory=dict)

    @property
    def batch(self) -> int:
        return self.branches * self.streams

    def __str__(self) -> str:
        return self.name

    def make_inputs(
        self, seed: int = 0, dtype: torch.dtype = torch.float64
    ) -> dict[str, torch.Tensor | None]:
        """Inputs by name; float data has bfloat16 values, so every dtype starts from the same numbers."""
        random = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=random).bfloat16().to(dtype)

        kept = (self.batch, self.ring, self.tokens, self.heads, self.head_dim)
        streams = [self._stream(stream) for stream in range(self.streams)]
        level, frame_index, ring_index = (torch.stack(rows) for rows in zip(*streams, strict=True))
        return {
            "qkv": normal(self.batch, self.frames, self.tokens, 3, self.heads, self.head_dim),
            "level": level,
            "frame_index": frame_index,
            "ring_key": normal(*kept),
            "ring_value": normal(*kept),
            "ring_index": ring_index,
            "q_gain": 1 + 0.1 * normal(self.head_dim) if self.gains else None,
            "k_gain": 1 + 0.1 * normal(self.head_dim) if self.gains else None,
            "reach": torch.full((self.streams, self.frames), self.reach) if self.reach else None,
        }

    def _stream(self, stream: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Level [F], frame index [F] and ring index [R] of one stream."""
        first = self.first_index + 17 * stream
        frame_index = torch.arange(self.frames) + first
        ring_index = torch.arange(self.ring) + first - self.ring
        if self.ring:
            ring_index = ring_index.roll(self.ring // 2 + stream)  # a ring that has wrapped
        gone = stream in self.absent_streams
        frame_index[[i for i in range(self.frames) if gone or (i - stream) % self.frames in self.absent]] = -1
        ring_index[[i for i in range(self.ring) if gone or (i - stream) % self.ring in self.empty]] = -1
        chunk = (torch.arange(self.frames) + stream) // self.chunk_frames
        level = (chunk / max(1, int(chunk.max()))).float()
        return level.flip(0) if self.descending else level, frame_index, ring_index


Case = AttentionCase
_NO_CHUNKS = {"mask": "bidirectional"}

CASES: tuple[AttentionCase, ...] = (
    Case("shapes", tokens=16, heads=4, chunk_frames=2, attributes={"rotary_dim": 64}),
    Case("one_frame_no_ring", frames=1, ring=0, attributes={"rotary_dim": 64}),
    Case(
        "one_frame_one_slot", frames=1, ring=1, tokens=1, branches=1, heads=1, attributes={"rotary_dim": 32}
    ),
    Case("head_40", head_dim=40, frames=7, ring=3, attributes={"rotary_dim": 40}),
    Case("head_72", head_dim=72, frames=20, ring=8, heads=3, chunk_frames=5, attributes={"rotary_dim": 72}),
    Case("head_72_odd", head_dim=72, frames=35, ring=0, chunk_frames=5, attributes={"rotary_dim": 24}),
    Case("head_128", head_dim=128, frames=5, ring=17, attributes={"rotary_dim": 128}),
    Case("head_6", head_dim=6, frames=3, ring=2, attributes={"rotary_dim": 4, "interleaved": 0}),
    Case("halves", head_dim=72, frames=9, attributes={"rotary_dim": 72, "interleaved": 0}),
    Case("halves_part", head_dim=64, frames=9, attributes={"rotary_dim": 20, "interleaved": 0}),
    Case("tokens_105", tokens=105, frames=3, ring=2, heads=1, head_dim=72, attributes={"rotary_dim": 72}),
    Case("plain", gains=False, attributes={"rotary_dim": 0, "scale": 0.2}),
    Case("bidirectional", frames=11, attributes={**_NO_CHUNKS, "rotary_dim": 64, "theta": 100.0}),
    Case("descending", frames=18, descending=True, attributes={"rotary_dim": 64}),
    Case("absent_and_empty", frames=7, absent=(0, 6), empty=(1, 4), attributes={"rotary_dim": 64}),
    Case("nothing_there", frames=3, ring=3, absent=(0, 1, 2), empty=(0, 1, 2), attributes={"rotary_dim": 8}),
    Case("empty_ring", frames=2, ring=4, empty=(0, 1, 2, 3), attributes={"rotary_dim": 64}),
    Case("ranged", frames=9, reach=4, chunk_frames=3, attributes={"mask": "ranged", "rotary_dim": 64}),
    Case("ranged_alone", frames=4, reach=-1, attributes={"mask": "ranged"}),  # fully masked rows
    Case("far_index", first_index=10**7, attributes={"rotary_dim": 64}),
    Case("frame", tokens=16, heads=4, chunk_frames=2, attributes={"scope": "frame", "rotary_dim": 64}),
    Case("frame_105", tokens=105, frames=3, ring=2, head_dim=72, attributes={"scope": "frame"}),
    Case(
        "frame_one", frames=1, ring=0, tokens=5, attributes={"scope": "frame", **_NO_CHUNKS, "rotary_dim": 64}
    ),
    Case("frame_one_token", tokens=1, head_dim=40, attributes={"scope": "frame", "rotary_dim": 40}),
    Case(
        "frame_absent", tokens=9, absent=(2,), empty=(0, 3), attributes={"scope": "frame", "rotary_dim": 64}
    ),
    Case(
        "frame_ranged", tokens=6, reach=3, attributes={"scope": "frame", "mask": "ranged", "rotary_dim": 64}
    ),
    Case(
        "frame_halves",
        tokens=33,
        head_dim=128,
        attributes={"scope": "frame", "rotary_dim": 72, "interleaved": 0},
    ),
    Case(  # a third of a head's channels turns with time; norms and the rest of the rotation come before
        "frame_wan",
        branches=1,
        frames=3,
        tokens=35,
        head_dim=128,
        ring=6,
        gains=False,
        chunk_frames=3,
        first_index=2000,
        attributes={"scope": "frame", "rotary_dim": 44},
    ),
    Case("streams_2", streams=2, chunk_frames=2, attributes={"rotary_dim": 64}),
    Case("streams_3", streams=3, branches=1, frames=7, ring=5, head_dim=40, attributes={"rotary_dim": 40}),
    Case(
        "streams_3_absent",
        streams=3,
        frames=5,
        ring=3,
        tokens=3,
        head_dim=72,
        absent=(0,),
        empty=(1,),
        absent_streams=(1,),
        attributes={"rotary_dim": 72},
    ),
    Case("streams_2_no_ring", streams=2, frames=6, ring=0, attributes={**_NO_CHUNKS, "rotary_dim": 24}),
    Case(
        "streams_3_ranged",
        streams=3,
        frames=9,
        reach=4,
        chunk_frames=3,
        attributes={"mask": "ranged", "rotary_dim": 64},
    ),
    Case("streams_2_alone", streams=2, frames=1, ring=0, tokens=1, heads=1, attributes={"rotary_dim": 8}),
    Case("streams_all_absent", streams=2, frames=3, ring=2, absent_streams=(0, 1)),
    Case(
        "frame_streams_2",
        streams=2,
        tokens=9,
        frames=4,
        ring=3,
        absent=(1,),
        attributes={"scope": "frame", "rotary_dim": 64},
    ),
    Case(
        "frame_streams_3",
        streams=3,
        branches=1,
        tokens=33,
        frames=3,
        ring=2,
        head_dim=72,
        absent_streams=(2,),
        attributes={"scope": "frame", **_NO_CHUNKS, "rotary_dim": 72, "interleaved": 0},
    ),
)

_SHAPES: dict[str, Any] = {
    "tokens": 16,
    "heads": 4,
    "ring": 8,
    "chunk_frames": 2,
    "attributes": {"rotary_dim": 64},
}
_WIDE: dict[str, Any] = {
    "tokens": 105, "heads": 16, "head_dim": 72, "chunk_frames": 5, "attributes": {"rotary_dim": 72},
}  # fmt: skip

BENCH_CASES: tuple[AttentionCase, ...] = (
    Case("shapes_8", frames=8, **_SHAPES),
    Case("shapes_10", frames=10, **_SHAPES),
    Case("wide_20", frames=20, ring=0, **_WIDE),
    Case("wide_20_ring", frames=20, ring=8, **_WIDE),
    Case("wide_35", frames=35, ring=0, **_WIDE),
    Case("wide_35_ring", frames=35, ring=8, **_WIDE),
    Case("frame_256", frames=8, tokens=256, heads=4, ring=8, attributes={"scope": "frame", "rotary_dim": 64}),
)

_GROUPS: dict[str, Any] = {"branches": 1, "heads": 2, "frames": 2, "ring": 2, "tokens": 70}
# Frames that fill the tiles of the CUDA kernel for warpgroups, whole and in part.
GROUP_CASES: tuple[AttentionCase, ...] = (
    Case("one_tile", branches=1, heads=1, frames=1, ring=0, tokens=128, attributes={"scope": "frame", "rotary_dim": 64}),
    Case("part_of_a_tile", **_GROUPS, attributes={"scope": "frame", "rotary_dim": 64}),
    Case("tiles_of_a_frame", branches=1, heads=1, frames=2, ring=1, tokens=200,
         attributes={"scope": "frame", "rotary_dim": 40}),
    Case("two_panels", branches=1, heads=1, frames=2, ring=1, tokens=131, head_dim=128,
         attributes={"scope": "frame", "rotary_dim": 128}),
    Case("no_gains", gains=False, **_GROUPS, attributes={"scope": "frame", "scale": 0.2}),
    Case("empty_slots", **{**_GROUPS, "ring": 3}, empty=(0, 2), absent=(0,),
         attributes={"scope": "frame", "rotary_dim": 64}),
    Case("halves_128", branches=1, heads=1, frames=3, ring=2, tokens=65, head_dim=128, reach=2,
         attributes={"scope": "frame", "mask": "ranged", "rotary_dim": 72, "interleaved": 0}),
)  # fmt: skip
