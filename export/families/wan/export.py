"""From downloaded files to a bundle: `pyengine export wan --checkpoint FILE --vae FILE --text-encoder DIR --system self-forcing
--size 480x832`.

Weights go from file to file one tensor at a time, so that memory stays far below the size of the model.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyengine.bundle.bundle import Bundle, Latent, Text, Video, write_manifest
from pyengine.errors import ConfigError

from ...deferred import Deferred
from ...graph import Inputs, export_component
from ...output import prepared
from ...weights import WeightStore
from . import presets
from .causal_wan import CausalWan
from .checkpoint import Weights, autoencoder_weights, transformer_weights
from .streaming import BRANCHES, StreamingWan, Tables, TextProjector
from .text_folder import text_source
from .vae import Decoder, Encoder, VideoAutoencoder
from .vae_components import ChunkDecoder, ChunkEncoder

VERSION = "1"
TRANSFORMER = ("denoiser", "text_encoder")
HINT = "give the file of that system as it was released"


@dataclass(frozen=True)
class Options:
    """What of a bundle is chosen at export.

    system    whose checkpoint it is, as in `presets`
    size      height and width of the video, multiples of 16
    bfloat16  store the transformer's weights rounded to bf16, which is what the released code runs
    """

    system: str = "self-forcing"
    size: tuple[int, int] = (480, 832)
    bfloat16: bool = True

    def __post_init__(self) -> None:
        presets.system(self.system)
        if min(self.size) < 16 or any(extent % 16 for extent in self.size):
            raise ConfigError(
                f"expected a size of multiples of 16, such as 480x832, but got {self.size[0]}x{self.size[1]}"
            )

    @property
    def latent(self) -> tuple[int, int]:
        return self.size[0] // 8, self.size[1] // 8


@dataclass(frozen=True)
class Plan:
    """A component to export: module, example inputs, and what export_component needs to know."""

    module: nn.Module
    inputs: Inputs
    outputs: list[str]
    dynamic: dict[str, dict[int, str]]
    ring: dict[str, str]
    state: dict[str, str]
    working: list[str]


Normal = Callable[..., Tensor]


def components(
    model: CausalWan, tables: Tables, vae: VideoAutoencoder, system: presets.System, latent: tuple[int, int]
) -> dict[str, Plan]:
    """Every network of the bundle. The modules may hold real weights (parity) or stand-ins (export)."""
    if vae.per_latent != presets.FRAMES_PER_LATENT or vae.factor != 8:
        raise ConfigError(
            f"expected an autoencoder of 4 frames and 8x8 pixels per latent but got {vae.per_latent} and {vae.factor}x{vae.factor}"
        )
    if vae.z_dim != model.config.in_dim:
        raise ConfigError(
            f"expected an autoencoder of the transformer's {model.config.in_dim} channels but got {vae.z_dim}; give that of its release"
        )
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "denoiser": denoiser_plan(
            StreamingWan(model, tables, latent, system.levels, system.mask), latent, system.levels
        ),
        "text_encoder": _text_encoder(model, normal),
        "decoder": _coder(ChunkDecoder(vae), vae.decoder, "latents", normal(2, vae.z_dim, *latent), latent),
        "encoder": _coder(
            ChunkEncoder(vae),
            vae.encoder,
            "frames",
            torch.randint(
                0, 256, (2, 4, 8 * latent[0], 8 * latent[1], 3), generator=generator, dtype=torch.uint8
            ),
            (8 * latent[0], 8 * latent[1]),
        ),
    }


def denoiser_plan(module: StreamingWan, latent: tuple[int, int], levels: Sequence[float]) -> Plan:
    """Of a window of every stream, beside its ring."""
    config, generator = module.model.config, torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    branches, streams, frames, slots = 2, 3, 4, 5
    tokens = module.grid[0] * module.grid[1]
    text = (branches, streams, config.num_heads, config.text_len, config.head_size)
    cached = (branches * streams, slots, tokens, config.num_heads, config.head_size)
    index = torch.arange(slots + frames).repeat(streams, 1)
    layers = range(config.num_layers)
    inputs: dict[str, Any] = {
        "latents": normal(streams, frames, config.in_dim, *latent),
        "level": torch.tensor([levels[row % len(levels)] for row in range(frames)]).repeat(streams, 1),
        "frame_index": index[:, slots:],
        "ring_index": index[:, :slots],
        "ring_key": [normal(*cached) for _ in layers],
        "ring_value": [normal(*cached) for _ in layers],
        "text_key": [normal(*text) for _ in layers],
        "text_value": [normal(*text) for _ in layers],
    }
    kept = {0: "branches*streams", 1: "ring"}
    dynamic = {name: {0: "streams", 1: "frames"} for name in ("latents", "level", "frame_index")}
    dynamic |= {"ring_index": {0: "streams", 1: "ring"}, "ring_key": kept, "ring_value": kept}
    dynamic |= {f"text_{name}": {0: "branches", 1: "streams"} for name in ("key", "value")}
    names = [f"{kind}.{index}" for index in layers for kind in ("key", "value")]
    ring = {f"ring_{name}": name for name in names}
    return Plan(module, inputs, ["prediction", *names], dynamic, ring, {}, ["text_key.*", "text_value.*"])


def _text_encoder(model: CausalWan, normal: Normal) -> Plan:
    words = model.config.text_len
    seen = (torch.arange(words) < max(1, words // 2)).to(torch.int64)
    layers = range(model.config.num_layers)
    return Plan(
        TextProjector(model).eval(),
        {"states": normal(words, model.config.text_dim), "words": seen},
        [f"text_{kind}.{index}" for kind in ("key", "value") for index in layers],
        {},
        {},
        {},
        ["text_key.*", "text_value.*"],
    )


def _coder(
    module: nn.Module, part: Encoder | Decoder, name: str, example: Tensor, size: tuple[int, int]
) -> Plan:
    """Decoder or encoder, with its memory as state: `begun` and a slot per convolution over time."""
    output = "frames" if name == "latents" else "latents"
    slots = [torch.zeros(shape[1:]) for shape in part.memory_shapes(1, *size)]
    names = ["begun", *(f"memory.{index}" for index in range(len(slots)))]
    return Plan(
        module.eval(),
        {name: example, "begun": torch.ones(1), "memory": slots},
        [output, *(f"next_{name}" for name in names)],
        {name: {0: "chunk"}},
        {},
        {name: f"next_{name}" for name in names},
        ["memory.*", "next_memory.*"],
    )


def export_bundle(
    transformer: Weights,
    vae: Weights,
    text_encoder: str,
    folder: str | Path,
    options: Options = Options(),
    dtype: str = "bfloat16",
    only: Collection[str] | None = None,
) -> Bundle:
    """Writes the bundle into a new or empty folder, or over an earlier bundle. `dtype` is what UMT5 runs in; `only` these networks.

    Raises InputError for files that are not what they should be, ConfigError for options that do not fit, OutputError.
    """
    system = presets.system(options.system)
    with torch.device("meta"):
        model, autoencoder = CausalWan(**transformer.config), VideoAutoencoder(**vae.config)
    transformer.tensors.check(model, HINT)
    vae.tensors.check(autoencoder, "download Wan2.1_VAE.pth again")
    _settle(autoencoder, vae.config)
    tables = Tables.of(transformer.tensors.read, model.config, system.shown)
    deferred = {
        "transformer": Deferred.of(
            model, lambda name: transformer.tensors.read(name).numpy(), bfloat16=options.bfloat16
        ),
        "vae": Deferred.of(autoencoder, lambda name: vae.tensors.read(name).numpy()),
    }
    parts = components(model, tables, autoencoder, system, options.latent)
    target = prepared(Path(folder))  # an earlier bundle goes when there is something to put in its place
    store = WeightStore(target)
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
            state=part.state,
            working=part.working,
            deferred=deferred["transformer" if name in TRANSFORMER else "vae"],
        )
        for name, part in parts.items()
        if only is None or name in only
    }
    store.write(target)
    return write_manifest(
        target,
        name=f"wan-{options.system}-{options.size[0]}x{options.size[1]}",
        family="wan",
        version=VERSION,
        components=exported,
        video=Video(*options.size, presets.FPS, presets.FRAMES_PER_LATENT, presets.FIRST_FRAMES),
        latent=Latent(model.config.in_dim, *options.latent),
        text=Text(
            "",
            model.config.text_len,
            kind="umt5",
            source=text_encoder,
            dtype=dtype,
            cleaning=presets.CLEANING,
            example=presets.EXAMPLE,
        ),
        branches=BRANCHES,
        method=system.method(),
    )


def _settle(vae: VideoAutoencoder, config: dict[str, Any]) -> None:
    """Gives an autoencoder on the meta device its constants, which no file holds."""
    for name in ("mean", "std"):
        setattr(vae, name, torch.tensor(config[name])[:, None, None, None])


def run(arguments: argparse.Namespace) -> int:
    """The command's work: export, then say how large the bundle is."""
    lora = _lora(arguments.system, arguments.lora)
    options = Options(arguments.system, _size(arguments.size), arguments.weights == "bf16")
    transformer = transformer_weights(arguments.checkpoint, lora, averaged=not arguments.raw)
    vae = autoencoder_weights(arguments.vae)
    output = Path(arguments.output)
    source = text_source(arguments.text_encoder, output.with_name(f"{output.name}-text-encoder"))
    dtype = {"fp32": "float32", "bf16": "bfloat16"}[arguments.text_precision]
    bundle = export_bundle(transformer, vae, source, output, options, dtype)
    size = sum(path.stat().st_size for path in bundle.folder.iterdir())
    print(f"{bundle.folder}: {len(bundle.files) + 1} files, {size / 1e6:.1f} MB")
    return 0


def _lora(system: str, given: str | None) -> str | None:
    """LongLive's base alone is a model of 21 frames, so leaving its LoRA out is said, not forgotten."""
    if system == "longlive" and given is None:
        raise ConfigError(
            "expected --lora with --system longlive: its models/lora.pt, or 'merged' for a checkpoint that holds it already"
        )
    return None if given == "merged" else given


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    if found is None:
        raise ConfigError(f"expected a size such as 480x832 (height x width) but got {text!r}")
    return int(found[1]), int(found[2])
