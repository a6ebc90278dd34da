"""The networks by the prefixes of the checkpoint, from a mapping of their sizes. Without one they have the released sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from pyengine.errors import ConfigError

from ...layers.frame_autoencoder import FrameAutoencoder
from .appearance import IMAGE_TOKENS, TEXT_TOKENS, ImageTokens
from .enhancer import Enhancer
from .extractor import Extractor
from .image_encoder import ImageEncoder
from .layers import EPSILON, GROUPS
from .merger import HEAD_SIZE
from .modelscope import LAYERS, ModelScopeUNet, Widths

SCALE = 0.18215
# What the release fixes in its code: (section, key, value). Another value would be another network.
FIXED: tuple[tuple[str, str, Any], ...] = (
    ("base_unet", "norm_num_groups", GROUPS),
    ("base_unet", "layers_per_block", LAYERS),
    ("base_unet", "norm_eps", EPSILON),
    ("cam", "text_tokens", TEXT_TOKENS),
    ("cam", "merger_head_dim", HEAD_SIZE),
    ("cam", "merger_norm_groups", GROUPS),
    ("apm", "text_tokens", TEXT_TOKENS),
    ("apm", "image_tokens", IMAGE_TOKENS),
    ("vae", "scaling_factor", SCALE),
    ("enhancer_unet", "num_res_blocks", LAYERS),
)
VISION = ("image_size", "patch_size", "width", "layers", "head_width", "mlp_ratio", "embed_dim")


def build(config: Mapping[str, Any] | None = None) -> dict[str, nn.Module]:
    """base_model, unet, resampler, image_encoder, vae and enhancer.

    `config` has sections base_unet, cam, apm, image_encoder, vae and enhancer_unet; what is left out has the released size. Raises
    ConfigError for a value that only another network has.
    """
    config = config or {}
    for section, key, value in FIXED:
        got = config.get(section, {}).get(key, value)
        if got != value:
            raise ConfigError(
                f"[streamingt2v] expected {key} {value} in {section} but got {got}; only that is built"
            )
    widths, enhancer = unet_widths(config), enhancer_widths(config)
    return {
        "base_model": ModelScopeUNet(widths, appearance=True, merges=True),
        "unet": Extractor(
            widths, config.get("cam", {}).get("cond_embedding_out_channels", (32, 96, 256, 512))
        ),
        "resampler": ImageTokens(
            config.get("image_encoder", {}).get("embed_dim", 1024),
            config.get("apm", {}).get("resampler_inner_dim", 1280),
            widths.text_channels,
        ),
        "image_encoder": ImageEncoder(
            **{key: value for key, value in config.get("image_encoder", {}).items() if key in VISION}
        ),
        "vae": autoencoder(config),
        "enhancer": Enhancer(enhancer),
    }


def unet_widths(config: Mapping[str, Any]) -> Widths:
    """Of the denoiser and the extractor. Raises ConfigError."""
    given = config.get("base_unet", {})
    stem = given.get("stem_transformer", {})
    return _checked(
        Widths(
            tuple(given.get("block_out_channels", Widths.channels)),
            given.get("attention_head_dim", Widths.head_size),
            stem.get("heads", Widths.stem_heads),
            given.get("cross_attention_dim", Widths.text_channels),
            given.get("in_channels", Widths.latent_channels),
        ),
        least=HEAD_SIZE,
    )


def enhancer_widths(config: Mapping[str, Any]) -> Widths:
    """Of the enhancer. Raises ConfigError."""
    given = config.get("enhancer_unet", {})
    dim = given.get("dim", Widths.channels[0])
    return _checked(
        Widths(
            tuple(dim * mult for mult in given.get("dim_mult", (1, 2, 4, 4))),
            given.get("head_dim", Widths.head_size),
            given.get("num_heads", Widths.stem_heads),
            given.get("context_dim", Widths.text_channels),
        ),
        least=GROUPS,
    )


def autoencoder(config: Mapping[str, Any]) -> FrameAutoencoder:
    """Of the frames of either stage."""
    keys = ("block_out_channels", "norm_num_groups", "layers_per_block", "latent_channels")
    given = config.get("vae", {})
    return FrameAutoencoder(**{key: given[key] for key in keys if key in given})


def _checked(widths: Widths, least: int) -> Widths:
    for channels in widths.channels:
        if channels % GROUPS or channels % widths.head_size or channels % least:
            raise ConfigError(
                f"[streamingt2v] expected channels in multiples of {GROUPS}, {least} and the head size {widths.head_size} but got "
                f"{channels}"
            )
    return widths
