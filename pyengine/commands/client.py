"""Make a video on a server that `pyengine serve` runs, written as it comes.

Over the live socket: when the server is restarted meanwhile, it goes on with the next frame. Needs the extra 'serve'.
"""

from __future__ import annotations

import argparse
import json
import os

from pyengine.arguments import check_length, check_seed
from pyengine.commands.engine_options import say
from pyengine.errors import BackendUnavailable
from pyengine.signals import held
from pyengine.video.writer import VideoWriter

DEFAULT_SECONDS = 10.0
FPS = 24.0  # by which a length in seconds is counted before the server has said its own


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("url", help="the server's address, such as http://127.0.0.1:8008")
    parser.add_argument("prompt", nargs="?", default="", help="what to show; none for a model without text")
    parser.add_argument(
        "--output", "-o", default="video.mp4", help="file or folder to write (default: video.mp4)"
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--seconds", type=float, default=None, help=f"length of the video (default: {DEFAULT_SECONDS:g})"
    )
    length.add_argument("--frames", type=int, default=None, help="length of the video in frames")
    parser.add_argument(
        "--seed", type=int, default=0, help="the same seed and prompt give the same video (default: 0)"
    )
    parser.add_argument(
        "--upscale", type=int, default=1, help="whole factor to enlarge each pixel by (default: 1)"
    )
    parser.add_argument("--token", default=None, help="what the server asks for (default: PYENGINE_TOKEN)")
    parser.add_argument("--json", action="store_true", help="print what was made as JSON")


def run(arguments: argparse.Namespace) -> int:
    try:
        from pyengine.serve.client import LiveClient
    except ModuleNotFoundError as error:
        raise BackendUnavailable(
            f"the client needs the package '{error.name}'; install it with pip install 'pyengine-video[serve]'"
        ) from error
    is_open = arguments.frames is None and arguments.seconds is None
    total = check_length(arguments.frames, DEFAULT_SECONDS if is_open else arguments.seconds, FPS)
    assert total is not None
    token = arguments.token or os.environ.get("PYENGINE_TOKEN") or None
    client = LiveClient(arguments.url, token)
    writer = None
    try:
        for received in client.frames(arguments.prompt, frames=total, seed=check_seed(arguments.seed)):
            with held():
                if writer is None:
                    height, width = received.frame.shape[:2]
                    writer = VideoWriter(
                        arguments.output,
                        height=height,
                        width=width,
                        fps=client.info["fps"],
                        upscale=arguments.upscale,
                    )
                writer.write(received.frame)
    finally:
        with held():
            client.close()
            if writer is not None:
                writer.close()
    made = {"output": str(arguments.output), "frames": total, "resumed": client.resumed}
    if arguments.json:
        print(json.dumps(made))
    else:
        again = f", resumed {client.resumed} times" if client.resumed else ""
        say(f"{arguments.output}: {total} frames{again}")
    return 0
