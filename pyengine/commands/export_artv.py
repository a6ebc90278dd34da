"""Arguments of `pyengine export artv`."""

from __future__ import annotations

import argparse

__all__ = ["add_arguments"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--base", default=None, help="diffusers folder of Stable Diffusion 2.1")
    source.add_argument("--training", default=None, help="folder of training.artv.train")
    parser.add_argument("--output", required=True, help="folder of the bundle to make")
    parser.add_argument("--adapter", default=None, help="with --base: file of the weights that make it ART-V")
    parser.add_argument(
        "--untrained",
        action="store_true",
        help="with --base, without --adapter: go on although no frame will see the ones before it",
    )
    parser.add_argument(
        "--autoencoder", default="shapes", help="with --training: bundle on whose latents it was trained"
    )
    parser.add_argument("--negative-prompt", default="", help="with --base: prompt of the null branch")
    parser.add_argument(
        "--size",
        default=None,
        help="with --base: height x width, multiples of 64; that of its training without",
    )
    parser.add_argument(
        "--weights", choices=("fp16", "fp32"), default="fp16", help="what weights are stored in"
    )
