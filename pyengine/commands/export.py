"""Make a bundle from a trained model: ONNX files with one weights file, manifest and tokenizer. Needs the extra 'export'."""

from __future__ import annotations

import argparse
from importlib import import_module
from typing import Any

from pyengine.commands import export_artv, export_opensora, export_streamingt2v, export_wan
from pyengine.errors import BackendUnavailable

FAMILIES = {
    "shapes": "pyengine.export.families.shapes.export",
    "opensora": "pyengine.export.families.opensora.export",
    "lvdm": "pyengine.export.families.lvdm.export",
    "streamingt2v": "pyengine.export.families.streamingt2v.export",
    "wan": "pyengine.export.families.wan.export",
    "artv": "pyengine.export.families.artv.export",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    families = parser.add_subparsers(dest="family", metavar="FAMILY", required=True)
    shapes = families.add_parser("shapes", help="the small text-to-video model that ships")
    shapes.add_argument("--autoencoder", default=None, help="training folder of the autoencoder")
    shapes.add_argument("--denoiser", default=None, help="training folder of the denoiser")
    shapes.add_argument("--bundle", default=None, help="bundle to take from what has no training folder")
    shapes.add_argument("--output", required=True, help="folder of the bundle to make")
    opensora = families.add_parser("opensora", help="PA-VDM on Open-Sora v1.2, from its released checkpoints")
    export_opensora.add_arguments(opensora)
    lvdm = families.add_parser("lvdm", help="LVDM: two-level long video, short clips, text to video")
    lvdm.add_argument("--output", required=True, help="folder of the bundle to make")
    lvdm.add_argument("--training", default=None, help="training folder of lvdm.train_shapes")
    lvdm.add_argument(
        "--autoencoder", default="shapes", help="with --training: bundle on whose latents it was trained"
    )
    lvdm.add_argument(
        "--configuration", default=None, help="sky, taichi, ucf, text2video, or long (two levels)"
    )
    lvdm.add_argument(
        "--checkpoint", nargs="+", default=None, help="released .ckpt, two for long; random weights without"
    )
    lvdm.add_argument(
        "--weights", choices=("ema", "raw"), default="raw", help="which of a checkpoint's weights"
    )
    lvdm.add_argument("--clip", default=None, help="folder of openai/clip-vit-large-patch14, for text2video")
    streamingt2v = families.add_parser(
        "streamingt2v", help="StreamingT2V: chunk by chunk with conditional attention, and its enhancer"
    )
    export_streamingt2v.add_arguments(streamingt2v)
    wan = families.add_parser("wan", help="causal Wan 2.1: Self-Forcing, CausVid, Rolling Forcing, LongLive")
    export_wan.add_arguments(wan)
    artv = families.add_parser(
        "artv", help="ART-V: frame by frame, on Stable Diffusion 2.1 or the small model"
    )
    export_artv.add_arguments(artv)


def run(arguments: argparse.Namespace) -> int:
    return int(_module(arguments.family).run(arguments))


def _module(family: str) -> Any:
    try:
        return import_module(FAMILIES[family])
    except ImportError as error:
        raise BackendUnavailable(
            f"exporting needs more packages ({error}): pip install 'pyengine-video[export]'"
        ) from error
