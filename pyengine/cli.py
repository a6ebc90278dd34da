"""The command `pyengine`: generate, export, build, bench, info. Exit codes: 0 done, 2 bad input, 130 interrupted."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from pyengine.errors import PyEngineError

__all__ = ["main"]

EPILOG = """\
examples:
  pyengine generate "a red circle bounces over a blue background" --seconds 60 --output video.mp4
  pyengine generate "a white star spins over a purple background" --output star.gif --seconds 5 --upscale 4
  pyengine build shapes --backend onnxruntime
  pyengine bench shapes --json --no-peers
  pyengine info shapes
"""
# name -> (module, one line). A command's module is imported only when it runs, so that --help is instant.
COMMANDS = {
    "generate": ("pyengine.commands.generate", "make a video that follows a prompt"),
    "build": ("pyengine.commands.build", "compile a bundle for this machine ahead of its first use"),
    "info": (
        "pyengine.commands.info",
        "say what a bundle holds, how it is compiled, and what this machine can run",
    ),
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
    parser = argparse.ArgumentParser(
        prog="pyengine",
        description="Stream long videos from compiled diffusion models.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module, line) in COMMANDS.items():
        known = name in words[:1]
        loaded = import_module(module) if known else None
        description = loaded.__doc__ if loaded else line
        command = commands.add_parser(
            name, help=line, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        if loaded:
            loaded.add_arguments(command)
            command.set_defaults(run=loaded.run)
    parsed = parser.parse_args(words)
    run: Callable[[argparse.Namespace], int] = parsed.run
    try:
        return run(parsed)
    except PyEngineError as error:
        return _fail(parsed, str(error), 2)
    except BrokenPipeError:
        return 0
    except KeyboardInterrupt:
        return _fail(parsed, "interrupted", 130)


def _fail(parsed: argparse.Namespace, message: str, code: int) -> int:
    if getattr(parsed, "json", False):
        print(json.dumps({"error": message}))
    print(f"pyengine: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
