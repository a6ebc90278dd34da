"""Tiny causal Wan models for tests of export, engine and streams: real names and layouts, weights by rule."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from wan_golden import fill, manifest

from pyengine.bundle.bundle import Bundle
from pyengine.export.families.wan import CausalWan, VideoAutoencoder, presets
from pyengine.export.families.wan.checkpoint import Weights, autoencoder_weights, transformer_weights
from pyengine.export.families.wan.export import Options, Plan, components, export_bundle
from pyengine.export.families.wan.streaming import Tables

SIZE = (32, 48)
DIT: dict[str, Any] = {
    "patch_size": [1, 2, 2], "text_len": 6, "in_dim": 16, "out_dim": 16, "dim": 64, "ffn_dim": 96, "freq_dim": 32, "text_dim": 24,
    "num_heads": 4, "num_layers": 2,
}  # fmt: skip


@functools.cache
def transformer() -> CausalWan:
    return fill(CausalWan(**DIT))


@functools.cache
def autoencoder() -> VideoAutoencoder:
    return fill(VideoAutoencoder(**{**manifest()["vae"]["config"], "dim": 8}))


def weights(folder: Path) -> tuple[Weights, Weights]:
    """The two networks from files in a folder, as they are released."""
    folder.mkdir(exist_ok=True)
    torch.save({"generator_ema": {f"model.{n}": v for n, v in transformer().state_dict().items()}}, folder / "dit.pt")
    (folder / "config.json").write_text('{"num_heads": 4, "text_len": 6}')
    save_file(dict(autoencoder().state_dict()), folder / "vae.safetensors")
    return transformer_weights(folder / "dit.pt"), autoencoder_weights(folder / "vae.safetensors")


def export(folder: Path, options: Options, **changes: Any) -> Bundle:
    return export_bundle(*weights(folder / "files"), "umt5", folder / "bundle", options, "float32", **changes)


def plans(system: str = "self-forcing") -> dict[str, Plan]:
    """Modules and example inputs of every component, with their weights."""
    chosen, model = presets.system(system), transformer()
    tables = Tables.of(model.state_dict().__getitem__, model.config, chosen.shown)
    latent = (SIZE[0] // 8, SIZE[1] // 8)
    return components(model, tables, autoencoder(), chosen, latent)
