"""Options that every command with an engine shares, and the engine they make."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as ProgressBar
from rich.text import Text

import pyengine
from pyengine.build.builder import Progress

console = Console(stderr=True)
T = TypeVar("T")


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """--backend, --device, --precision, --choice, --ring, --threads, --refit, --cache."""
    group = parser.add_argument_group("engine")
    group.add_argument("--backend", default="openvino", help="openvino (default), onnxruntime or tensorrt")
    group.add_argument(
        "--device",
        default="auto",
        help="auto (default: the backend's own), cpu or cuda; onnxruntime has both",
    )
    group.add_argument(
        "--precision", default="auto", help="auto (default: bf16 where the processor has it), bf16 or fp32"
    )
    group.add_argument(
        "--choice",
        default="auto",
        help="auto (default: time both), cut (our kernels) or inline (the backend's)",
    )
    group.add_argument(
        "--refit", action="store_true", help="TensorRT engines that take new weights without a rebuild"
    )
    group.add_argument(
        "--ring", default="auto", help="auto (default), or fp8: the context in 8 bits (device cuda)"
    )
    group.add_argument("--threads", type=int, default=None, help="cores to use (default: all)")
    group.add_argument(
        "--cache",
        default=None,
        metavar="FOLDER",
        help="where plans are kept (default: PYENGINE_CACHE or the user's cache)",
    )


def say(text: str) -> None:
    """A line on stderr, as it is: names of files hold brackets, colons and spaces, which rich would read as markup."""
    console.print(Text(text), soft_wrap=True)


def load_engine(arguments: argparse.Namespace, bundle: str, quiet: bool = False) -> pyengine.Engine:
    """The engine, with a progress bar on stderr while a plan is built."""
    log = logging.getLogger("pyengine")
    log.setLevel(logging.INFO)
    if not log.handlers:
        log.addHandler(RichHandler(console=console, show_path=False, show_time=False, show_level=False))
    options: dict[str, Any] = {
        "backend": arguments.backend,
        "device": arguments.device,
        "precision": arguments.precision,
        "choice": arguments.choice,
        "threads": arguments.threads,
        "refit": arguments.refit,
        "ring": arguments.ring,
        "cache_dir": arguments.cache,
    }
    return with_progress(lambda report: pyengine.load(bundle, progress=report, **options), quiet)


def with_progress(work: Callable[[Progress | None], T], quiet: bool) -> T:
    """What `work` returns; it is given a function that moves a progress bar, or None."""
    if quiet or not sys.stderr.isatty():
        return work(None)
    columns = (
        TextColumn("building"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
    )
    bar = ProgressBar(*columns, console=console, transient=True)
    task = None

    def report(done: int, total: int, what: str) -> None:
        nonlocal task
        if task is None:
            bar.start()
            task = bar.add_task(what, total=total)
        bar.update(task, completed=done, total=total, description=what)

    try:
        return work(report)
    finally:
        bar.stop()
