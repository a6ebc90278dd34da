"""A tiny StreamingT2V with random weights, every path of it filled."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from run_folder import made_once
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn

from pyengine.bundle.bundle import MANIFEST, Bundle
from pyengine.export.families.streamingt2v import build
from pyengine.export.families.streamingt2v.appearance import TEXT_TOKENS
from pyengine.export.families.streamingt2v.assembly import Networks, Part, Sizes, Tower, assemble
from pyengine.export.families.streamingt2v.cached import fill
from pyengine.export.families.streamingt2v.export import write_bundle
from pyengine.export.families.streamingt2v.modelscope import ModelScopeUNet
from pyengine.export.families.streamingt2v.networks import autoencoder
from pyengine.export.graph import round_weights

CONFIG: dict[str, Any] = {
    "base_unet": {
        "block_out_channels": [64, 64, 64, 64], "attention_head_dim": 32, "cross_attention_dim": 32,
        "stem_transformer": {"heads": 2},
    },
    "cam": {"cond_embedding_out_channels": [4, 4, 8, 8]},
    "apm": {"resampler_inner_dim": 8},
    "image_encoder": {
        "image_size": 32, "patch_size": 16, "width": 32, "layers": 1, "head_width": 16, "embed_dim": 32,
    },
    "vae": {"block_out_channels": [8, 8, 8, 8], "norm_num_groups": 4, "layers_per_block": 1},
    "enhancer_unet": {"dim": 32, "dim_mult": [1, 1, 1, 1], "head_dim": 16, "num_heads": 2, "context_dim": 32},
}  # fmt: skip
# Smaller, the deepest norms would be over two values, where rounding is all that counts: torch in fp32 is then off by up to 5e-5.
SIZES = Sizes((16, 16), 4, 2, (10, 16), 3)
WORDS = ("[pad]", "[unknown]", "a", "boat", "cat", "on", "the", "lake", "sleeps", "sails")


def filled(module: nn.Module) -> nn.Module:
    """Vectors that begin as zero or one, drawn, so that a forgotten one shows."""
    for name, parameter in module.named_parameters():
        if parameter.ndim < 2:
            nn.init.normal_(parameter, float(name.endswith("weight")), 0.2)
    return module.eval().requires_grad_(False)


@functools.cache
def networks() -> Networks:
    """All but the text towers."""
    torch.manual_seed(3)
    parts = {name: filled(module) for name, module in build(CONFIG).items()}
    base = parts["base_model"]
    assert isinstance(base, ModelScopeUNet)
    return Networks(
        **parts,  # type: ignore[arg-type]
        first=filled(ModelScopeUNet(base.widths)),  # type: ignore[arg-type]
        enhancer_vae=filled(autoencoder(CONFIG)),  # type: ignore[arg-type]
    )


@functools.cache
def parts() -> dict[str, Part]:
    """The components with the weights that the bundle has."""
    root, found = assemble(networks(), SIZES)
    round_weights(root)
    fill(root)
    round_weights(root)
    return found


class TinyTower(nn.Module):
    """Tokens by a table, behind a norm: called like a CLIP text model of `transformers`."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(len(WORDS), 32)
        self.norm = nn.LayerNorm(32)

    def forward(self, input_ids: Tensor) -> Any:
        return SimpleNamespace(last_hidden_state=self.norm(self.tokens(input_ids)))


def tokenizer() -> str:
    """Words by a table."""
    rules = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token=WORDS[1]))
    rules.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    return str(rules.to_str())


@functools.cache
def streamed_networks() -> Networks:
    """What makes a video of a text, without the second stage."""
    torch.manual_seed(4)
    tower = Tower(filled(TinyTower()), torch.zeros(TEXT_TOKENS, dtype=torch.int64))
    return dataclasses.replace(networks(), text=tower, enhancer=None, enhancer_vae=None)


@functools.cache
def streamed_parts() -> dict[str, Part]:
    root, found = assemble(streamed_networks(), SIZES)
    round_weights(root)
    fill(root)
    round_weights(root)
    return found


@functools.cache
def streamed_bundle() -> Bundle:
    """A bundle that makes videos: of a text, a picture or a video."""

    def make(folder: Path) -> None:
        names = set(streamed_parts()) - {"encoder"}
        write_bundle(folder, streamed_parts(), SIZES, streamed_networks(), tokenizer(), only=names)
        manifest = json.loads((folder / MANIFEST).read_text())
        manifest["method"] |= {"steps": 3, "first": {"steps": 2, "guidance": 9.0}}
        (folder / MANIFEST).write_text(json.dumps(manifest))

    return Bundle.load(made_once("streamingt2v-streamed", make))


@functools.cache
def enhanced_bundle() -> Bundle:
    """A bundle of two stages, whose videos begin with frames."""

    def make(folder: Path) -> None:
        torch.manual_seed(4)
        tower = Tower(filled(TinyTower()), torch.zeros(TEXT_TOKENS, dtype=torch.int64))
        own = dataclasses.replace(networks(), text=tower, first=None, enhancer_text=tower)
        root, found = assemble(own, SIZES)
        round_weights(root)
        fill(root)
        round_weights(root)
        write_bundle(folder, found, SIZES, own, tokenizer(), only=set(found) - {"encoder"})
        manifest = json.loads((folder / MANIFEST).read_text())
        manifest["method"]["steps"] = 2
        manifest["method"]["enhancer"]["steps"] = 3
        (folder / MANIFEST).write_text(json.dumps(manifest))

    return Bundle.load(made_once("streamingt2v-enhanced", make))


@functools.cache
def bundle(*names: str) -> Bundle:
    """A bundle of these components alone: the whole takes minutes to export."""
    folder = made_once(
        "-".join(("streamingt2v", *names)),
        lambda folder: write_bundle(folder, parts(), SIZES, networks(), only=names),
    )
    return Bundle.load(folder)
