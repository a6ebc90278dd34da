"""A tiny two-level LVDM with random weights, and its bundle."""

from __future__ import annotations

import functools
from dataclasses import replace

from run_folder import made_once

from pyengine.bundle.bundle import Bundle
from pyengine.export.families.lvdm.export import Modules, export_bundle, long_method, random_modules
from pyengine.export.families.lvdm.released import Configuration

UNET = {
    "in_channels": 5, "out_channels": 4, "model_channels": 32, "channel_mult": [1], "num_res_blocks": 1,
    "attention_resolutions": [1], "num_heads": 2, "num_classes": 251, "use_scale_shift_norm": True,
    "padding_t": 0, "temporal_length": 4, "use_relative_position": True,
}  # fmt: skip
AUTOENCODER = {"n_hiddens": 16, "downsample": [2, 2, 2]}
LATENT_SIZE = (4, 4)
PER_LATENT, STRIDE = 2, 4


@functools.cache
def modules() -> Modules:
    short = Configuration(UNET, AUTOENCODER, 0.5, 0.1)
    levels = {
        "prediction": short,
        "interpolation": replace(short, unet=UNET | {"temporal_length": 5}, clip_frames=5),
    }
    made = random_modules(levels, LATENT_SIZE)
    made.autoencoder.decoder.conv_out.conv.weight.data *= 4  # so that pixels fill their range
    return made.rounded()


@functools.cache
def text_modules() -> Modules:
    """Text to video, without a text tower: the denoiser reads keys and values."""
    unet = UNET | {"in_channels": 4, "num_classes": None, "context_dim": 32, "use_temporal_transformer": True}
    unet |= {"use_scale_shift_norm": False, "num_heads": 4}
    autoencoder = {"ch": 32, "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1}
    made = Configuration(unet, autoencoder, 0.18215, 0.0, clip_frames=3, is_text=True)
    return random_modules({"prediction": made}, LATENT_SIZE).rounded()


@functools.cache
def bundle() -> Bundle:
    method = long_method(modules()) | {"steps": 2}
    folder = made_once("lvdm-tiny", lambda folder: export_bundle(modules(), folder, "lvdm-tiny", method))
    return Bundle.load(folder)


@functools.cache
def text_bundle() -> Bundle:
    name, method = "lvdm-text-tiny", {"name": "clip"}
    folder = made_once(
        name, lambda folder: export_bundle(text_modules(), folder, name, method, only=("prediction",))
    )
    return Bundle.load(folder)
