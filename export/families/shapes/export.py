"""From training folders to the `shapes` bundle: `pyengine export shapes --autoencoder DIR --denoiser DIR --output DIR`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pyengine.bundle.bundle import Bundle, Latent, Text, Video, write_manifest

from ...graph import Inputs, export_component
from ...output import prepared
from ...weights import WeightStore
from .autoencoder import FRAMES_PER_LATENT, LATENT_CHANNELS, FrameDecoder, FrameEncoder
from .captions import MAX_TOKENS, build_tokenizer
from .modules import Modules
from .recipe import CHUNK, CHUNKS, FPS, HEIGHT, STEPS, WARP, WIDTH
from .text_encoder import PromptEncoder

VERSION = "1"
BRANCHES = ("prompt", "null")
STREAMS = 3  # of the example: any number runs
CONTEXT_FRAMES = 6  # clean latent frames in the ring
GUIDANCE = 2.0
EXAMPLE = "a red circle bounces over a blue background"


def components(modules: Modules) -> dict[str, tuple[nn.Module, Inputs]]:
    """Each component's module with example inputs, as export and parity take them."""
    config = modules.denoiser.config
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    frames, ring, chunk = CHUNKS * CHUNK, CONTEXT_FRAMES, CHUNK
    latent = (config.latent_channels, config.latent_size, config.latent_size)
    cached = (len(BRANCHES) * STREAMS, ring, config.tokens_per_frame, config.heads, config.head_size)
    index = torch.arange(ring + frames).expand(STREAMS, -1) + 5 * torch.arange(STREAMS)[:, None]
    ids = torch.tensor(build_tokenizer().encode(EXAMPLE).ids)
    ids = torch.nn.functional.pad(ids, (0, MAX_TOKENS - len(ids)))
    with torch.no_grad():
        text = PromptEncoder(modules.text_encoder)(ids)
    decoder = modules.decoder
    coarse, fine = (normal(*shape) for shape in decoder.memory_shapes.values())
    denoiser_inputs: dict[str, Any] = {
        "latents": normal(STREAMS, frames, *latent),
        "level": torch.linspace(0.1, 1.0, frames).expand(STREAMS, -1).contiguous(),
        "frame_index": index[:, ring:].contiguous(),
        "ring_index": index[:, :ring].contiguous(),
        "text_key": torch.stack([text[0]] * STREAMS, 2),
        "text_value": torch.stack([text[1]] * STREAMS, 2),
        "text_mask": torch.stack([text[2]] * STREAMS, 1),
        "text_vector": torch.stack([text[3]] * STREAMS, 1),
        "ring_key": [normal(*cached) for _ in range(config.depth)],
        "ring_value": [normal(*cached) for _ in range(config.depth)],
    }
    pixels = torch.randint(
        0, 256, (chunk, FRAMES_PER_LATENT, HEIGHT, WIDTH, 3), generator=generator, dtype=torch.uint8
    )
    return {
        "denoiser": (modules.denoiser, denoiser_inputs),
        "text_encoder": (PromptEncoder(modules.text_encoder), {"ids": ids}),
        "decoder": (
            FrameDecoder(decoder),
            {"latents": normal(chunk, *latent), "coarse": coarse, "fine": fine},
        ),
        "encoder": (FrameEncoder(modules.encoder), {"frames": pixels}),
    }


def export_bundle(modules: Modules, folder: Path, name: str = "shapes") -> Bundle:
    """Write the bundle into a new or empty folder, or over an earlier bundle. Raises OutputError."""
    prepared(folder)
    depth = modules.denoiser.config.depth
    parts = components(modules)
    store = WeightStore()
    keys, values = [f"key.{i}" for i in range(depth)], [f"value.{i}" for i in range(depth)]
    # May cross in bf16; the mask and all levels stay float32.
    text = ["text_key", "text_value", "text_vector"]
    arguments: dict[str, dict[str, Any]] = {
        "denoiser": {
            "outputs": ["prediction", *(name for pair in zip(keys, values, strict=True) for name in pair)],
            "dynamic": {
                "latents": {0: "streams", 1: "frames"},
                "level": {0: "streams", 1: "frames"},
                "frame_index": {0: "streams", 1: "frames"},
                "ring_index": {0: "streams", 1: "ring"},
                "text_key": {1: "branches", 2: "streams"},
                "text_value": {1: "branches", 2: "streams"},
                "text_mask": {0: "branches", 1: "streams"},
                "text_vector": {0: "branches", 1: "streams"},
                "ring_key": {0: "branches*streams", 1: "ring"},
                "ring_value": {0: "branches*streams", 1: "ring"},
            },
            "ring": {f"ring_{name}": name for name in (*keys, *values)},
            "working": text,
        },
        "text_encoder": {"outputs": ["text_key", "text_value", "text_mask", "text_vector"], "working": text},
        "decoder": {
            "outputs": ["frames", "coarse.next", "fine.next"],
            "dynamic": {"latents": {0: "chunk"}},
            "state": {"coarse": "coarse.next", "fine": "fine.next"},
            "working": ["coarse*", "fine*"],
        },
        "encoder": {"outputs": ["latents"], "dynamic": {"frames": {0: "chunk"}}},
    }
    exported = {}
    for component, (module, inputs) in parts.items():
        exported[component] = export_component(
            module, inputs, folder=folder, name=component, store=store, **arguments[component]
        )
    store.write(folder)
    build_tokenizer().save(str(folder / "tokenizer.json"))
    config = modules.denoiser.config
    return write_manifest(
        folder,
        name=name,
        family="shapes",
        version=VERSION,
        components=exported,
        video=Video(HEIGHT, WIDTH, FPS, FRAMES_PER_LATENT),
        latent=Latent(LATENT_CHANNELS, config.latent_size, config.latent_size),
        text=Text("tokenizer.json", MAX_TOKENS, example=EXAMPLE),
        branches=BRANCHES,
        method={
            "name": "progressive",
            "steps": STEPS,
            "chunk_frames": CHUNK,
            "cadence": STEPS // CHUNKS,
            "warp": WARP,
            "guidance": GUIDANCE,
            "sampler": "euler",
            "positions": "local",
            "context": {"kind": "ring", "sink_frames": 0, "recent_frames": CONTEXT_FRAMES},
        },
    )


def run(arguments: argparse.Namespace) -> int:
    """The command's work: export, then say how large the bundle is."""
    autoencoder = Path(arguments.autoencoder) if arguments.autoencoder else None
    denoiser = Path(arguments.denoiser) if arguments.denoiser else None
    source = Bundle.load(arguments.bundle) if arguments.bundle else None
    bundle = export_bundle(Modules.trained(autoencoder, denoiser, source), Path(arguments.output))
    size = sum(path.stat().st_size for path in bundle.folder.iterdir())
    print(f"{bundle.folder}: {len(bundle.files) + 1} files, {size / 1e6:.1f} MB")
    return 0
