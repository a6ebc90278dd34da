"""Wan's released files: transformer, autoencoder and text encoder, read strictly, safely and one tensor at a time.

    weights = transformer_weights("self_forcing_dmd.pt")                       # or a folder of Wan's or of diffusers
    weights = transformer_weights("longlive_base.pt", lora="lora.pt")          # merged as it is read
    weights.config, weights.tensors.read("blocks.0.ffn.0.weight")
    vae = autoencoder_weights("Wan2.1_VAE.pth")

Of a trainer's file the average (`generator_ema`) is meant where there is one, else `generator`, else `model`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from pyengine.errors import ConfigError, InputError

from ...checkpoints import NamedTensors, TensorFile, open_all, some
from ...checkpoints.named import Readable
from . import renames
from .vae import MEAN, STD

ENTRIES = ("generator_ema", "generator", "model", "state_dict")
RAW_ENTRIES = ("generator", "model", "generator_ema", "state_dict")
LORA_ENTRIES = ("generator_lora", "lora", "state_dict")
HEAD_SIZE = 128  # of every Wan 2
TEXT_LEN = 512
# diffusers' names of what config.json says and shapes do not.
_CONFIG = {"num_attention_heads": "num_heads", "eps": "eps", "num_heads": "num_heads", "text_len": "text_len"}


@dataclass(frozen=True)
class Weights:
    """Tensors by the original's names, and the configuration that they are of."""

    tensors: NamedTensors
    config: dict[str, Any]


class Merged(NamedTuple):
    """A matrix with a low-rank update: base + scale * up @ down."""

    base: Readable
    down: Readable
    up: Readable
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    def read(self) -> Tensor:
        return self.base.read().float() + self.scale * (self.up.read().float() @ self.down.read().float())


def transformer_weights(
    path: str | Path, lora: str | Path | None = None, *, lora_scale: float = 1.0, averaged: bool = True
) -> Weights:
    """The transformer of a checkpoint. `averaged`: the trainer's average where there is one. Raises InputError, ConfigError."""
    source = Path(path)
    if (source / "transformer").is_dir():
        source = source / "transformer"
    files = open_all(source, ENTRIES if averaged else RAW_ENTRIES)
    tensors = NamedTensors.of(files, renames.transformer)
    names = [name for file in files for name in file.tensors]
    if "patch_embedding.weight" not in tensors.sources or (what := renames.other_kind(names, tensors.shapes)):
        what = (
            renames.other_kind(names, tensors.shapes)
            or f"something else (it begins with {some(sorted(names)[:3])})"
        )
        raise InputError(f"[checkpoint] expected a causal Wan transformer but {tensors.where} is {what}")
    if lora is not None:
        tensors = _with_lora(tensors, Path(lora), lora_scale)
    return Weights(tensors, _transformer_config(tensors, _config_beside(source)))


def autoencoder_weights(path: str | Path) -> Weights:
    """Wan 2.1's autoencoder, from its own file or a diffusers folder. Raises InputError."""
    source = Path(path)
    if (source / "vae").is_dir():
        source = source / "vae"
    elif (source / "Wan2.1_VAE.pth").is_file():
        source = source / "Wan2.1_VAE.pth"
    files = open_all(source, ("state_dict", "model"))
    tensors = NamedTensors.of(files, renames.autoencoder)
    shapes = tensors.shapes
    first, latent = shapes.get("encoder.conv1.weight"), shapes.get("conv2.weight")
    if first is None or latent is None or first[1] != 3:
        names = [name for file in files for name in file.tensors]
        what = "the autoencoder of Wan 2.2, whose frames enter in patches" if first else None
        what = what or renames.other_kind(names, shapes) or "something else"
        raise InputError(
            f"[checkpoint] expected Wan 2.1's autoencoder but {tensors.where} is {what}; download Wan2.1_VAE.pth"
        )
    beside = _config_beside(source)
    z_dim = latent[0]
    if "latents_mean" not in beside and z_dim != len(MEAN):
        raise InputError(
            f"[checkpoint] expected latents of {len(MEAN)} channels in {tensors.where} but they have {z_dim}; download Wan2.1_VAE.pth"
        )
    config = {
        "dim": first[0],
        "z_dim": z_dim,
        "dim_mult": beside.get("dim_mult", [1, 2, 4, 4]),
        "num_res_blocks": beside.get("num_res_blocks", 2),
        "attn_scales": beside.get("attn_scales", []),
        "temperal_downsample": beside.get("temperal_downsample", [False, True, True]),
        "mean": beside.get("latents_mean", list(MEAN)),
        "std": beside.get("latents_std", list(STD)),
    }
    return Weights(tensors, config)


def text_encoder_weights(path: str | Path) -> Weights:
    """UMT5's encoder in Wan's own file, by the file's names. Raises InputError."""
    tensors = NamedTensors.of(open_all(path), lambda name: name)
    shapes = tensors.shapes
    if "token_embedding.weight" not in shapes or "blocks.0.pos_embedding.embedding.weight" not in shapes:
        raise InputError(
            f"[checkpoint] expected Wan's models_t5_umt5-xxl-enc-bf16.pth but {tensors.where} is "
            f"{renames.other_kind(list(shapes), shapes) or 'something else'}"
        )
    buckets, heads = shapes["blocks.0.pos_embedding.embedding.weight"]
    vocabulary, dim = shapes["token_embedding.weight"]
    return Weights(
        tensors,
        {
            "vocab_size": vocabulary,
            "dim": dim,
            "dim_attn": shapes["blocks.0.attn.q.weight"][0],
            "dim_ffn": shapes["blocks.0.ffn.fc1.weight"][0],
            "num_heads": heads,
            "encoder_layers": _layers(shapes),
            "num_buckets": buckets,
        },
    )


def _transformer_config(tensors: NamedTensors, beside: dict[str, Any]) -> dict[str, Any]:
    """Sizes as the shapes have them; heads and text length as config.json says, else those of every Wan."""
    shapes = tensors.shapes
    needed = (
        "blocks.0.ffn.0.weight",
        "time_embedding.0.weight",
        "text_embedding.0.weight",
        "head.head.weight",
    )
    missing = [name for name in needed if name not in shapes]
    if missing:
        raise InputError(
            f"[checkpoint] expected a whole transformer in {tensors.where} but it lacks {some(missing)}"
        )
    dim, channels, *patch = shapes["patch_embedding.weight"]
    said = {ours: beside[theirs] for theirs, ours in _CONFIG.items() if theirs in beside}
    if "num_heads" not in said and dim % HEAD_SIZE:
        raise ConfigError(
            f"expected a width of whole heads of {HEAD_SIZE} in {tensors.where} but it is {dim}; put the config.json of the model beside it"
        )
    return {
        "patch_size": patch,
        "text_len": TEXT_LEN,
        "in_dim": channels,
        "dim": dim,
        "ffn_dim": shapes["blocks.0.ffn.0.weight"][0],
        "freq_dim": shapes["time_embedding.0.weight"][1],
        "text_dim": shapes["text_embedding.0.weight"][1],
        "out_dim": shapes["head.head.weight"][0] // math.prod(patch),
        "num_heads": dim // HEAD_SIZE,
        "num_layers": _layers(shapes),
        "eps": 1e-6,
        **said,
    }


def _layers(shapes: Sequence[str] | dict[str, Any]) -> int:
    numbers = [int(found[1]) for name in shapes if (found := re.match(r"blocks\.(\d+)\.", name))]
    return max(numbers, default=-1) + 1


def _with_lora(base: NamedTensors, path: Path, scale: float) -> NamedTensors:
    """The base with every update of a peft file merged. Raises InputError for one that does not fit it."""
    files = open_all(path, LORA_ENTRIES)
    halves: dict[str, dict[str, Readable]] = {}
    for name, readable in _lora_sources(files).items():
        found = re.fullmatch(r"(.+)\.lora_(A|B)(?:\.\w+)?\.weight", name)
        if found is None:
            raise InputError(
                f"[lora] expected pairs of lora_A and lora_B in {path} but got {name}; give the file of the LoRA"
            )
        target = renames.transformer(found[1].removeprefix("base_model.model.")) + ".weight"
        halves.setdefault(target, {})[found[2]] = readable
    if not halves:
        raise InputError(
            f"[lora] expected pairs of lora_A and lora_B in {path} but there are none; give the file of the LoRA"
        )
    merged = dict(base.sources)
    for target, pair in halves.items():
        if pair.keys() != {"A", "B"} or target not in merged:
            raise InputError(
                f"[lora] expected a lora_A and a lora_B for a matrix of {base.where} but {path} has {target} without; "
                "give the LoRA of this base"
            )
        down, up = pair["A"], pair["B"]
        if (up.shape[0], down.shape[1]) != merged[target].shape or up.shape[1] != down.shape[0]:
            raise InputError(
                f"[lora] expected an update of {list(merged[target].shape)} for {target} but {path} has {list(up.shape)} times "
                f"{list(down.shape)}; give the LoRA of this base"
            )
        merged[target] = Merged(merged[target], down, up, scale)
    return NamedTensors(merged, f"{base.where} with {path}")


def _lora_sources(files: Sequence[TensorFile]) -> dict[str, Readable]:
    return dict(NamedTensors.of(files, lambda name: name).sources)


def _config_beside(source: Path) -> dict[str, Any]:
    """config.json of the folder, {} without one. Raises InputError."""
    path = (source if source.is_dir() else source.parent) / "config.json"
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text())
        if not isinstance(config, dict):
            raise ValueError("it is no object")
    except (OSError, ValueError) as error:
        raise InputError(
            f"[checkpoint] expected the model's sizes in {path} but it cannot be read ({error}); download it again"
        ) from error
    return config
