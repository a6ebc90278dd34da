"""Make a video that follows a prompt, written as it is made.

The output's suffix says what it becomes: .mp4, .webm, .gif, or a folder of PNGs where there is none. Interrupting keeps what was
written, playable. --image and --video start from given frames, which open the video.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

import numpy as np
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from pyengine.commands.engine_options import add_engine_options, console, load_engine
from pyengine.errors import ConfigError
from pyengine.methods import method_settings
from pyengine.streaming.stream import check_length
from pyengine.video.reader import read_image, read_video
from pyengine.video.writer import VideoWriter

DEFAULT_SECONDS = 10.0
SMALL = 64  # rows of frames that a screen shows too small


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "prompt",
        nargs="?",
        default="",
        help='what to show, such as "a red circle bounces over a blue background"; none for a model without text',
    )
    parser.add_argument("--bundle", default="shapes", help="a bundled name or a folder (default: shapes)")
    parser.add_argument(
        "--output", "-o", default="video.mp4", help="file or folder to write (default: video.mp4)"
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--seconds",
        type=float,
        default=None,
        help=f"length of the video (default: {DEFAULT_SECONDS:g}, or the clip)",
    )
    length.add_argument("--frames", type=int, default=None, help="length of the video in frames")
    parser.add_argument(
        "--seed", type=int, default=0, help="the same seed and prompt give the same video (default: 0)"
    )
    parser.add_argument(
        "--guidance", type=float, default=None, help="how strictly to follow the prompt; 1 = no guidance"
    )
    parser.add_argument(
        "--upscale",
        type=int,
        default=None,
        help="whole factor to enlarge each pixel by (default: 4 for frames of at most 64 rows, else 1)",
    )
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--image", default=None, help="start from this picture")
    start.add_argument("--video", default=None, help="continue this video")
    parser.add_argument(
        "--preset", default=None, help="how to sample: one of the bundle's presets (`pyengine info BUNDLE`)"
    )
    parser.add_argument("--json", action="store_true", help="print what was made as JSON")
    add_engine_options(parser)


def run(arguments: argparse.Namespace) -> int:
    started = time.perf_counter()
    seconds = DEFAULT_SECONDS if arguments.seconds is None and arguments.frames is None else arguments.seconds
    check_length(arguments.frames, seconds, 24.0)  # refuse nonsense before anything is built
    engine = load_engine(arguments, arguments.bundle, quiet=arguments.json)
    video = engine.bundle.video
    assert video is not None
    preset = {"preset": arguments.preset} if arguments.preset else None
    clip = method_settings(engine.bundle.method, preset).clip_latents
    if arguments.frames is None and arguments.seconds is None and clip is not None:
        total: int | None = video.frames(clip)  # such a method makes that and no more
    else:
        total = check_length(arguments.frames, seconds, video.fps)
    assert total is not None
    engine.check_prompt(arguments.prompt)  # before a file is made
    start = _start(arguments, (video.height, video.width))
    if start is not None and len(start) >= total:
        raise ConfigError(
            f"expected a length beyond the {len(start)} frames it starts from but got {total}; raise --seconds"
        )
    first_frame = None
    upscale = arguments.upscale if arguments.upscale is not None else (4 if video.height <= SMALL else 1)
    writer = VideoWriter(
        arguments.output, height=video.height, width=video.width, fps=video.fps, upscale=upscale
    )
    with writer, _progress(arguments) as bar:
        task = bar.add_task("", total=total)
        for frame in start if start is not None else ():
            writer.write(frame)
            bar.advance(task)
        left = total - writer.frames_written
        options: dict[str, Any] = {
            "seed": arguments.seed,
            "frames": left,
            "guidance": arguments.guidance,
            "start": start,
            "method": preset,
        }
        try:
            with engine.stream(arguments.prompt, **options) as stream:
                for frame in stream:
                    writer.write(frame)
                    first_frame = first_frame or time.perf_counter() - started
                    bar.advance(task)
        except KeyboardInterrupt:
            writer.close()
            console.print(
                f"interrupted: {arguments.output} holds the {writer.frames_written} frames made so far"
            )
            return 130
    took = time.perf_counter() - started
    made = {
        "output": str(arguments.output),
        "frames": writer.frames_written,
        "seconds": round(took, 2),
        "frames_per_second": round(left / took, 1),
        "first_frame_seconds": round(first_frame or took, 2),
    }
    if arguments.json:
        print(json.dumps(made))
    else:
        console.print(
            f"{made['output']}: {made['frames']} frames in {made['seconds']} s "
            f"({made['frames_per_second']} frames/s, first after {made['first_frame_seconds']} s)"
        )
    return 0


def _start(arguments: argparse.Namespace, size: tuple[int, int]) -> np.ndarray | None:
    """Frames to open with, uint8 [frames, height, width, 3]."""
    if arguments.image is not None:
        return read_image(arguments.image, size)
    if arguments.video is not None:
        return read_video(arguments.video, size=size)
    return None


class _Speed(ProgressColumn):
    """Frames per second so far."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or task.finished_speed or 0:.0f} frames/s")


def _progress(arguments: argparse.Namespace) -> Progress:
    columns = (
        TextColumn("generating"),
        BarColumn(),
        MofNCompleteColumn(),
        _Speed(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, disable=arguments.json or not sys.stderr.isatty())
