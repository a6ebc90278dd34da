"""Arguments of `pyengine export streamingt2v`."""

from __future__ import annotations

import argparse

__all__ = ["add_arguments"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", default=None, help="streaming_t2v.ckpt, or the VidXTend repack")
    source.add_argument(
        "--training", default=None, help="folder of a stage of training.streamingt2v.train: the small model"
    )
    parser.add_argument(
        "--autoencoder", default="shapes", help="with --training: bundle on whose latents it was trained"
    )
    parser.add_argument("--output", required=True, help="folder of the bundle to make")
    parser.add_argument("--enhancer", default=None, help="folder of MS-Vid2Vid-XL; no second stage without")
    parser.add_argument(
        "--first",
        default=None,
        help="folder of damo-vilab/text-to-video-ms-1.7b, which makes a first clip of a text",
    )
    parser.add_argument(
        "--tokenizer", default=None, help="folder of CLIP's tokenizer, that of --first without"
    )
    parser.add_argument(
        "--image-encoder",
        default=None,
        help="file of OpenCLIP's ViT-H/14, for a repack without its image tower",
    )
    parser.add_argument("--negative-prompt", default="", help="prompt of the null branch")
    parser.add_argument("--size", default="256x256", help="height x width in pixels, multiples of 64")
    parser.add_argument("--enhancer-size", default="720x1280", help="height x width of the second stage")
    parser.add_argument(
        "--weights", choices=("fp16", "fp32"), default="fp16", help="what weights are stored in"
    )
