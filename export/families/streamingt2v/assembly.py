"""All networks of a bundle below one module, and each component of it with example inputs and the axes that a build chooses."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyengine.bundle.bundle import Component
from pyengine.errors import ConfigError

from ...deferred import Deferred
from ...graph import Inputs, export_component
from ...layers.frame_autoencoder import FrameAutoencoder
from ...weights import WeightStore
from .appearance import IMAGE_TOKENS, TEXT_TOKENS, ImageTokens
from .components import (
    AnchorEncoder,
    Appearance,
    Condition,
    Denoiser,
    GuidedDenoiser,
    TextDenoiser,
    TextEncoder,
    TextProjector,
    VideoDecoder,
    VideoEncoder,
)
from .enhancer import Enhancer
from .extractor import Extractor
from .image_encoder import ImageEncoder
from .modelscope import ModelScopeUNet
from .trunk import Trunk

BRANCHES, STREAMS = 2, 3  # of the examples: of streams any number of at least 2 would do
SHRINKS = 8  # pixels per latent place
KEPT = ["text_key*", "text_value*", "cam_text_key*", "cam_text_value*", "condition"]


@dataclass(frozen=True)
class Sizes:
    """Sizes that are fixed at export.

    latent            height and width of a latent frame, multiples of 8
    frames            of the window; the first `condition_frames` of them are generated again, the rest is new
    enhancer_latent   the same of the second stage; its height is 2 more than a multiple of 8
    enhancer_frames   frames of one of its chunks
    """

    latent: tuple[int, int] = (32, 32)
    frames: int = 16
    condition_frames: int = 8
    enhancer_latent: tuple[int, int] = (90, 160)
    enhancer_frames: int = 24

    def __post_init__(self) -> None:
        if any(side < 8 or side % 8 for side in self.latent):
            raise ConfigError(
                f"expected a latent height and width in multiples of 8 but got {self.latent[0]} and {self.latent[1]}"
            )
        high, wide = self.enhancer_latent
        if high < 10 or high % 8 != 2 or wide < 8 or wide % 8:
            raise ConfigError(
                "expected an enhancer latent height of 2 more than a multiple of 8 and a width in multiples of 8 but got "
                f"{high} and {wide}"
            )
        if not 0 < self.condition_frames < self.frames:
            raise ConfigError(
                f"expected condition frames from 1 to {self.frames - 1} but got {self.condition_frames}"
            )


@dataclass(frozen=True)
class Tower:
    """A CLIP text model of `transformers`, and the ids of the null branch's prompt [77]."""

    model: nn.Module
    null: Tensor


@dataclass(frozen=True)
class Networks:
    """The networks of a bundle; what is None is left out with its components.

    first          ModelScope's own UNet, which makes a first clip of a text
    enhancer       with an autoencoder and a text tower of its own
    """

    base_model: ModelScopeUNet
    unet: Extractor
    resampler: ImageTokens
    image_encoder: ImageEncoder
    vae: FrameAutoencoder
    text: Tower | None = None
    first: ModelScopeUNet | None = None
    enhancer: Enhancer | None = None
    enhancer_vae: FrameAutoencoder | None = None
    enhancer_text: Tower | None = None

    def parts(self) -> dict[str, nn.Module]:
        """By the prefix of their names."""
        found: dict[str, nn.Module | None] = {
            "base_model": self.base_model,
            "unet": self.unet,
            "resampler": self.resampler,
            "image_encoder": self.image_encoder,
            "vae": self.vae,
            "text_encoder": self.text.model if self.text else None,
            "first": self.first,
            "enhancer": self.enhancer,
            "enhancer_vae": self.enhancer_vae,
            "enhancer_text": self.enhancer_text.model if self.enhancer_text else None,
        }
        return {name: part for name, part in found.items() if part is not None}


@dataclass(frozen=True)
class Part:
    """A component to export: module, example inputs, and what `export_component` needs to know."""

    module: nn.Module
    inputs: Inputs
    outputs: list[str]
    dynamic: dict[str, dict[int, str]] = field(default_factory=dict)
    working: list[str] = field(default_factory=list)
    state: dict[str, str] = field(default_factory=dict)


def export_parts(
    parts: Mapping[str, Part],
    folder: Path,
    store: WeightStore,
    *,
    only: Collection[str] | None = None,
    deferred: Deferred | None = None,
) -> dict[str, Component]:
    """Writes the graphs of components into a folder that is there, and their weights to a store. `only`: no others."""
    return {
        name: export_component(
            part.module,
            part.inputs,
            folder=folder,
            name=name,
            store=store,
            outputs=part.outputs,
            dynamic=part.dynamic,
            working=part.working,
            state=part.state,
            deferred=deferred,
        )
        for name, part in parts.items()
        if only is None or name in only
    }


def assemble(networks: Networks, sizes: Sizes) -> tuple[nn.Module, dict[str, Part]]:
    """One module that holds the networks, by the prefixes of the checkpoint, and then the components; and the components by name."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    base, extractor = networks.base_model, networks.unet
    channels = base.widths.text_channels
    pixels = (3, *(SHRINKS * side for side in sizes.latent))
    seen, level = sizes.condition_frames, base.widths.channels[0]
    condition = (STREAMS, seen, level, *sizes.latent)
    parts: dict[str, Part] = {
        "appearance": Part(
            Appearance(base, extractor),
            {
                "text": normal(BRANCHES, TEXT_TOKENS, channels),
                "anchor": normal(BRANCHES, IMAGE_TOKENS, channels),
            },
            [*pairs(base), *(f"cam_{name}" for name in pairs(extractor))],
            working=KEPT,
        ),
        "image_encoder": Part(
            AnchorEncoder(networks.image_encoder, networks.resampler),
            {"pixels": normal(*pixels).clamp(-1, 1)},
            ["anchor"],
        ),
        "condition": Part(
            Condition(extractor.controlnet_cond_embedding),
            {"pixels": normal(STREAMS, seen, *pixels).clamp(-1, 1)},
            ["condition"],
            {"pixels": {0: "streams"}},
            KEPT,
        ),
        "denoiser": denoiser_part(
            Denoiser(base, extractor),
            normal,
            (sizes.frames, *sizes.latent),
            {"text": base, "cam_text": extractor},
            {"condition": normal(*condition)},
        ),
    }
    parts |= _codec("", networks.vae, sizes.latent, normal)
    if networks.text is not None:
        parts["text_encoder"] = _text_encoder(networks.text)
    if networks.first is not None:
        parts["first_text"] = projector_part(networks.first, normal)
        module = TextDenoiser(networks.first)
        parts["first_denoiser"] = denoiser_part(
            module, normal, (sizes.frames, *sizes.latent), {"text": networks.first}
        )
    if networks.enhancer is not None:
        parts["enhancer_text"] = projector_part(networks.enhancer, normal)
        size = (sizes.enhancer_frames, *sizes.enhancer_latent)
        parts["enhancer"] = enhancer_part(GuidedDenoiser(networks.enhancer), normal, size)
    if networks.enhancer_vae is not None:
        parts |= _codec("enhancer_", networks.enhancer_vae, sizes.enhancer_latent, normal)
    if networks.enhancer_text is not None:
        parts["enhancer_text_encoder"] = _text_encoder(networks.enhancer_text)
    root = nn.Module()
    for name, network in networks.parts().items():
        root.add_module(name, network)
    for name, part in parts.items():
        root.add_module(f"component_{name}", part.module)
    return root.eval(), parts


def pairs(unet: Trunk) -> list[str]:
    count = len(unet.cross_attentions())
    return [f"text_{kind}.{index}" for index in range(count) for kind in ("key", "value")]


def denoiser_part(
    module: nn.Module,
    normal: Any,
    size: tuple[int, int, int],
    texts: Mapping[str, Trunk],
    more: Mapping[str, Tensor] | None = None,
    channels: int = 4,
    tokens: int = TEXT_TOKENS,
) -> Part:
    frames, high, wide = size
    inputs: dict[str, Any] = {
        "latents": normal(STREAMS, frames, channels, high, wide),
        # Frames at levels of their own: the released schedule has one for all of them.
        "level": torch.linspace(0.05, 0.982, STREAMS * frames).reshape(STREAMS, frames),
        **(more or {}),
    }
    dynamic = {name: {0: "streams"} for name in inputs}
    if "guidance" in inputs:
        dynamic["guidance"] = {0: "branches", 1: "streams"}
    for name, unet in texts.items():
        for kind in ("key", "value"):
            inputs[f"{name}_{kind}"] = [
                normal(BRANCHES, STREAMS, each.to_q.in_features // each.head_size, tokens, each.head_size)
                for each in unet.cross_attentions()
            ]
            dynamic[f"{name}_{kind}"] = {0: "branches", 1: "streams"}
    return Part(module, inputs, ["prediction"], dynamic, KEPT)


def enhancer_part(
    module: GuidedDenoiser,
    normal: Any,
    size: tuple[int, int, int],
    channels: int = 4,
    tokens: int = TEXT_TOKENS,
) -> Part:
    """Which takes the weights of guidance as inputs."""
    guidance = torch.tensor([[7.5, 5.0, 2.0], [-6.5, -4.0, -1.0]])
    guides = {"guidance": guidance, "rescale": torch.tensor([0.2, 0.0, 0.7])}
    return denoiser_part(module, normal, size, {"text": module.unet}, guides, channels, tokens)


def projector_part(unet: Enhancer | ModelScopeUNet, normal: Any, tokens: int = TEXT_TOKENS) -> Part:
    channels = unet.cross_attentions()[0].to_k.in_features
    text = {"text": normal(BRANCHES, tokens, channels)}
    return Part(TextProjector(unet), text, pairs(unet), working=KEPT)


def _text_encoder(tower: Tower) -> Part:
    return Part(TextEncoder(tower.model, tower.null), {"ids": tower.null.flip(0)}, ["text"])


def _codec(prefix: str, vae: FrameAutoencoder, latent: tuple[int, int], normal: Any) -> dict[str, Part]:
    high, wide = (SHRINKS * side for side in latent)
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (2, 1, high, wide, 3), generator=generator, dtype=torch.uint8)
    return {
        f"{prefix}decoder": Part(
            VideoDecoder(vae),
            {"latents": normal(2, 4, *latent)},
            ["frames", "pixels"],
            {"latents": {0: "chunk"}},
        ),
        f"{prefix}encoder": Part(
            VideoEncoder(vae), {"frames": frames}, ["latents", "pixels"], {"frames": {0: "chunk"}}
        ),
    }
