"""Compile a bundle for this machine ahead of its first use, and say which choice was faster.

Plans are kept in the cache and found again by content; whatever changes (the bundle, a version, the processor) makes a new one.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from pyengine.commands.engine_options import add_engine_options, console, load_engine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "bundle", nargs="?", default="shapes", help="a bundled name or a folder (default: shapes)"
    )
    parser.add_argument("--json", action="store_true", help="print the plan's parts as JSON")
    add_engine_options(parser)


def run(arguments: argparse.Namespace) -> int:
    engine = load_engine(arguments, arguments.bundle, quiet=arguments.json)
    parts: list[dict[str, Any]] = [
        {
            "variant": str(part.variant),
            "choice": part.choice,
            "milliseconds": {
                name: None if value is None else round(value * 1e3, 3) for name, value in part.seconds.items()
            },
            "folder": str(part.folder),
        }
        for plan in engine.plans
        for part in plan.parts.values()
    ]
    if arguments.json:
        print(json.dumps({"bundle": engine.bundle.name, "parts": parts}, indent=1))
        return 0
    for part in parts:
        times = ", ".join(
            f"{name} {value} ms" for name, value in part["milliseconds"].items() if value is not None
        )
        console.print(f"{part['variant']}: {part['choice']}{f' ({times})' if times else ''}", highlight=False)
    return 0
