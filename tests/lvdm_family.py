"""A tiny two-level LVDM with random weights, and its bundle."""

from __future__ import annotations

import functools
import tempfile
from dataclasses import replace
from pathlib import Path

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
def _home() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


@functools.cache
def bundle() -> Bundle:
    method = long_method(modules()) | {"steps": 2}
    return export_bundle(modules(), Path(_home().name) / "bundle", "lvdm-tiny", method)
