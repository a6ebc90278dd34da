"""A tiny causal Wan as it is downloaded: checkpoint, autoencoder, UMT5 with a tokenizer. And its bundles."""

from __future__ import annotations

import functools
import json
import zlib
from pathlib import Path
from typing import Any

import torch
from run_folder import made_once
from wan_golden import fill, manifest

from pyengine.bundle.bundle import Bundle
from pyengine.export.families.wan import CausalWan, VideoAutoencoder, presets
from pyengine.export.families.wan.checkpoint import autoencoder_weights, transformer_weights
from pyengine.export.families.wan.export import Options, Plan, components, export_bundle
from pyengine.export.families.wan.streaming import Tables

SIZE = (32, 48)
OPTIONS = Options(size=SIZE, bfloat16=False)
LATENT = (SIZE[0] // 8, SIZE[1] // 8)
DIT: dict[str, Any] = {
    "patch_size": [1, 2, 2], "text_len": 8, "in_dim": 16, "out_dim": 16, "dim": 64, "ffn_dim": 96, "freq_dim": 32, "text_dim": 24,
    "num_heads": 4, "num_layers": 2,
}  # fmt: skip
WORDS = ("a", "red", "fox", "runs", "over", "snow", "sea", "waves", "at", "night")


@functools.cache
def transformer() -> CausalWan:
    return fill(CausalWan(**DIT))


@functools.cache
def autoencoder() -> VideoAutoencoder:
    """One residual block per level, and few channels: a tenth of the time of the golden one."""
    return fill(VideoAutoencoder(**{**manifest()["vae"]["config"], "dim": 8, "num_res_blocks": 1}))


def umt5_folder(folder: Path) -> None:
    """A random UMT5 of the family's text channels, and a tokenizer of a few words, as diffusers keeps them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    names = ["<pad>", "</s>", "<unk>", *WORDS]
    tokenizer = Tokenizer(
        models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    marks = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **marks).save_pretrained(folder / "tokenizer")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "d_model": DIT["text_dim"],
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_heads": 4,
    }
    config = UMT5Config(vocab_size=len(names), feed_forward_proj="gated-gelu", **sizes)
    UMT5EncoderModel(config).save_pretrained(folder / "text_encoder")


@functools.cache
def files() -> Path:
    """What is downloaded: dit/self_forcing_dmd.pt, vae/Wan2.1_VAE.pth, and a folder of diffusers."""

    def make(folder: Path) -> None:
        for name in ("dit", "vae"):
            (folder / name).mkdir()
        state = {f"model.{name}": value for name, value in transformer().state_dict().items()}
        torch.save({"generator_ema": state}, folder / "dit" / "self_forcing_dmd.pt")
        sizes = {"num_heads": DIT["num_heads"], "text_len": DIT["text_len"]}
        (folder / "dit" / "config.json").write_text(json.dumps(sizes))
        torch.save(dict(autoencoder().state_dict()), folder / "vae" / "Wan2.1_VAE.pth")
        (folder / "vae" / "config.json").write_text(json.dumps({"num_res_blocks": 1}))
        umt5_folder(folder)

    return made_once("wan-files", make)


@functools.cache
def bundle(options: Options = OPTIONS, only: tuple[str, ...] | None = None) -> Bundle:
    """The exported family, or these of its networks, made once for each set of options."""

    def make(target: Path) -> None:
        parts = (
            transformer_weights(files() / "dit" / "self_forcing_dmd.pt"),
            autoencoder_weights(files() / "vae"),
        )
        export_bundle(*parts, str(files()), target, options, "float32", only)

    return Bundle.load(made_once(f"wan-{zlib.crc32(repr((options, only)).encode())}", make))


def plans(system: str = "self-forcing") -> dict[str, Plan]:
    """Modules and example inputs of every component, with their weights."""
    chosen, model = presets.system(system), transformer()
    tables = Tables.of(model.state_dict().__getitem__, model.config, chosen.shown)
    return components(model, tables, autoencoder(), chosen, LATENT)
