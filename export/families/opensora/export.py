"""From downloaded checkpoints to a bundle: `pyengine export opensora --checkpoint DIR --vae DIR --text-encoder DIR --size 240x426`.

Weights go from file to file one tensor at a time, so that memory stays far below the size of the model.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyengine.bundle.bundle import Bundle, Latent, Text, Video, write_manifest
from pyengine.errors import BundleError, ConfigError
from pyengine.schedule.warp import Arithmetic

from ...deferred import Deferred
from ...graph import Inputs, export_component
from ...output import prepared
from ...weights import WeightStore
from . import presets
from .checkpoint import Weights, empty, empty_autoencoder
from .layers import Rotary
from .stdit3 import STDiT3
from .streaming import BRANCHES, StreamingSTDiT3, TextProjector
from .vae import VideoAutoencoder
from .vae_components import ChunkDecoder, ChunkEncoder, FrameDecoder, FrameEncoder

VERSION = "1"


@dataclass(frozen=True)
class Options:
    """What of a bundle is chosen at export.

    size          height and width of the video; the model is conditioned on them and frames have the next lower multiple of 8
    words         tokens of the prompt that are kept; None = all the model takes
    context       "recompute": clean frames re-enter every call (PA-VDM); "ring": their keys and values are cached as they were when the
                  frames became clean, which is cheaper and an approximation for this bidirectional model
    arithmetic    of the timestep warp: "released" or "exact"
    tile          height and width in pixels of the tiles that frames are decoded in; None = whole frames
    decode_batch  frames that the frame decoder takes at once
    bfloat16      store weights rounded to bf16: half the size, and what the released code runs
    """

    size: tuple[int, int] = (240, 426)
    fps: float = 24.0
    words: int | None = None
    context: str = "recompute"
    arithmetic: Arithmetic = "released"
    steps: int = presets.STEPS
    noisy_frames: int = presets.NOISY_FRAMES
    tile: tuple[int, int] | None = None
    decode_batch: int = 1
    bfloat16: bool = False

    def __post_init__(self) -> None:
        if min(self.size) < 16:
            raise ConfigError(f"expected a size of at least 16x16 but got {self.size[0]}x{self.size[1]}")
        if self.context not in ("recompute", "ring"):
            raise ConfigError(f"expected context recompute or ring but got {self.context!r}")
        if self.decode_batch < 1:
            raise ConfigError(f"expected decode_batch of at least 1 but got {self.decode_batch}")


@dataclass(frozen=True)
class Plan:
    """A component to export: module, example inputs, and what export_component needs to know."""

    module: nn.Module
    inputs: Inputs
    outputs: list[str]
    dynamic: dict[str, dict[int, str]]
    ring: dict[str, str]
    working: list[str]


def components(model: STDiT3, vae: VideoAutoencoder, options: Options) -> dict[str, Plan]:
    """Every network of the bundle. The modules may hold real weights (parity) or stand-ins (export)."""
    high, wide = (extent // 8 for extent in options.size)
    latent = (model.config.in_channels, high, wide)
    chunk, video = vae.chunk_latents, vae.micro_frame_size
    if chunk != presets.CHUNK or video != presets.CHUNK_VIDEO:
        raise ConfigError(
            f"expected an autoencoder of 17 frames to 5 latents but got {video} to {chunk}; give Open-Sora's VAE v1.2"
        )
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    tile = (
        (high, wide)
        if options.tile is None
        else tuple(min(t // 8, n) for t, n in zip(options.tile, (high, wide), strict=True))
    )
    if min(tile) < 2:
        raise ConfigError(f"expected tiles of at least 16x16 pixels but got {options.tile}")
    planes = normal(video, *latent)
    pixels = torch.randint(
        0, 256, (options.decode_batch, 8 * high, 8 * wide, 3), generator=generator, dtype=torch.uint8
    )

    def plain(module: nn.Module, name: str, value: Tensor, output: str) -> Plan:
        return Plan(module.eval(), {name: value}, [output], {}, {}, [])

    return {
        "denoiser": _denoiser(model, latent, options, normal),
        "text_encoder": _text_encoder(model, options, normal),
        "decoder": plain(ChunkDecoder(vae), "latents", normal(chunk, *latent), "planes"),
        "frame_decoder": plain(
            FrameDecoder(vae), "planes", normal(options.decode_batch, latent[0], *tile), "frames"
        ),
        "encoder": plain(ChunkEncoder(vae), "planes", planes, "latents"),
        "frame_encoder": plain(FrameEncoder(vae), "frames", pixels, "planes"),
    }


def _denoiser(model: STDiT3, latent: tuple[int, ...], options: Options, normal: Any) -> Plan:
    config, with_ring = model.config, options.context == "ring"
    if config.patch_size[0] != 1:
        raise ConfigError(
            f"expected a patch of one latent frame but got {config.patch_size}: frames could not have their own levels"
        )
    if config.head_size % 2:
        raise ConfigError(
            f"expected heads of an even size, whose channels are rotated in pairs, but got {config.head_size}"
        )
    module = StreamingSTDiT3(model, (latent[1], latent[2]), options.size, options.fps, with_ring).eval()
    branches, streams, frames, slots = len(BRANCHES), 4, 3, 2
    words, blocks = _words(model, options), 2 * config.depth
    text = (branches, streams, config.num_heads, words, config.head_size)
    index = torch.arange(slots + frames).repeat(streams, 1)
    inputs: dict[str, Any] = {
        "latents": normal(streams, frames, *latent),
        "level": torch.linspace(0, 1, frames).repeat(streams, 1),
        "frame_index": index[:, slots:],
        "text_mask": torch.zeros(branches, streams, words),
        "text_key": [normal(*text) for _ in range(blocks)],
        "text_value": [normal(*text) for _ in range(blocks)],
    }
    dynamic = {name: {0: "streams", 1: "frames"} for name in ("latents", "level", "frame_index")}
    dynamic |= {f"text_{name}": {0: "branches", 1: "streams"} for name in ("mask", "key", "value")}
    names: list[str] = []
    if with_ring:
        cached = (branches * streams, slots, module.tokens, config.num_heads, config.head_size)
        inputs |= {
            "ring_index": index[:, :slots],
            "ring_key": [normal(*cached) for _ in range(config.depth)],
            "ring_value": [normal(*cached) for _ in range(config.depth)],
        }
        kept = {0: "branches*streams", 1: "ring"}
        dynamic |= {"ring_index": {0: "streams", 1: "ring"}, "ring_key": kept, "ring_value": kept}
        names = [f"{kind}.{index}" for index in range(config.depth) for kind in ("key", "value")]
    ring = {f"ring_{name}": name for name in names}
    return Plan(module, inputs, ["prediction", *names], dynamic, ring, ["text_key.*", "text_value.*"])


def _text_encoder(model: STDiT3, options: Options, normal: Any) -> Plan:
    words = _words(model, options)
    seen = (torch.arange(words) < max(1, words // 2)).to(torch.int64)
    names = [f"text_{kind}.{index}" for kind in ("key", "value") for index in range(2 * model.config.depth)]
    inputs = {"states": normal(words, model.config.caption_channels), "words": seen}
    return Plan(
        TextProjector(model, words).eval(),
        inputs,
        ["text_mask", *names],
        {},
        {},
        ["text_key.*", "text_value.*"],
    )


def _words(model: STDiT3, options: Options) -> int:
    words = options.words or model.config.model_max_length
    if not 0 < words <= model.config.model_max_length:
        raise ConfigError(f"expected words from 1 to {model.config.model_max_length} but got {options.words}")
    return words


def export_bundle(
    checkpoint: str | Path,
    vae: str | Path,
    text_encoder: str,
    folder: str | Path,
    options: Options = Options(),
    dtype: str = "float32",
    only: Collection[str] | None = None,
) -> Bundle:
    """Writes the bundle into a new or empty folder, or over an earlier bundle. `dtype` is what T5 runs in; `only` these networks.

    Raises BundleError for checkpoints that are not Open-Sora's, ConfigError for options that do not fit, OutputError.
    """
    method = presets.method(
        options.size,
        arithmetic=options.arithmetic,
        steps=options.steps,
        noisy_frames=options.noisy_frames,
        context=options.context,
    )
    weights = {"denoiser": Weights.open(checkpoint), "autoencoder": Weights.open(vae)}
    model = empty(STDiT3, weights["denoiser"].config)
    autoencoder = empty_autoencoder(weights["autoencoder"].config)
    weights["denoiser"].check(model)
    weights["autoencoder"].check(autoencoder)
    _check_rotary(weights["denoiser"], model)
    parts = components(model, autoencoder, options)
    target = prepared(Path(folder))  # an earlier bundle goes when there is something to put in its place
    store = WeightStore(target)
    deferred = {
        "denoiser": Deferred.of(model, weights["denoiser"].numpy, bfloat16=options.bfloat16),
        "autoencoder": Deferred.of(autoencoder, weights["autoencoder"].numpy, bfloat16=options.bfloat16),
    }
    exported = {
        name: export_component(
            part.module,
            part.inputs,
            folder=target,
            name=name,
            store=store,
            outputs=part.outputs,
            dynamic=part.dynamic,
            ring=part.ring,
            working=part.working,
            deferred=deferred["denoiser" if name in ("denoiser", "text_encoder") else "autoencoder"],
        )
        for name, part in parts.items()
        if only is None or name in only
    }
    store.write(target)
    high, wide = (extent // 8 for extent in options.size)
    length = model.config.model_max_length
    return write_manifest(
        target,
        name=f"opensora-{options.size[0]}x{options.size[1]}",
        family="opensora",
        version=VERSION,
        components=exported,
        video=Video(8 * high, 8 * wide, options.fps, presets.FRAMES_PER_LATENT),
        latent=Latent(model.config.in_channels, high, wide),
        text=Text(
            "",
            length,
            kind="t5",
            source=text_encoder,
            dtype=dtype,
            words=_words(model, options),
            cleaning=presets.CLEANING,
            example="a fox runs over snow at night",
        ),
        branches=BRANCHES,
        method=method,
    )


def _check_rotary(weights: Weights, model: STDiT3) -> None:
    """Our op computes the frequencies; a checkpoint that learned others would not be that model."""
    size = model.config.head_size
    wanted = Rotary.THETA ** (-np.arange(0, size, 2)[: size // 2] / size)
    if not np.allclose(weights.numpy("rope.freqs"), wanted, rtol=2**-7):
        raise BundleError(
            f"[checkpoint] expected rope.freqs of base {Rotary.THETA:g} in {weights.folder} but got others"
        )


def run(arguments: argparse.Namespace) -> int:
    """The command's work: export, then say how large the bundle is."""
    options = Options(
        size=_size(arguments.size),
        fps=arguments.fps,
        words=arguments.words,
        context=arguments.context,
        arithmetic=arguments.warp,
        steps=arguments.steps,
        noisy_frames=arguments.window,
        tile=_size(arguments.tile) if arguments.tile else None,
        decode_batch=arguments.decode_batch,
        bfloat16=arguments.weights == "bf16",
    )
    dtype = {"fp32": "float32", "bf16": "bfloat16"}[arguments.text_precision]
    source = text_source(arguments.text_encoder)
    bundle = export_bundle(arguments.checkpoint, arguments.vae, source, arguments.output, options, dtype)
    size = sum(path.stat().st_size for path in bundle.folder.iterdir())
    print(f"{bundle.folder}: {len(bundle.files) + 1} files, {size / 1e6:.1f} MB")
    return 0


def text_source(name: str) -> str:
    """A folder by its absolute path, so that the bundle finds it from anywhere; any other name is one of the hub."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    if found is None:
        raise ConfigError(f"expected a size such as 240x426 (height x width) but got {text!r}")
    return int(found[1]), int(found[2])
