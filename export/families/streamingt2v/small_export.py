"""The small model as a bundle: `pyengine export streamingt2v --training DIR --output DIR`.

The components are the release's, so one schedule serves both. What is called pixels there, which the next chunk is conditioned on and the
anchor is taken from, are latent frames here, which the decoder hands through.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pyengine.bundle.bundle import Bundle, Latent, Text, Video, write_manifest
from pyengine.errors import ConfigError

from ...graph import round_weights
from ...output import prepared
from ...weights import WeightStore
from ..shapes.autoencoder import FRAMES_PER_LATENT, LATENT_CHANNELS, Decoder, FrameDecoder
from ..shapes.captions import MAX_TOKENS, build_tokenizer
from ..shapes.modules import load_modules
from ..shapes.recipe import FPS, HEIGHT, WIDTH
from ..shapes.text_encoder import WordEncoder, null_ids
from .assembly import BRANCHES as COUNT
from .assembly import KEPT, STREAMS, Part, denoiser_part, export_parts, pairs, projector_part
from .cached import fill
from .components import AnchorEncoder, Appearance, Condition, Denoiser, TextDenoiser
from .small import (
    BETAS,
    CONDITION_FRAMES,
    FRAMES,
    LATENT_SIZE,
    PREDICTS,
    TIMESTEPS,
    SmallNetworks,
)

NAME, VERSION = "shapes-streamingt2v", "1"
BRANCHES = ("prompt", "null")
EXAMPLE = "a red circle bounces over a blue background"
LATENT = (LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE)
METHOD: dict[str, Any] = {
    "name": "streamingt2v",
    "steps": 25,
    "timesteps": TIMESTEPS,
    "eta": 1.0,
    "betas": list(BETAS),
    "predicts": PREDICTS,
    "guidance": 2.0,
    "clip_frames": FRAMES,
    "condition_frames": CONDITION_FRAMES,
    "takes_frames": False,
}


class PromptWords(nn.Module):
    """ids [20] of the prompt -> text [2, 20, width]: its words and those of the empty prompt."""

    def __init__(self, encoder: WordEncoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.register_buffer("null", null_ids(), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.encoder.words(torch.stack([ids, self.get_buffer("null")]))


class KeepingDecoder(nn.Module):
    """The decoder of `shapes`, which also hands through its latents [chunk, 8, 8, 8]: the condition of the next chunk."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = FrameDecoder(decoder)

    def forward(self, latents: Tensor, coarse: Tensor, fine: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        frames, coarse, fine = self.decoder(latents, coarse, fine)
        return frames, latents.clone(), coarse, fine


def assemble_small(networks: SmallNetworks, decoder: Decoder) -> tuple[nn.Module, dict[str, Part]]:
    """One module that holds the networks and the components, all weights rounded as the bundle has them; and the components by name."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    base, extractor = networks.base_model, networks.unet
    widths = base.widths
    width, window = widths.text_channels, (FRAMES, LATENT_SIZE, LATENT_SIZE)
    tokens: dict[str, Any] = {"channels": LATENT_CHANNELS, "tokens": MAX_TOKENS}
    condition = normal(STREAMS, CONDITION_FRAMES, widths.channels[0], LATENT_SIZE, LATENT_SIZE)
    ids = torch.tensor(build_tokenizer().encode(EXAMPLE).ids)
    memory = {name: normal(*shape) for name, shape in decoder.memory_shapes.items()}
    texts = {"text": normal(COUNT, MAX_TOKENS, width), "anchor": normal(COUNT, widths.image_tokens, width)}
    parts = {
        "text_encoder": Part(
            PromptWords(networks.text_encoder),
            {"ids": nn.functional.pad(ids, (0, MAX_TOKENS - len(ids)))},
            ["text"],
        ),
        "image_encoder": Part(
            AnchorEncoder(networks.image_encoder, networks.resampler), {"pixels": normal(*LATENT)}, ["anchor"]
        ),
        "appearance": Part(
            Appearance(base, extractor),
            texts,
            [*pairs(base), *(f"cam_{name}" for name in pairs(extractor))],
            working=KEPT,
        ),
        "condition": Part(
            Condition(extractor.controlnet_cond_embedding),
            {"pixels": normal(STREAMS, CONDITION_FRAMES, *LATENT)},
            ["condition"],
            {"pixels": {0: "streams"}},
            KEPT,
        ),
        "denoiser": denoiser_part(
            Denoiser(base, extractor, TIMESTEPS),
            normal,
            window,
            {"text": base, "cam_text": extractor},
            {"condition": condition},
            **tokens,
        ),
        "first_text": projector_part(base, normal, MAX_TOKENS),
        "first_denoiser": denoiser_part(
            TextDenoiser(base, TIMESTEPS), normal, window, {"text": base}, **tokens
        ),
        "decoder": Part(
            KeepingDecoder(decoder),
            {"latents": normal(2, *LATENT), **memory},
            ["frames", "pixels", *(f"{name}.next" for name in memory)],
            {"latents": {0: "chunk"}},
            [f"{name}*" for name in memory],
            {name: f"{name}.next" for name in memory},
        ),
    }
    root = nn.Module()
    root.add_module("networks", networks)
    for name, part in parts.items():
        root.add_module(f"component_{name}", part.module)
    root.eval()
    round_weights(root)
    fill(root)
    round_weights(root)
    return root, parts


def export_small(
    networks: SmallNetworks,
    decoder: Decoder,
    folder: Path,
    name: str = NAME,
    only: Collection[str] | None = None,
) -> Bundle:
    """Writes the bundle into a new or empty folder, or over an earlier bundle. `only`: these components. Raises OutputError."""
    _, parts = assemble_small(networks, decoder)
    prepared(folder)
    store = WeightStore()
    exported = export_parts(parts, folder, store, only=only)
    store.write(folder)
    build_tokenizer().save(str(folder / "tokenizer.json"))
    return write_manifest(
        folder,
        name=name,
        family="streamingt2v",
        version=VERSION,
        components=exported,
        video=Video(HEIGHT, WIDTH, FPS, FRAMES_PER_LATENT),
        latent=Latent(*LATENT),
        text=Text("tokenizer.json", MAX_TOKENS, example=EXAMPLE),
        branches=BRANCHES,
        method=method(networks),
    )


def method(networks: SmallNetworks) -> dict[str, Any]:
    """The settings that ship."""
    unets = (networks.base_model, networks.unet)
    return METHOD | {
        "attentions": [len(unet.cross_attentions()) for unet in unets],
        "first": {"steps": METHOD["steps"], "guidance": METHOD["guidance"]},
    }


def trained_networks(folder: Path) -> SmallNetworks:
    """The averaged weights of a folder of `training.streamingt2v.train`. Raises ConfigError."""
    networks = SmallNetworks()
    path = folder / "average.safetensors"
    if not path.exists():
        raise ConfigError(
            f"expected a folder of training.streamingt2v.train but {folder} has no {path.name}; "
            "give that of a stage, such as runs/streamingt2v/stream"
        )
    networks.load_state_dict(load_file(path))
    return networks


def export_trained(training: Path, source: Bundle, folder: Path) -> Bundle:
    """From a training folder and the bundle whose decoder goes with its latents."""
    return export_small(trained_networks(training), load_modules(source).decoder, folder)
