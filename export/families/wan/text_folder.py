"""UMT5 as `transformers` reads it, from Wan's own file: a folder with its weights, sizes and tokenizer, written one tensor at a time.

A folder that is one already (text_encoder/ and tokenizer/ of diffusers, google/umt5-xxl) is taken as it is.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from pyengine.errors import InputError

from ...checkpoints import Source
from ...checkpoints.write import write_safetensors
from . import renames
from .checkpoint import text_encoder_weights
from .umt5 import EPSILON, FARTHEST

ORIGINAL = "models_t5_umt5-xxl-enc-bf16.pth"
TOKENIZER_FILES = ("spiece.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
TOKENIZER_PLACES = ("google/umt5-xxl", "tokenizer", ".")


def text_source(given: str, target: Path) -> str:
    """What `transformers` is told to read: a name of the hub, or a folder by its absolute path.

    Wan's own file, or a folder that holds it, becomes the folder `target`, which is beside the bundle. Raises InputError.
    """
    path = Path(given)
    original = path / ORIGINAL if path.is_dir() else path
    if original.is_file():
        write_text_encoder(original, target)
        return str(target.resolve())
    if not path.is_dir():
        return given
    if path.name == "text_encoder" and (path.parent / "tokenizer").is_dir():
        path = path.parent  # of diffusers, whose tokenizer lies beside
    return str(path.resolve())


def write_text_encoder(original: Path, target: Path) -> None:
    """The folder, with the tokenizer that lies beside the file. Raises InputError."""
    tokenizer = [
        file
        for place in TOKENIZER_PLACES
        for name in TOKENIZER_FILES
        if (file := original.parent / place / name).is_file()
    ]
    if not any(file.name in TOKENIZER_FILES[:2] for file in tokenizer):
        raise InputError(
            f"[text-encoder] expected UMT5's tokenizer (google/umt5-xxl/{TOKENIZER_FILES[0]}) beside {original} but there is none; "
            "download the whole folder of Wan2.1"
        )
    weights = text_encoder_weights(original)
    config = weights.config
    target.mkdir(parents=True, exist_ok=True)
    sources = {
        renames.umt5(name): source
        for name, source in weights.tensors.sources.items()
        if isinstance(source, Source)
    }
    write_safetensors(target / "model.safetensors", sources)
    settings = {
        "architectures": ["UMT5EncoderModel"],
        "model_type": "umt5",
        "vocab_size": config["vocab_size"],
        "d_model": config["dim"],
        "d_kv": config["dim_attn"] // config["num_heads"],
        "d_ff": config["dim_ffn"],
        "num_heads": config["num_heads"],
        "num_layers": config["encoder_layers"],
        "relative_attention_num_buckets": config["num_buckets"],
        "relative_attention_max_distance": FARTHEST,
        "feed_forward_proj": "gated-gelu",
        "layer_norm_epsilon": EPSILON,
        "tie_word_embeddings": False,
        "is_encoder_decoder": True,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }
    (target / "config.json").write_text(json.dumps(settings, indent=1) + "\n")
    for file in tokenizer:
        shutil.copyfile(file, target / file.name)
