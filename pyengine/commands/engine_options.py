"""Options that every command with an engine shares, and the engine they make."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable
from typing import TypeVar

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as ProgressBar
from rich.text import Text

from pyengine.build.progress import Progress
from pyengine.bundle.bundle import Bundle
from pyengine.engine import Engine
from pyengine.options import EngineOptions

console = Console(stderr=True)
T = TypeVar("T")


# Field of EngineOptions -> what --help says.
HELP = {
    "backend": "openvino (default), onnxruntime or tensorrt",
    "device": "auto (default: the backend's own), cpu or cuda; onnxruntime has both",
    "precision": "auto (default: bf16 where the processor has it), bf16 or fp32; on CUDA also fp16",
    "choice": "auto (default: time both), cut (our kernels) or inline (the backend's)",
    "refit": "TensorRT engines that take new weights without a rebuild",
    "ring": "auto (default), or fp8: the context in 8 bits (device cuda)",
    "threads": "cores to use (default: all)",
    "cache_dir": "where plans are kept (default: PYENGINE_CACHE or the user's cache)",
    "memory_budget": "bytes of compiled networks and buffers beyond which unused networks are dropped (default: no limit)",
}
NUMBERS = ("threads", "memory_budget")


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """One flag for every field of EngineOptions."""
    group = parser.add_argument_group("engine")
    for name, text in HELP.items():
        flag = "--cache" if name == "cache_dir" else f"--{name.replace('_', '-')}"
        if name == "refit":
            group.add_argument(flag, action="store_true", help=text)
        elif name in NUMBERS:
            group.add_argument(flag, type=int, default=None, metavar="N", help=text)
        else:
            default, metavar = (
                (None, "FOLDER") if name == "cache_dir" else (getattr(EngineOptions(), name), None)
            )
            group.add_argument(flag, dest=name, default=default, metavar=metavar, help=text)


def engine_options(arguments: argparse.Namespace) -> EngineOptions:
    """What the flags say. Raises ConfigError."""
    return EngineOptions(**{name: getattr(arguments, name) for name in HELP})


def say(text: str) -> None:
    """A line on stderr, as it is: names of files hold brackets, colons and spaces, which rich would read as markup."""
    console.print(Text(text), soft_wrap=True)


def load_engine(arguments: argparse.Namespace, bundle: str, quiet: bool = False) -> Engine:
    """The engine, with a progress bar on stderr while a plan is built."""
    log = logging.getLogger("pyengine")
    log.setLevel(logging.INFO)
    if not log.handlers:
        log.addHandler(RichHandler(console=console, show_path=False, show_time=False, show_level=False))
    options = engine_options(arguments)
    return with_progress(lambda report: Engine(Bundle.load(bundle), options, report), quiet)


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
