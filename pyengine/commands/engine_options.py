"""Options that every command with an engine shares, and the engine they make."""

from __future__ import annotations

import argparse
import logging
import sys
from typing import Any

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import pyengine

console = Console(stderr=True)


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """--backend, --precision, --choice, --threads, --cache."""
    group = parser.add_argument_group("engine")
    group.add_argument("--backend", default="openvino", help="openvino (default) or onnxruntime")
    group.add_argument(
        "--precision", default="auto", help="auto (default: bf16 where the processor has it), bf16 or fp32"
    )
    group.add_argument(
        "--choice",
        default="auto",
        help="auto (default: time both), cut (our kernels) or inline (the backend's)",
    )
    group.add_argument("--threads", type=int, default=None, help="cores to use (default: all)")
    group.add_argument(
        "--cache",
        default=None,
        metavar="FOLDER",
        help="where plans are kept (default: PYENGINE_CACHE or the user's cache)",
    )


def load_engine(arguments: argparse.Namespace, bundle: str, quiet: bool = False) -> pyengine.Engine:
    """The engine, with a progress bar on stderr while a plan is built."""
    log = logging.getLogger("pyengine")
    log.setLevel(logging.INFO)
    if not log.handlers:
        log.addHandler(RichHandler(console=console, show_path=False, show_time=False, show_level=False))
    options: dict[str, Any] = {
        "backend": arguments.backend,
        "precision": arguments.precision,
        "choice": arguments.choice,
        "threads": arguments.threads,
        "cache_dir": arguments.cache,
    }
    if quiet or not sys.stderr.isatty():
        return pyengine.load(bundle, **options)
    columns = (
        TextColumn("building"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
    )
    bar = Progress(*columns, console=console, transient=True)
    task = None

    def report(done: int, total: int, what: str) -> None:
        nonlocal task
        if task is None:
            bar.start()
            task = bar.add_task(what, total=total)
        bar.update(task, completed=done, total=total, description=what)

    try:
        return pyengine.load(bundle, progress=report, **options)
    finally:
        bar.stop()
