"""From modules to a bundle: `pyengine export artv --base DIR ...`, or the small trained one with `--training DIR`."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pyengine.bundle.bundle import Bundle, Latent, Text, Video, write_manifest
from pyengine.errors import ConfigError

from ...deferred import Deferred
from ...graph import Inputs, export_component, round_weights
from ...layers.frame_autoencoder import FrameAutoencoder
from ...output import prepared
from ...weights import WeightStore
from ..shapes import autoencoder as causal
from ..shapes import modules as shapes
from ..shapes.captions import MAX_TOKENS, build_tokenizer
from ..shapes.recipe import FPS, HEIGHT, WIDTH
from ..shapes.text_encoder import null_ids
from .components import Anchor, PictureDecoder, PictureEncoder, References, StepDenoiser, TextEncoder
from .denoiser import Denoiser
from .small import TextTower, small_denoiser

VERSION = "1"
BRANCHES, STREAMS = 2, 3  # of the examples
SMALL_EXAMPLE = "a red circle bounces over a blue background"
# Of the small model.
SMALL_METHOD: dict[str, Any] = {"steps": 8, "spacing": "trailing", "guidance": 1.5, "augmentation": 0}


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
        "present": torch.ones(STREAMS, 1),
        "augmentation": torch.zeros(STREAMS, 1),
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


def _axes(component: str, inputs: Inputs, modules: Modules) -> dict[str, Any]:
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
        return {"outputs": ["kept_present", "kept_augmentation", *names], "working": names}
    if component == "encoder":
        return {"outputs": ["latents"], "dynamic": {"frames": {0: "chunk"}}}
    memory = [name for name in inputs if name != "latents"]
    return {
        "outputs": ["frames", *(f"{name}.next" for name in memory)],
        "dynamic": {"latents": {0: "chunk"}},
        "state": {name: f"{name}.next" for name in memory},
        "working": [f"{name}*" for name in memory],
    }


def export_bundle(
    modules: Modules,
    folder: Path,
    name: str,
    deferred: Deferred | None = None,
    only: Collection[str] | None = None,
) -> Bundle:
    """Writes the bundle into a new or empty folder, or over an earlier bundle. `only`: no other components. Raises OutputError."""
    prepared(folder)
    store = WeightStore(folder if deferred else None)
    exported = {
        component: export_component(
            module,
            inputs,
            folder=folder,
            name=component,
            store=store,
            deferred=deferred,
            **_axes(component, inputs, modules),
        )
        for component, (module, inputs) in components(modules).items()
        if only is None or component in only
    }
    store.write(folder)
    (folder / "tokenizer.json").write_text(modules.tokenizer)
    return write_manifest(
        folder,
        name=name,
        family="artv",
        version=VERSION,
        components=exported,
        video=modules.video,
        latent=Latent(modules.denoiser.config.unet.channels, *modules.latent_size),
        text=Text("tokenizer.json", modules.tokens, example=modules.example),
        method=method(modules),
        branches=("prompt", "null"),
    )


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


def small_modules(
    denoiser: Denoiser, text: TextTower, codec: tuple[causal.Encoder, causal.Decoder]
) -> Modules:
    """The networks of `shapes-artv`, over the latents of the bundle that the codec is of."""
    tokenizer = build_tokenizer()
    return Modules(
        denoiser,
        text,
        null_ids(),
        codec,
        (HEIGHT // causal.SPATIAL_FACTOR, WIDTH // causal.SPATIAL_FACTOR),
        Video(HEIGHT, WIDTH, FPS, causal.FRAMES_PER_LATENT),
        tokenizer.to_str(),
        MAX_TOKENS,
        SMALL_EXAMPLE,
        method=SMALL_METHOD,
    ).rounded()


def random_small_modules(seed: int = 0) -> Modules:
    """Untrained small networks with the zero-initialised layers filled, so that every path counts."""
    torch.manual_seed(seed)
    parts = small_denoiser(), TextTower(), causal.Encoder(), causal.Decoder()
    for part in parts:
        for parameter in part.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.02)
    return small_modules(parts[0], parts[1], parts[2:])


def trained_modules(training: Path, bundle: str) -> Modules:
    """The averaged weights of a folder of `training.artv.train`. Raises ConfigError where there are none, BundleError."""
    path = training / "average.safetensors"
    if not path.is_file():
        raise ConfigError(f"expected {path} but there is none; give a folder of training.artv.train")
    model = nn.ModuleDict({"denoiser": small_denoiser(), "text": TextTower()})
    model.load_state_dict(load_file(path))
    codec = shapes.load_modules(Bundle.load(bundle))
    return small_modules(model["denoiser"], model["text"], (codec.encoder, codec.decoder))  # type: ignore[arg-type]


def run(arguments: argparse.Namespace) -> int:
    """The command's work: export, then say how large the bundle is."""
    if arguments.training is not None:
        modules = trained_modules(Path(arguments.training), arguments.autoencoder)
        bundle = export_bundle(modules, Path(arguments.output), "shapes-artv")
    else:
        raise ConfigError("expected --base or --training but got neither")
    size = sum(path.stat().st_size for path in bundle.folder.iterdir())
    print(f"{bundle.folder}: {len(bundle.files) + 1} files, {size / 1e6:.1f} MB")
    return 0
