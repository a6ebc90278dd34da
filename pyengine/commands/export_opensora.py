"""Options of `pyengine export opensora`, apart from the exporter so that --help needs no PyTorch."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--checkpoint", required=True, help="folder of hpcai-tech/OpenSora-STDiT-v3")
    parser.add_argument("--vae", required=True, help="folder of hpcai-tech/OpenSora-VAE-v1.2")
    parser.add_argument(
        "--text-encoder",
        required=True,
        help="folder or name of DeepFloyd/t5-v1_1-xxl, read when a prompt is encoded",
    )
    parser.add_argument("--size", default="240x426", help="height x width of the video (default: 240x426)")
    parser.add_argument(
        "--fps", type=float, default=24.0, help="frames per second that the model is told (default: 24)"
    )
    parser.add_argument("--steps", type=int, default=30, help="S, updates of every frame (default: 30)")
    parser.add_argument(
        "--window", type=int, default=30, help="F, noisy latent frames in flight (default: 30)"
    )
    parser.add_argument("--words", type=int, default=None, help="prompt tokens that are kept (default: 300)")
    parser.add_argument(
        "--context",
        default="recompute",
        choices=["recompute", "ring"],
        help="default: recompute, as published",
    )
    parser.add_argument(
        "--warp", default="released", choices=["released", "exact"], help="arithmetic of the timestep warp"
    )
    parser.add_argument(
        "--weights",
        default="fp32",
        choices=["fp32", "bf16"],
        help="how the bundle stores them (default: fp32, lossless)",
    )
    parser.add_argument(
        "--text-precision",
        default="fp32",
        choices=["fp32", "bf16"],
        help="what T5 runs in (default: fp32, as released)",
    )
    parser.add_argument(
        "--decode-batch", type=int, default=1, help="frames that are decoded at once (default: 1)"
    )
    parser.add_argument(
        "--tile", default=None, help="height x width of decoding tiles (default: whole frames)"
    )
    parser.add_argument("--output", required=True, help="folder of the bundle to make")
