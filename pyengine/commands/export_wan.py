"""Arguments of `pyengine export wan`."""

from __future__ import annotations

import argparse

__all__ = ["add_arguments"]

SYSTEMS = ("self-forcing", "causvid", "rolling-forcing", "longlive")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint",
        required=True,
        help="self_forcing_dmd.pt, CausVid's model.pt, rolling_forcing_dmd.pt, longlive_base.pt, or a folder of Wan or diffusers",
    )
    parser.add_argument("--vae", required=True, help="Wan2.1_VAE.pth, or a folder of Wan or diffusers")
    parser.add_argument(
        "--text-encoder",
        required=True,
        help="folder of Wan2.1 with models_t5_umt5-xxl-enc-bf16.pth and google/umt5-xxl, or what transformers reads as UMT5",
    )
    parser.add_argument("--system", required=True, choices=SYSTEMS, help="what the checkpoint was trained as")
    parser.add_argument(
        "--lora", default=None, help="LongLive's models/lora.pt; 'merged' where the checkpoint holds it"
    )
    parser.add_argument("--size", default="480x832", help="height x width in pixels, multiples of 16")
    parser.add_argument(
        "--raw", action="store_true", help="a trainer's weights themselves, not their average"
    )
    parser.add_argument(
        "--weights",
        choices=("bf16", "fp32"),
        default="bf16",
        help="what the transformer's weights are stored in (default: bf16, as they are run)",
    )
    parser.add_argument(
        "--text-precision",
        choices=("bf16", "fp32"),
        default="bf16",
        help="what UMT5 runs in (default: bf16, as released)",
    )
    parser.add_argument("--output", required=True, help="folder of the bundle to make")
