"""Compare torch, portable ONNX in plain ONNX Runtime, and every plan, output by output.

An output passes when it is at most twice as far from float64 as PyTorch itself in the same precision. Exits 1 if one does not.
A bundle whose family cannot make its PyTorch modules again is compared with its own portable ONNX, and the report says so.
Needs the extra 'export'.
"""

from __future__ import annotations

import argparse

from pyengine.bundle.bundle import Bundle
from pyengine.errors import BackendUnavailable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "bundle", nargs="?", default="shapes", help="a bundled name or a folder (default: shapes)"
    )
    parser.add_argument("--backend", default="openvino", help="openvino (default) or onnxruntime")
    parser.add_argument(
        "--precision", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"], help="default: both"
    )


def run(arguments: argparse.Namespace) -> int:
    try:
        from pyengine.export.parity import bundle_parity
    except ImportError as error:
        raise BackendUnavailable(
            f"parity needs more packages ({error}): pip install 'pyengine-video[export]'"
        ) from error
    precisions = ["fp32"] if arguments.backend == "onnxruntime" else arguments.precision
    report = bundle_parity(Bundle.load(arguments.bundle), backend=arguments.backend, precisions=precisions)
    print(report)
    return 0 if report.passed else 1
