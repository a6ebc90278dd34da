"""From modules to a bundle: `pyengine export artv --base DIR ...`, or the small trained one with `--training DIR`."""

from __future__ import annotations

import argparse
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from pyengine.bundle.bundle import Bundle, Latent, Text, Video, write_manifest
from pyengine.errors import BackendUnavailable, BundleError, ConfigError

from ...clip import clip_tokenizer
from ...deferred import Deferred
from ...graph import export_component
from ...output import prepared
from ...weights import WeightStore
from ..shapes import autoencoder as causal
from ..shapes import modules as shapes
from ..shapes.captions import MAX_TOKENS, build_tokenizer
from ..shapes.recipe import FPS, HEIGHT, WIDTH
from ..shapes.text_encoder import null_ids
from .assembly import Modules, axes, components, method
from .base import Base
from .denoiser import Denoiser
from .pretrained import SHRINKS, UNTRAINED, pretrained
from .small import TextTower, small_denoiser

VERSION = "1"
SMALL_EXAMPLE = "a red circle bounces over a blue background"
# Of the small model.
SMALL_METHOD: dict[str, Any] = {"steps": 8, "spacing": "trailing", "guidance": 1.5, "augmentation": 0}


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
            **axes(component, inputs, modules),
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


def export_base(arguments: argparse.Namespace) -> Bundle:
    """A bundle on Stable Diffusion 2.1. Raises InputError for files that do not fit, ConfigError, BundleError, BackendUnavailable."""
    if arguments.adapter is None and not arguments.untrained:
        raise ConfigError(UNTRAINED)
    if arguments.adapter is not None and arguments.untrained:
        raise ConfigError("expected --adapter or --untrained but got both; leave one out")
    latent = None if arguments.size is None else _latent(arguments.size)
    base = Base.open(arguments.base)
    source = Path(arguments.base) / "tokenizer"
    try:
        tokenizer, null = clip_tokenizer(
            source, int(base.text["max_position_embeddings"]), arguments.negative_prompt
        )
    except ImportError as error:
        raise BackendUnavailable(
            f"a tokenizer's folder is read by transformers ({error}): pip install 'pyengine-video[lvdm]'"
        ) from error
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BundleError(
            f"expected CLIP's tokenizer at '{source}' but it cannot be read ({reason}); download the folder again"
        ) from error
    made = pretrained(
        base,
        arguments.adapter,
        tokenizer,
        null,
        untrained=arguments.untrained,
        latent=latent,
        half=arguments.weights == "fp16",
    )
    high, wide = made.modules.video.height, made.modules.video.width
    deferred = Deferred.of(made.root, lambda name: made.read(name).numpy())
    return export_bundle(made.modules, Path(arguments.output), f"artv-{high}x{wide}", deferred)


def run(arguments: argparse.Namespace) -> int:
    """The command's work: export, then say how large the bundle is."""
    if arguments.training is not None:
        modules = trained_modules(Path(arguments.training), arguments.autoencoder)
        bundle = export_bundle(modules, Path(arguments.output), "shapes-artv")
    else:
        bundle = export_base(arguments)
    size = sum(path.stat().st_size for path in bundle.folder.iterdir())
    print(f"{bundle.folder}: {len(bundle.files) + 1} files, {size / 1e6:.1f} MB")
    return 0


def _latent(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    if found is None or int(found[1]) % 64 or int(found[2]) % 64 or "0" in found.groups():
        raise ConfigError(f"expected a size in multiples of 64 such as 512x512 but got {text!r}")
    return int(found[1]) // SHRINKS, int(found[2]) // SHRINKS
