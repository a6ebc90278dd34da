"""The command `pyengine`: generate, serve, client, export, build, bench, info, doctor.

Exit codes: 0 done, 1 something is missing (doctor), 2 bad input, 130, 143 and 129 interrupted by INT, TERM and HUP.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from importlib import import_module, metadata

from pyengine.errors import PyEngineError
from pyengine.signals import exit_code, pending

__all__ = ["main"]

EPILOG = """\
examples:
  pyengine generate "a red circle bounces over a blue background" --seconds 60 --output video.mp4
  pyengine generate "a white star spins over a purple background" --output star.gif --seconds 5 --upscale 4
  pyengine serve
  pyengine build shapes --backend onnxruntime
  pyengine bench shapes --json --no-peers
  pyengine info shapes
"""
WELCOME = """\
pyengine streams long videos from compiled diffusion models. To try:
  pyengine generate "a red circle bounces over a blue background" --output video.mp4
  pyengine doctor    # what this machine can run
  pyengine --help    # every command
"""
# name -> (module, one line). A command's module is imported only when it runs, so that --help is instant.
COMMANDS = {
    "generate": ("pyengine.commands.generate", "make a video that follows a prompt"),
    "serve": (
        "pyengine.commands.serve",
        "serve live sessions, jobs and a web page (needs the extra 'serve')",
    ),
    "client": (
        "pyengine.commands.client",
        "make a video on a server that runs elsewhere (needs the extra 'serve')",
    ),
    "build": ("pyengine.commands.build", "compile a bundle for this machine ahead of its first use"),
    "info": (
        "pyengine.commands.info",
        "say what a bundle holds, how it is compiled, and what this machine can run",
    ),
    "doctor": ("pyengine.commands.doctor", "check what this machine can run and say what is missing"),
    "parity": (
        "pyengine.commands.parity",
        "compare torch, portable ONNX and every plan (needs the extra 'export')",
    ),
    "bench": (
        "pyengine.commands.bench",
        "measure speed, first frame and memory, beside peers on the same weights",
    ),
    "export": ("pyengine.commands.export", "make a bundle from a trained model (needs the extra 'export')"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parsed = argparse.Namespace()
    try:
        if not words:
            print(WELCOME, end="")
            return 0
        if words[0] in ("--version", "-V"):
            print(f"pyengine {metadata.version('pyengine-video')}")
            return 0
        parsed = _parser(words).parse_args(words)
        run: Callable[[argparse.Namespace], int] = parsed.run
        return run(parsed)
    except PyEngineError as error:
        if pending() is not None:
            # An import that a signal broke off may say that its package is missing.
            return _fail(parsed, "interrupted", exit_code())
        return _fail(parsed, str(error), 2)
    except BrokenPipeError:
        return 0
    except KeyboardInterrupt as interrupt:
        return _fail(parsed, "interrupted", exit_code(interrupt))


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of the command that the first word names; the others only have a line."""
    parser = argparse.ArgumentParser(
        prog="pyengine",
        description="Stream long videos from compiled diffusion models.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", "-V", action="store_true", help="print the version")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module, line) in COMMANDS.items():
        loaded = import_module(module) if name in words[:1] else None
        description = loaded.__doc__ if loaded else line
        command = commands.add_parser(
            name, help=line, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        if loaded:
            loaded.add_arguments(command)
            command.set_defaults(run=loaded.run)
    return parser


def _fail(parsed: argparse.Namespace, message: str, code: int) -> int:
    if getattr(parsed, "json", False):
        print(json.dumps({"error": message}))
    print(f"pyengine: {message}", file=sys.stderr)
    return code
