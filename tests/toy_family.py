"""A family small enough to export in a few seconds, with everything that a real one has.

Levels per frame through a time embedding, FrameWindowAttention in every layer, spatial and text attention, a
streaming decoder with explicit state, a text encoder.
"""

from __future__ import annotations

import functools
import math
import shutil
from pathlib import Path

import numpy as np
import torch
from run_folder import made_once
from torch import Tensor, nn
from torch.nn import functional as F

from pyengine.bundle.bundle import Bundle, Latent, TensorSpec, Text, Video, write_manifest
from pyengine.bundle.variant import Variant
from pyengine.export.graph import WeightStore, export_component, round_weights
from pyengine.export.ops.frame_window_attention import frame_window_attention

WIDTH, HEADS, DEPTH = 32, 2, 2
HEAD = WIDTH // HEADS
CHANNELS, SIDE, TOKENS, WORDS = 4, 4, 6, 10
FRAMES, RING = 4, 3
BRANCHES, STREAMS = 2, 1
EXAMPLE_STREAMS = 2  # an axis that a build chooses has at least two in the example
SIZES = {"branches": BRANCHES, "streams": STREAMS, "ring": RING}
DENOISER = Variant.of("denoiser", frames=FRAMES, **SIZES)
WIDER = Variant.of("denoiser", frames=FRAMES + 1, **SIZES)
DECODER = Variant.of("decoder", chunk=2)
TEXT_ENCODER = Variant.of("text_encoder")


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    return (scores if bias is None else scores + bias).softmax(-1) @ value


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.modulation = nn.Linear(WIDTH, 3 * WIDTH)
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.spatial_qkv, self.spatial_out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.text_query, self.text_out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.q_gain, self.k_gain = nn.Parameter(torch.rand(HEAD) + 0.5), nn.Parameter(torch.rand(HEAD) + 0.5)

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        level: Tensor,
        frame_index: Tensor,
        ring: tuple[Tensor, Tensor, Tensor],
        text: tuple[Tensor, Tensor, Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        batch, frames, tokens, width = x.shape
        shift, scale, gate = self.modulation(time)[:, :, None].chunk(3, -1)
        packed = (
            self.spatial_qkv(self.norm(x))
            .reshape(batch, frames, tokens, 3, HEADS, HEAD)
            .permute(3, 0, 1, 4, 2, 5)
        )
        x = x + self.spatial_out(attend(*packed.unbind(0)).transpose(2, 3).flatten(3))
        qkv = self.qkv(self.norm(x) * (1 + scale) + shift).reshape(batch, frames, tokens, 3, HEADS, HEAD)
        out, key, value = frame_window_attention(
            qkv, level, frame_index, *ring, self.q_gain, self.k_gain, theta=100.0, rotary_dim=8
        )
        x = x + gate * self.out(out)
        query = self.text_query(x).reshape(batch, -1, HEADS, HEAD).transpose(1, 2)
        read = attend(query, text[0], text[1], text[2]).transpose(1, 2).reshape(batch, frames, tokens, width)
        return x + self.text_out(read), key, value


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project, self.read_out = nn.Linear(CHANNELS, WIDTH), nn.Linear(WIDTH, CHANNELS)
        self.time_in, self.time_out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.place = nn.Parameter(torch.randn(SIDE * SIDE, WIDTH) * 0.1)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.register_buffer("frequency", torch.exp(-math.log(1e4) * torch.arange(WIDTH // 2) / (WIDTH // 2)))

    def forward(
        self,
        latents: Tensor,
        level: Tensor,
        frame_index: Tensor,
        ring_index: Tensor,
        ring_key: list[Tensor],
        ring_value: list[Tensor],
        text_key: Tensor,
        text_value: Tensor,
        text_mask: Tensor,
    ) -> tuple[Tensor, ...]:
        branches, streams, _ = text_mask.shape
        angle = level[..., None] * 1000 * self.frequency
        time = F.silu(self.time_out(F.silu(self.time_in(torch.cat((angle.cos(), angle.sin()), -1)))))
        time = time.expand(branches, -1, -1, -1).flatten(0, 1)
        x = self.project(latents.flatten(3).transpose(2, 3)) + self.place
        x = x.expand(branches, -1, -1, -1, -1).flatten(0, 1)
        bias = torch.where(text_mask, 0.0, -1e4).to(x.dtype).flatten(0, 1)[:, None, None]
        keys, values = [], []
        for i, block in enumerate(self.blocks):
            ring = (ring_key[i], ring_value[i], ring_index)
            text = (text_key[i].flatten(0, 1), text_value[i].flatten(0, 1), bias)
            x, key, value = block(x, time, level, frame_index, ring, text)
            keys.append(key)
            values.append(value)
        x = x.unflatten(0, (branches, streams))
        prediction = self.read_out(x).transpose(3, 4).unflatten(-1, (SIDE, SIDE))
        return prediction, *keys, *values


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mix = nn.Conv2d(CHANNELS, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.pixel = nn.Conv2d(16, 3 * 4 * 4, 3, padding=1)

    def forward(self, latents: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        stem = F.silu(self.stem(latents))
        x = stem + self.mix(torch.cat((memory, stem[:-1])))
        frames = F.pixel_shuffle(self.pixel(F.silu(x)), 2).reshape(-1, 3, 2 * SIDE, 2 * SIDE)
        return ((torch.tanh(frames) + 1) * 127.5).round().permute(0, 2, 3, 1).to(torch.uint8), stem[-1:]


class TextEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.key, self.value = nn.Linear(WIDTH, DEPTH * WIDTH), nn.Linear(WIDTH, DEPTH * WIDTH)

    def forward(self, token_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        both = torch.stack((token_ids, torch.zeros_like(token_ids)))
        words = self.words(both)
        split = (2, TOKENS, DEPTH, HEADS, HEAD)
        key, value = (layer(words).reshape(split).permute(2, 0, 3, 1, 4) for layer in (self.key, self.value))
        return key, value, both >= 0


def modules() -> dict[str, tuple[nn.Module, dict[str, Tensor | list[Tensor]]]]:
    """Every component with example inputs; the same weights at every call."""
    torch.manual_seed(0)
    ring = [torch.randn(BRANCHES * EXAMPLE_STREAMS, RING, SIDE * SIDE, HEADS, HEAD) for _ in range(2 * DEPTH)]
    text = [torch.randn(DEPTH, BRANCHES, EXAMPLE_STREAMS, HEADS, TOKENS, HEAD) for _ in range(2)]
    first = 7 * torch.arange(EXAMPLE_STREAMS)[:, None]
    inputs: dict[str, Tensor | list[Tensor]] = {
        "latents": torch.randn(EXAMPLE_STREAMS, FRAMES, CHANNELS, SIDE, SIDE),
        "level": torch.linspace(0.0, 0.999, FRAMES).repeat(EXAMPLE_STREAMS, 1),
        "frame_index": torch.arange(RING, RING + FRAMES) + first,
        "ring_index": torch.tensor([1, 2, -1]).repeat(EXAMPLE_STREAMS, 1),
        "ring_key": ring[:DEPTH],
        "ring_value": ring[DEPTH:],
        "text_key": text[0],
        "text_value": text[1],
        "text_mask": torch.ones(BRANCHES, EXAMPLE_STREAMS, TOKENS, dtype=torch.bool),
    }
    decoder_inputs: dict[str, Tensor | list[Tensor]] = {
        "latents": torch.randn(2, CHANNELS, SIDE, SIDE),
        "memory": torch.randn(1, 16, SIDE, SIDE),
    }
    return {
        "denoiser": (round_weights(Denoiser()).eval(), inputs),
        "decoder": (round_weights(Decoder()).eval(), decoder_inputs),
        "text_encoder": (round_weights(TextEncoder()).eval(), {"token_ids": torch.arange(TOKENS)}),
    }


def export(folder: Path) -> Bundle:
    """Exports the family into an empty folder."""
    parts, store = modules(), WeightStore()
    ring = {f"ring_{kind}.{i}": f"{kind}.{i}" for kind in ("key", "value") for i in range(DEPTH)}
    frames = {name: {0: "streams", 1: "frames"} for name in ("latents", "level", "frame_index")}
    kept = {0: "branches*streams", 1: "ring"}
    slots = {"ring_index": {0: "streams", 1: "ring"}, "ring_key": kept, "ring_value": kept}
    text = {f"text_{name}": {1: "branches", 2: "streams"} for name in ("key", "value")}
    text["text_mask"] = {0: "branches", 1: "streams"}
    components = {
        "denoiser": export_component(
            *parts["denoiser"],
            folder=folder,
            name="denoiser",
            store=store,
            outputs=[
                "prediction",
                *[f"key.{i}" for i in range(DEPTH)],
                *[f"value.{i}" for i in range(DEPTH)],
            ],
            dynamic=frames | slots | text,
            ring=ring,
            working=["text_key", "text_value"],
        ),
        "decoder": export_component(
            *parts["decoder"],
            folder=folder,
            name="decoder",
            store=store,
            outputs=["frames", "memory.out"],
            dynamic={"latents": {0: "chunk"}},
            state={"memory": "memory.out"},
            working=["memory*"],
        ),
        "text_encoder": export_component(
            *parts["text_encoder"],
            folder=folder,
            name="text_encoder",
            store=store,
            outputs=["text_key", "text_value", "text_mask"],
            working=["text_key", "text_value"],
        ),
    }
    store.write(folder)
    (folder / "tokenizer.json").write_text("{}\n")
    return write_manifest(
        folder,
        name="toy",
        family="toy",
        version="1",
        components=components,
        video=Video(8, 8, 24.0, 4),
        latent=Latent(CHANNELS, SIDE, SIDE),
        text=Text("tokenizer.json", TOKENS),
        method={"name": "progressive"},
    )


@functools.cache
def bundle() -> Bundle:
    """The exported family: made once in a run of the tests, not to be changed."""
    return Bundle.load(made_once("toy", export))


def bundle_copy(folder: Path) -> Path:
    """A copy of the bundle that a test may damage."""
    shutil.copytree(bundle().folder, folder)
    return folder


@functools.cache  # torch's global generator makes them: not something for two threads at once
def numpy_inputs(name: str) -> dict[str, np.ndarray]:
    """The example inputs of a component by graph name, of the first stream alone, not to be changed in place."""
    arrays = {}
    specs = bundle().component(name).inputs
    for key, value in modules()[name][1].items():
        listed = (
            [(key, value)] if isinstance(value, Tensor) else [(f"{key}.{i}", t) for i, t in enumerate(value)]
        )
        arrays |= {key: _first_stream(tensor, specs[key]).numpy() for key, tensor in listed}
    return arrays


def _first_stream(tensor: Tensor, spec: TensorSpec) -> Tensor:
    axis = spec.axis("streams")
    if axis is not None:
        return tensor.narrow(axis, 0, STREAMS).contiguous()
    if spec.axis("branches*streams") == 0:
        return tensor.unflatten(0, (BRANCHES, EXAMPLE_STREAMS))[:, :STREAMS].flatten(0, 1)
    return tensor
