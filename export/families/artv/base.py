"""Stable Diffusion 2.1 from a diffusers folder: sizes from its configurations, tensors one by one from its files, strictly.

base = Base.open("stable-diffusion-2-1/")    # reads configurations, names and shapes alone
base.config                                  # of the UNet, and what it predicts
base.weights                                 # unet.*, vae.* and text_encoder.*
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyengine.errors import InputError
from pyengine.schedule.samplers import Prediction

from ...checkpoints import Source, TensorFile, Weights, open_tensors
from ...checkpoints.names import early_autoencoder, text_model
from .config import UNetConfig

FILES = {
    "unet": ("diffusion_pytorch_model", "config.json"),
    "vae": ("diffusion_pytorch_model", "config.json"),
    "text_encoder": ("model", "config.json"),
    "scheduler": ("", "scheduler_config.json"),
}
ENDINGS = (".safetensors", ".fp16.safetensors", ".bin", ".fp16.bin")
PREDICTS: dict[str, Prediction] = {"epsilon": "epsilon", "v_prediction": "velocity"}
# What the network here does, and another value means another network. By file: key -> the values that mean it, None = absent.
EXPECTED: dict[str, dict[str, tuple[Any, ...]]] = {
    "unet": {
        "_class_name": ("UNet2DConditionModel",),
        "use_linear_projection": (True,),
        "act_fn": ("silu", None),
        "mid_block_type": ("UNetMidBlock2DCrossAttn", None),
        "class_embed_type": (None,),
        "addition_embed_type": (None,),
        "only_cross_attention": (False, None),
        "dual_cross_attention": (False, None),
        "transformer_layers_per_block": (1, None),
        "resnet_time_scale_shift": ("default", None),
        "center_input_sample": (False, None),
        "flip_sin_to_cos": (True, None),
        "freq_shift": (0, None),
        "norm_eps": (1e-5, None),
    },
    "vae": {"_class_name": ("AutoencoderKL",), "act_fn": ("silu", None), "in_channels": (3, None)},
    "scheduler": {"beta_schedule": ("scaled_linear",), "trained_betas": (None,)},
    "text_encoder": {"hidden_act": ("gelu", "quick_gelu")},
}
TEXT_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "hidden_act",
    "layer_norm_eps",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


@dataclass(frozen=True)
class Base:
    """A folder that was read. `vae` and `text` are what their classes take; `sample` is the latent's side in training."""

    folder: Path
    unet: UNetConfig
    vae: Mapping[str, Any]
    text: Mapping[str, Any]
    scale: float
    predicts: Prediction
    betas: tuple[float, float]
    timesteps: int
    sample: int
    weights: Weights

    @classmethod
    def open(cls, folder: str | Path) -> Base:
        """Raises InputError that names the file and what is wrong with it."""
        root = Path(folder)
        if not root.is_dir():
            raise InputError(
                f"[base] expected a diffusers folder of Stable Diffusion 2.1 but {root} is none; download stable-diffusion-2-1"
            )
        unet, vae, text, scheduler = (_configuration(root, part) for part in FILES)
        predicts = scheduler.get("prediction_type", "epsilon")
        if predicts not in PREDICTS:
            raise InputError(
                f"[base] expected prediction_type of epsilon or v_prediction in {root / 'scheduler'} but got {predicts!r}"
            )
        config = _unet(unet, root)
        if text.get("hidden_size") != config.text_width:
            raise InputError(
                f"[base] expected a text encoder of the UNet's width {config.text_width} in {root} but its has {text.get('hidden_size')}"
            )
        return cls(
            root,
            config,
            {
                "block_out_channels": tuple(vae["block_out_channels"]),
                "layers_per_block": vae.get("layers_per_block", 1),
                "latent_channels": vae.get("latent_channels", 4),
                "norm_num_groups": vae.get("norm_num_groups", 32),
            },
            {name: text[name] for name in TEXT_SIZES if name in text},
            float(vae.get("scaling_factor", 0.18215)),
            PREDICTS[predicts],
            (float(scheduler["beta_start"]), float(scheduler["beta_end"])),
            int(scheduler.get("num_train_timesteps", 1000)),
            int(unet.get("sample_size", 64)),
            _weights(root),
        )


def _configuration(root: Path, part: str) -> dict[str, Any]:
    """One configuration, checked against `EXPECTED`."""
    path = root / part / FILES[part][1]
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(
            f"[base] expected {path} as JSON but cannot read it ({error}); download the folder again"
        ) from error
    if not isinstance(found, dict):
        raise InputError(f"[base] expected a JSON object in {path} but got another value; download it again")
    for key, values in EXPECTED[part].items():
        if found.get(key) not in values:
            raise InputError(
                f"[base] expected {key} {values[0]!r} in {path}, as Stable Diffusion 2.1 has it, but got {found.get(key)!r}; "
                "other models are not read here"
            )
    return found


def _unet(found: Mapping[str, Any], root: Path) -> UNetConfig:
    """Its sizes. Raises InputError for a UNet of another shape."""
    path = root / "unet" / "config.json"
    widths = tuple(found.get("block_out_channels", ()))
    last = len(widths) - 1
    down = ["CrossAttnDownBlock2D"] * last + ["DownBlock2D"]
    up = ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * last
    if (
        list(found.get("down_block_types", ())) != down
        or list(found.get("up_block_types", ())) != up
        or found.get("in_channels") != found.get("out_channels")
    ):
        raise InputError(
            f"[base] expected attention at every level but the last, and as many channels out as in, in {path}; other UNets "
            "(inpainting, depth, upscaling) are not read here"
        )
    heads = found.get("attention_head_dim", 8)
    try:
        return UNetConfig(
            channels=int(found["in_channels"]),
            widths=widths,
            layers=int(found.get("layers_per_block", 2)),
            heads=tuple(heads) if isinstance(heads, list | tuple) else (int(heads),) * len(widths),
            text_width=int(found["cross_attention_dim"]),
            groups=int(found.get("norm_num_groups", 32)),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"[base] expected the sizes of a UNet in {path} but {error} is not there") from error


def _weights(root: Path) -> Weights:
    renames: dict[str, Callable[[str], str]] = {
        "unet": str,
        "vae": early_autoencoder,
        "text_encoder": text_model,
    }
    found = {}
    for part, rename in renames.items():
        file = _file(root, part)
        for name in file.tensors:
            if not name.endswith("position_ids"):  # numbers that the tower counts itself
                found[f"{part}.{rename(name)}"] = Source(file, name)
    return Weights(found)


def _file(root: Path, part: str) -> TensorFile:
    stem = FILES[part][0]
    for ending in ENDINGS:
        if (root / part / f"{stem}{ending}").is_file():
            return open_tensors(root / part / f"{stem}{ending}")
    raise InputError(
        f"[base] expected {stem}{ENDINGS[0]} in {root / part} but there is none; download the folder again"
    )
