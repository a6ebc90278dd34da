"""The networks of a bundle, and each component of it with example inputs and the axes that a build chooses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pyengine.bundle.bundle import Video

from ...graph import Inputs, round_weights
from ...layers.frame_autoencoder import FrameAutoencoder
from ..shapes import autoencoder as causal
from .components import Anchor, PictureDecoder, PictureEncoder, References, StepDenoiser, TextEncoder
from .denoiser import Denoiser

BRANCHES, STREAMS = 2, 3  # of the examples


@dataclass
class Modules:
    """The networks of one bundle, and what they were made for.

    text       gives a token per word of a prompt; `null` are the ids of the null branch's
    codec      the causal encoder and decoder of `shapes`, which remembers, or Stable Diffusion's VAE
    tokenizer  its JSON; `tokens` that it pads to
    method     settings beside those that follow from the networks
    """

    denoiser: Denoiser
    text: nn.Module
    null: Tensor
    codec: tuple[causal.Encoder, causal.Decoder] | FrameAutoencoder
    latent_size: tuple[int, int]
    video: Video
    tokenizer: str
    tokens: int
    example: str
    scale: float = 1.0
    method: Mapping[str, Any] = field(default_factory=dict)

    def parts(self) -> list[nn.Module]:
        codec = self.codec if isinstance(self.codec, tuple) else (self.codec,)
        return [self.denoiser, self.text, *codec]

    def rounded(self) -> Modules:
        """Weights rounded to fp16, as the bundle keeps them, but for the table of noise levels; evaluation mode."""
        for part in self.parts():
            table = [buffer.clone() for buffer in self.denoiser.table.buffers()]
            round_weights(part.eval())
            for buffer, exact in zip(self.denoiser.table.buffers(), table, strict=True):
                buffer.copy_(exact)
        return self


def components(modules: Modules) -> dict[str, tuple[nn.Module, Inputs]]:
    """Each component's module with example inputs, as export and parity take them."""
    denoiser, config = modules.denoiser, modules.denoiser.config
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    latent = (config.unet.channels, *modules.latent_size)
    vae = modules.codec if isinstance(modules.codec, FrameAutoencoder) else None
    in_pixels = config.adapter.unshuffle > 1
    transformers = denoiser.unet.transformers()
    heads = [layer.block.attn2 for layer in transformers]
    counts = [attention.to_q.out_features // attention.head_size for attention in heads]
    tokens = denoiser.anchor.tokens(modules.latent_size)
    sizes = [(count, attention.head_size) for count, attention in zip(counts, heads, strict=True)]
    widths = config.adapter.widths
    places = [tuple(-(-side // 2**level) for side in modules.latent_size) for level in range(len(widths))]
    inputs: dict[str, Any] = {
        "latents": normal(STREAMS, 2, *latent),
        "level": torch.tensor([0.0, 0.5]).expand(STREAMS, 2).contiguous(),
        "condition": torch.tensor([1.0, 50.0]).expand(STREAMS, 2).contiguous(),
        "text": [normal(BRANCHES, STREAMS, 2, count, modules.tokens, size) for count, size in sizes],
        "anchor": [normal(STREAMS, 2, count, tokens, size) for count, size in sizes],
        "feature": [normal(STREAMS, width, *place) for width, place in zip(widths, places, strict=True)],
    }
    present, augmentation = torch.ones(1), torch.zeros(1)
    parts: dict[str, tuple[nn.Module, Inputs]] = {
        "denoiser": (StepDenoiser(denoiser), inputs),
        "references": (
            References(denoiser, vae if in_pixels else None, modules.scale),
            {
                "latents": normal(config.adapter.references, *latent),
                "present": present,
                "masked": torch.ones(1),
                "augmentation": augmentation,
            },
        ),
        "anchor": (Anchor(denoiser), {"latents": normal(1, *latent), "present": present}),
        "text_encoder": (
            TextEncoder(modules.text, denoiser.unet, modules.null),
            {"ids": modules.null.flip(0)},
        ),
    }
    high, wide, count = modules.video.height, modules.video.width, int(modules.video.frames_per_latent)
    pixels = torch.randint(0, 256, (2, count, high, wide, 3), generator=generator, dtype=torch.uint8)
    several = {"latents": normal(2, *latent)}
    if isinstance(modules.codec, FrameAutoencoder):
        parts["decoder"] = (PictureDecoder(modules.codec, modules.scale), several)
        parts["encoder"] = (PictureEncoder(modules.codec, modules.scale), {"frames": pixels})
    else:
        encoder, decoder = modules.codec
        memory = {name: normal(*shape) for name, shape in decoder.memory_shapes.items()}
        parts["decoder"] = (causal.FrameDecoder(decoder), several | memory)
        parts["encoder"] = (causal.FrameEncoder(encoder), {"frames": pixels})
    return parts


def axes(component: str, inputs: Inputs, modules: Modules) -> dict[str, Any]:
    """Names of the outputs, the axes that a build chooses, and what may cross in bf16."""
    layers, levels = len(modules.denoiser.unet.transformers()), len(modules.denoiser.config.adapter.widths)
    if component == "denoiser":
        streams = {name: {0: "streams"} for name in inputs}
        return {
            "outputs": ["prediction"],
            "dynamic": streams | {"text": {0: "branches", 1: "streams"}},
            "working": ["text*", "anchor*", "feature*"],
        }
    if component == "text_encoder":
        names = [f"text.{index}" for index in range(layers)]
        return {"outputs": names, "working": names}
    if component == "anchor":
        names = [f"anchor.{index}" for index in range(layers)]
        return {"outputs": names, "working": names}
    if component == "references":
        names = [f"feature.{index}" for index in range(levels)]
        return {"outputs": ["condition", *names], "working": names}
    if component == "encoder":
        return {"outputs": ["latents"], "dynamic": {"frames": {0: "chunk"}}}
    memory = [name for name in inputs if name != "latents"]
    return {
        "outputs": ["frames", *(f"{name}.next" for name in memory)],
        "dynamic": {"latents": {0: "chunk"}},
        "state": {name: f"{name}.next" for name in memory},
        "working": [f"{name}*" for name in memory],
    }


def method(modules: Modules) -> dict[str, Any]:
    """The settings of the method."""
    config = modules.denoiser.config
    return {
        "name": "artv",
        "timesteps": config.timesteps,
        "chunk_frames": 1,
        "references": config.adapter.references,
        "layers": len(modules.denoiser.unet.transformers()),
        "features": len(config.adapter.widths),
        "eta": 0.0,
        "betas": list(config.betas),
        "predicts": config.predicts,
        **modules.method,
    }
