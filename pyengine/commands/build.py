"""Compile a bundle for this machine ahead of its first use, and say which choice was faster.

With --target the plan is for GPUs that are not here: `--backend tensorrt --target sm89,sm120` needs no GPU at all, and the folder
of plans is then copied to the machine that has one. With --max-streams it also has what `engine.batch` runs.

Plans are kept in the cache and found again by content; whatever changes (the bundle, a version, the processor) makes a new one.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from pyengine.build.targets import build_targets
from pyengine.build.variants import second_stage_of
from pyengine.commands.engine_options import (
    add_engine_options,
    engine_options,
    load_engine,
    say,
    with_progress,
)
from pyengine.errors import ConfigError
from pyengine.plans.plan import Plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "bundle", nargs="?", default="shapes", help="a bundled name or a folder (default: shapes)"
    )
    parser.add_argument("--json", action="store_true", help="print the plan's parts as JSON")
    parser.add_argument(
        "--target",
        default=None,
        metavar="SM",
        help="build for these GPUs instead, such as sm89,sm120 (tensorrt)",
    )
    parser.add_argument(
        "--max-streams",
        type=int,
        default=1,
        metavar="N",
        help="also build for batches of up to N streams, and say whether each gives exactly what it gives alone",
    )
    add_engine_options(parser)


def run(arguments: argparse.Namespace) -> int:
    if arguments.target is not None:
        if arguments.max_streams != 1:
            raise ConfigError(
                "expected --target or --max-streams but got both; batches are tried on their own GPU"
            )
        bundle, plans = arguments.bundle, _for_targets(arguments)
    else:
        engine = load_engine(arguments, arguments.bundle, quiet=arguments.json)
        if arguments.max_streams != 1:
            engine.batch(arguments.max_streams).close()
        if (second := second_stage_of(engine.bundle)) is not None:
            engine.second_stage().prepare(second[1])
        bundle, plans = engine.bundle.name, engine.plans
    parts: list[dict[str, Any]] = [
        {
            "variant": str(part.variant),
            "device": plan.target,
            "choice": part.choice,
            "milliseconds": {
                name: None if value is None else round(value * 1e3, 3) for name, value in part.seconds.items()
            },
            "exact": part.exact,
            "folder": str(part.folder),
        }
        for plan in plans
        for part in plan.parts.values()
    ]
    if arguments.json:
        print(json.dumps({"bundle": bundle, "parts": parts}, indent=1))
        return 0
    for part in parts:
        times = ", ".join(
            f"{name} {value} ms" for name, value in part["milliseconds"].items() if value is not None
        )
        exact = {None: "", True: ", streams exact", False: ", streams alike but for rounding"}[part["exact"]]
        say(f"{part['variant']}: {part['choice']}{f' ({times})' if times else ''}{exact}")
    return 0


def _for_targets(arguments: argparse.Namespace) -> list[Plan]:
    options = engine_options(arguments)
    targets = [target.strip() for target in arguments.target.split(",")]
    return with_progress(
        lambda report: build_targets(arguments.bundle, targets, options, report), arguments.json
    )
