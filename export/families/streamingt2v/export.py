"""From downloaded files to a bundle: `pyengine export streamingt2v --checkpoint streaming_t2v.ckpt --tokenizer DIR --output DIR`.

Weights go from file to file one tensor at a time, so that memory stays far below the size of the model.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyengine.bundle.bundle import Bundle, Latent, Text, Video, write_manifest
from pyengine.errors import BackendUnavailable, BundleError, ConfigError

from ...clip import clip_tokenizer, text_tower
from ...deferred import Deferred
from ...output import prepared
from ...weights import WeightStore
from .appearance import TEXT_TOKENS
from .assembly import SHRINKS, Networks, Part, Sizes, Tower, assemble, export_parts
from .cached import derivations
from .checkpoint import CLIP_FILE, TEXT_LAYERS, Weights, reader
from .modelscope import ModelScopeUNet
from .networks import autoencoder, build, unet_widths
from .small_export import export_trained

VERSION = "1"
FPS = 8.0
RELEASED_SIZES = Sizes()
BRANCHES = ("prompt", "null")
EXAMPLE = "a boat sails on a calm lake at sunset"
# The text tower of Stable Diffusion 2, OpenCLIP's ViT-H/14 but for its last layer.
TEXT_TOWER: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": TEXT_LAYERS,
    "num_attention_heads": 16,
    "max_position_embeddings": TEXT_TOKENS,
    "hidden_act": "gelu",
}
# Of the first clip, as the pipeline of ModelScope's model has them.
FIRST: dict[str, Any] = {"steps": 50, "guidance": 9.0, "sampler": "dpmsolver++"}
METHOD: dict[str, Any] = {
    "name": "streamingt2v",
    "steps": 50,
    "timesteps": 1000,
    "eta": 1.0,
    "betas": [0.00085, 0.012],
    "guidance": 7.5,
}
# Of the second stage: noised to level 600 of 1000, 30 steps. Its chunks, of 24 frames, overlap by a third. Behind the prompt come a comma
# and what makes pictures good, which the release leaves empty.
ENHANCER: dict[str, Any] = {"steps": 30, "levels": 600, "guidance": 7.5, "rescale": 0.2, "suffix": ", "}


@dataclass(frozen=True)
class Files:
    """What was downloaded.

    checkpoint     streaming_t2v.ckpt, or the VidXTend repack
    enhancer       folder of MS-Vid2Vid-XL; None leaves the second stage out
    first          diffusers folder of ModelScope's model, which makes a first clip of a text; None leaves that out
    image_encoder  file of OpenCLIP's ViT-H/14 for a repack, which lacks its image tower; None takes that of the enhancer's folder
    """

    checkpoint: str | Path
    enhancer: str | Path | None = None
    first: str | Path | None = None
    image_encoder: str | Path | None = None

    def weights(self, half: bool, layers: int = TEXT_LAYERS) -> Weights:
        """All sources. Raises InputError."""
        found = Weights.released(self.checkpoint)
        if not any(name.startswith("image_encoder.") for name in found.sources):
            tower = self.image_encoder or (Path(self.enhancer) / CLIP_FILE if self.enhancer else None)
            if tower is None:
                raise ConfigError(
                    f"expected --image-encoder or --enhancer with {self.checkpoint}, which lacks CLIP's image tower, but got neither; "
                    f"give {CLIP_FILE} of laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
                )
            found |= Weights.image_tower(tower)
        if self.first is not None:
            found |= Weights.first_stage(self.first)
        if self.enhancer is not None:
            found |= Weights.second_stage(self.enhancer, layers)
        return Weights(found.sources, half)


def empty_networks(
    files: Files, null: Tensor, config: Mapping[str, Any] | None = None, text: Mapping[str, Any] = TEXT_TOWER
) -> Networks:
    """The networks that these files fill, without memory for their parameters. Raises BackendUnavailable, ConfigError."""
    with torch.device("meta"):
        parts = build(config)
        enhancer = parts.pop("enhancer")
        second = autoencoder(config or {})
        first = ModelScopeUNet(unet_widths(config or {}))
    more: dict[str, Any] = {}
    if files.first is not None:
        more["first"] = first
    if files.enhancer is not None:
        more |= {"enhancer": enhancer, "enhancer_vae": second, "enhancer_text": Tower(text_tower(text), null)}
    return Networks(**parts, text=Tower(text_tower(text), null), **more)  # type: ignore[arg-type]


def export_bundle(
    files: Files,
    folder: str | Path,
    tokenizer: str,
    null: Tensor,
    *,
    sizes: Sizes = RELEASED_SIZES,
    half: bool = True,
    config: Mapping[str, Any] | None = None,
    text: Mapping[str, Any] = TEXT_TOWER,
    only: Collection[str] | None = None,
) -> Bundle:
    """Writes the bundle into a new or empty folder, or over an earlier bundle.

    tokenizer, null  its JSON, and the ids of the null branch's prompt
    half             whether weights are rounded to fp16
    config, text     sizes of the networks and of the text tower; the released ones
    only             these components
    Raises InputError for files that do not fit, ConfigError, OutputError.
    """
    weights = files.weights(half, text["num_hidden_layers"])
    networks = empty_networks(files, null, config, text)
    weights.check(networks.parts())
    root, parts = assemble(networks, sizes)
    read = reader(weights, derivations(root), root)
    target = prepared(Path(folder))  # an earlier bundle goes when there is something to put in its place
    deferred = Deferred.of(root, lambda name: read(name).numpy())
    return write_bundle(target, parts, sizes, networks, tokenizer, deferred, only)


def write_bundle(
    folder: Path,
    parts: Mapping[str, Part],
    sizes: Sizes,
    networks: Networks,
    tokenizer: str | None = None,
    deferred: Deferred | None = None,
    only: Collection[str] | None = None,
) -> Bundle:
    """Exports components, from memory or from a file, and writes the manifest. `folder` is there."""
    store = WeightStore(folder if deferred else None)
    exported = export_parts(parts, folder, store, only=only, deferred=deferred)
    store.write(folder)
    text = None
    if tokenizer is not None:
        (folder / "tokenizer.json").write_text(tokenizer)
        text = Text("tokenizer.json", TEXT_TOKENS, example=EXAMPLE)
    high, wide = sizes.latent
    return write_manifest(
        folder,
        name=f"streamingt2v-{SHRINKS * high}x{SHRINKS * wide}",
        family="streamingt2v",
        version=VERSION,
        components=exported,
        video=Video(SHRINKS * high, SHRINKS * wide, FPS, 1),
        latent=Latent(4, high, wide),
        text=text,
        method=method(sizes, networks),
        branches=BRANCHES,
    )


def method(sizes: Sizes, networks: Networks) -> dict[str, Any]:
    """The released settings."""
    found = METHOD | {"clip_frames": sizes.frames, "condition_frames": sizes.condition_frames}
    found["attentions"] = [len(part.cross_attentions()) for part in (networks.base_model, networks.unet)]
    if networks.first is not None:
        found["first"] = FIRST
    if networks.enhancer is not None:
        found["enhancer"] = ENHANCER | {
            "clip_frames": sizes.enhancer_frames,
            "overlap": sizes.enhancer_frames // 3,
            "latent": list(sizes.enhancer_latent),
        }
        found["presets"] = {"enhanced": {"enhance": True}}
    return found


def run(arguments: argparse.Namespace) -> int:
    """The command's work: export, then say how large the bundle is."""
    bundle = _released(arguments) if arguments.training is None else _small(arguments)
    size = sum(path.stat().st_size for path in bundle.folder.iterdir())
    print(f"{bundle.folder}: {len(bundle.files) + 1} files, {size / 1e6:.1f} MB")
    return 0


def _small(arguments: argparse.Namespace) -> Bundle:
    return export_trained(
        Path(arguments.training), Bundle.load(arguments.autoencoder), Path(arguments.output)
    )


def _released(arguments: argparse.Namespace) -> Bundle:
    files = Files(arguments.checkpoint, arguments.enhancer, arguments.first, arguments.image_encoder)
    source = arguments.tokenizer or (Path(arguments.first) / "tokenizer" if arguments.first else None)
    if source is None:
        raise ConfigError(
            "expected --tokenizer or --first but got neither; give the folder `tokenizer` of damo-vilab/text-to-video-ms-1.7b"
        )
    try:
        tokenizer, null = clip_tokenizer(source, TEXT_TOKENS, arguments.negative_prompt)
    except ImportError as error:
        raise BackendUnavailable(
            f"a tokenizer's folder is read by transformers ({error}): pip install 'pyengine-video[lvdm]'"
        ) from error
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BundleError(
            f"expected CLIP's tokenizer at '{source}' but it cannot be read ({reason}); download it again"
        ) from error
    sizes = Sizes(_latent(arguments.size), enhancer_latent=_enhancer_latent(arguments.enhancer_size))
    return export_bundle(
        files, arguments.output, tokenizer, null, sizes=sizes, half=arguments.weights == "fp16"
    )


def _latent(text: str) -> tuple[int, int]:
    high, wide = _pixels(text)
    if high % 64 or wide % 64:
        raise ConfigError(f"expected a size in multiples of 64 such as 256x256 but got {text!r}")
    return high // SHRINKS, wide // SHRINKS


def _enhancer_latent(text: str) -> tuple[int, int]:
    high, wide = _pixels(text)
    if high % 64 != 16 or wide % 64:
        raise ConfigError(
            "expected an enhanced height of 16 more than a multiple of 64 and a width in multiples of 64, such as 720x1280, but got "
            f"{text!r}"
        )
    return high // SHRINKS, wide // SHRINKS


def _pixels(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    if found is None:
        raise ConfigError(f"expected a size such as 256x256 (height x width) but got {text!r}")
    return int(found[1]), int(found[2])
