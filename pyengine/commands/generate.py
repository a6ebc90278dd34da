"""Make a video that follows a prompt, written as it is made.

The output's suffix says what it becomes: .mp4, .webm, .gif, or a folder of PNGs where there is none. Interrupting keeps what was
written, playable. --image and --video start from given frames, which open the video.
"""

from __future__ import annotations

import argparse
import contextlib
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

from pyengine.arguments import check_guidance, check_length, check_seed
from pyengine.bundle.bundle import Bundle, Video
from pyengine.commands.engine_options import add_engine_options, console, load_engine, say
from pyengine.errors import BundleError, ConfigError, PromptError
from pyengine.methods import MethodSettings, method_settings
from pyengine.signals import exit_code, held
from pyengine.streaming.enhanced import shown_video
from pyengine.text.prompts import prompts_of
from pyengine.video.letterbox import letterboxed
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
    # Whatever can be refused is refused before anything is built, and before an earlier file is touched.
    bundle = Bundle.load(arguments.bundle)
    preset = {"preset": arguments.preset} if arguments.preset else None
    how = method_settings(bundle.method, preset)
    total = _length(arguments, bundle, how)
    _check(arguments, bundle)
    start = _start(arguments, bundle, total)
    shown = shown_video(bundle, how)
    first_frame = None
    with contextlib.ExitStack() as stack:
        with held():
            writer = stack.enter_context(_writer(arguments, shown))
        try:
            engine = load_engine(arguments, arguments.bundle, quiet=arguments.json)
            bar = stack.enter_context(_progress(arguments))
            task = bar.add_task("", total=total)
            for frame in () if start is None else start:
                with held():
                    writer.write(letterboxed(frame[None], shown.height, shown.width)[0])
                bar.advance(task)
            left = total - writer.frames_written
            options: dict[str, Any] = {
                "seed": arguments.seed,
                "frames": left,
                "guidance": arguments.guidance,
                "start": start,
                "method": preset,
            }
            with engine.stream(arguments.prompt, **options) as stream:
                for frame in stream:
                    with held():
                        writer.write(frame)
                    first_frame = first_frame or time.perf_counter() - started
                    bar.advance(task)
        except KeyboardInterrupt as interrupt:
            with held():
                stack.close()
            return _interrupted(arguments, writer.frames_written, interrupt)
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
        say(
            f"{made['output']}: {made['frames']} frames in {made['seconds']} s "
            f"({made['frames_per_second']} frames/s, first after {made['first_frame_seconds']} s)"
        )
    return 0


def _length(arguments: argparse.Namespace, bundle: Bundle, method: MethodSettings) -> int:
    """Frames to make. Raises ConfigError."""
    video = bundle.video
    is_open = arguments.frames is None and arguments.seconds is None
    if is_open and method.clip_latents is not None and video is not None:
        return video.frames(method.clip_latents)  # such a method makes that and no more
    seconds = DEFAULT_SECONDS if is_open else arguments.seconds
    total = check_length(arguments.frames, seconds, 24.0 if video is None else video.fps)
    assert total is not None
    return total


def _check(arguments: argparse.Namespace, bundle: Bundle) -> None:
    """Refuses what no engine could do: BundleError, PromptError or ConfigError."""
    if bundle.video is None or bundle.latent is None:
        raise BundleError(
            f"bundle '{bundle.name}' describes no video or latent, so it cannot be streamed; export it again"
        )
    if bundle.text is not None:
        prompts_of(bundle).encode(arguments.prompt)
    elif arguments.prompt:
        raise PromptError(f"the model '{bundle.name}' takes no prompt; leave it out")
    check_seed(arguments.seed)
    if arguments.guidance is not None:
        check_guidance(arguments.guidance)


def _start(arguments: argparse.Namespace, bundle: Bundle, total: int) -> np.ndarray | None:
    """Frames to open with, at the model's rate, uint8 [frames, height, width, 3]. Raises InputError, ConfigError."""
    video = bundle.video
    assert video is not None
    size = (video.height, video.width)
    if arguments.image is not None:
        start = read_image(arguments.image, size)
    elif arguments.video is not None:
        start = read_video(arguments.video, size=size, fps=video.fps, at_most=total)
    else:
        return None
    if len(start) >= total:
        raise ConfigError(
            f"expected a length beyond what it starts from, {len(start)} frames or more, but got {total}; raise --seconds"
        )
    return start


def _writer(arguments: argparse.Namespace, video: Video) -> VideoWriter:
    upscale = arguments.upscale if arguments.upscale is not None else (4 if video.height <= SMALL else 1)
    return VideoWriter(
        arguments.output, height=video.height, width=video.width, fps=video.fps, upscale=upscale
    )


def _interrupted(arguments: argparse.Namespace, frames: int, interrupt: KeyboardInterrupt) -> int:
    """Says what was kept, and returns the exit code."""
    if arguments.json:
        print(json.dumps({"error": "interrupted", "output": str(arguments.output), "frames": frames}))
    elif frames:
        say(f"interrupted: {arguments.output} holds the {frames} frames made so far")
    else:
        say("interrupted before the first frame: nothing was written")
    return exit_code(interrupt)


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
