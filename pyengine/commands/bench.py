"""Measure a bundle on this machine: steady frames per second, first frame cold and warm, calls, memory, overhead, and peers.

Peers run the same weights and the same schedule in PyTorch (family shapes) and in plain ONNX Runtime, in turns with the engine; they
need the extra 'export', and --no-peers leaves them out.
"""

from __future__ import annotations

import argparse
import json
import sys

from pyengine.commands.engine_options import add_engine_options, engine_options
from pyengine.measure.bench import bench, table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "bundle", nargs="?", default="shapes", help="a bundled name or a folder (default: shapes)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--no-peers", action="store_true", help="measure the engine alone; needs neither torch nor onnx"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=20.0,
        help="measuring time of the engine and of every peer (default: 20)",
    )
    parser.add_argument(
        "--prompt",
        default=None,
        help="what the video shows (default: the bundle's example); does not change the speed",
    )
    add_engine_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """The command's work: measure, then print JSON or a short table."""

    def report(done: int, total: int, what: str) -> None:
        print(f"[{done}/{total}] {what}", file=sys.stderr, flush=True)

    result = bench(
        arguments.bundle,
        seconds=arguments.seconds,
        options=engine_options(arguments),
        peers=not arguments.no_peers,
        prompt=arguments.prompt,
        progress=report if sys.stderr.isatty() or not arguments.json else None,
    )
    print(json.dumps(result, indent=1) if arguments.json else table(result))
    return 0
