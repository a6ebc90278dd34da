"""Checkpoint folders of a tiny Open-Sora, with real names and layouts: denoiser, autoencoder, T5 with a tokenizer. And its bundle."""

from __future__ import annotations

import functools
import json
import zlib
from pathlib import Path
from typing import Any

import opensora_golden as golden
import torch
from run_folder import made_once
from safetensors.torch import save_file

from pyengine.bundle.bundle import Bundle
from pyengine.export.families.opensora import STDiT3, VideoAutoencoder
from pyengine.export.families.opensora.export import Options, export_bundle

WORDS = (
    "a",
    "red",
    "fox",
    "runs",
    "over",
    "snow",
    "sea",
    "waves",
    "aesthetic",
    "score:",
    "6.5.",
    "at",
    "night",
)
SIZE = (40, 56)  # latents of 5 x 7: the odd sides of the original's numbers
OPTIONS = Options(size=SIZE, steps=6, noisy_frames=15)


def t5_folder(folder: Path) -> Path:
    """A random T5 encoder of the family's caption channels, and a tokenizer of a few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    names = ["<pad>", "</s>", "<unk>", *WORDS]
    tokenizer = Tokenizer(
        models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    width = golden.manifest()["stdit3"]["config"]["caption_channels"]
    sizes: dict[str, Any] = {"d_model": width, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    config = T5Config(vocab_size=len(names), feed_forward_proj="gated-gelu", **sizes)
    T5EncoderModel(config).save_pretrained(folder)
    return folder


def checkpoint(folder: Path, module: torch.nn.Module, config: dict[str, Any]) -> Path:
    """A folder as downloaded: config.json and model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: value.contiguous() for name, value in module.state_dict().items()},
        folder / "model.safetensors",
    )
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@functools.cache
def denoiser() -> STDiT3:
    return golden.stdit3()


@functools.cache
def autoencoder() -> VideoAutoencoder:
    """One residual block per level: half the time of the golden one."""
    return golden.fill(VideoAutoencoder(**autoencoder_config()))  # type: ignore[return-value]


def autoencoder_config() -> dict[str, Any]:
    spatial = {"block_out_channels": [8, 8, 16, 16], "layers_per_block": 1, "norm_num_groups": 4}
    temporal = {"filters": 8, "num_res_blocks": 1, "num_groups": 4}
    return {"spatial": spatial, "temporal": temporal}


@functools.cache
def checkpoints() -> dict[str, Path]:
    """The three folders of a download."""

    def make(folder: Path) -> None:
        config = {"model_type": "STDiT3", **golden.manifest()["stdit3"]["config"]}
        checkpoint(folder / "checkpoint", denoiser(), config)
        checkpoint(folder / "vae", autoencoder(), autoencoder_config())
        t5_folder(folder / "text_encoder")

    folder = made_once("opensora-checkpoints", make)
    return {name: folder / name for name in ("checkpoint", "vae", "text_encoder")}


@functools.cache
def bundle(options: Options = OPTIONS, only: tuple[str, ...] | None = None) -> Bundle:
    """The exported family, or these of its networks, made once for each set of options."""
    folders = checkpoints()
    text = str(folders["text_encoder"])
    name = f"opensora-{zlib.crc32(repr((options, only)).encode())}"
    return Bundle.load(
        made_once(
            name,
            lambda target: export_bundle(
                folders["checkpoint"], folders["vae"], text, target, options, only=only
            ),
        )
    )
