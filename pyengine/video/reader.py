"""Frames from a video or picture file, uint8 [frames, height, width, 3], sRGB. What a file is, its content says, not its name.

Files are untrusted: nothing but the file itself is opened, sizes are checked before they are decoded, and every failure is an InputError.
"""

from __future__ import annotations

import os
import stat
from collections import deque
from collections.abc import Iterator
from typing import Any

import av
import numpy as np
from PIL import Image, UnidentifiedImageError

from pyengine.arguments import finite, printable, whole
from pyengine.errors import ConfigError, InputError, PyEngineError
from pyengine.video.containers import video_frames
from pyengine.video.pacing import at_rate, every
from pyengine.video.pictures import picture_kind, pictures

__all__ = ["read_image", "read_video"]

MOST_BYTES = 2**32  # of the frames that are returned
MOST_FRAMES = 2**31 - 1


def read_video(
    path: str | os.PathLike[str],
    frames: int | None = None,
    size: tuple[int, int] | None = None,
    tail: bool = False,
    *,
    fps: float | None = None,
    at_most: int | None = None,
) -> np.ndarray:
    """Frames of a video, animation or picture file. uint8 [frames, height, width, 3]

    frames   how many: the first, or with `tail` the last; None = all. InputError if there are fewer
    size     (height, width): the middle of each frame, cut to this aspect, is resized; None = as it is shown
    fps      take frames by time, so many per second: the video keeps its pace and its pauses; None = each frame once
    at_most  with frames None: the first so many, or fewer if there are no more

    Frames are turned and stretched as the file's tags say, and what is transparent is white. Raises InputError for a file that cannot
    be read, is damaged where it is needed, or is too large, and ConfigError for arguments that cannot work.
    """
    frames = None if frames is None else whole("frames", frames, 1, MOST_FRAMES)
    at_most = None if at_most is None else whole("at_most", at_most, 1)
    if not isinstance(tail, bool):
        raise ConfigError(f"tail must be True or False but is of type {type(tail).__name__}")
    fps = None if fps is None else _rate(fps)
    size = None if size is None else _size(size)
    kept: deque[np.ndarray] = deque(maxlen=frames if tail else None)
    wanted = None if tail else frames or at_most
    failure: Exception | None = None
    try:
        for frame in _decoded(path, fps):
            kept.append(_fitted(frame, kept[0].shape[:2] if kept else size))  # a video may change its size
            if len(kept) * kept[0].nbytes > MOST_BYTES:
                raise InputError(
                    "its frames must fit 4 GiB; take fewer or smaller ones, by `frames` and `size`, or cut it first"
                )
            if len(kept) == wanted:
                break
    # What a parser of untrusted bytes may raise has no end: OSError, SyntaxError, struct.error, MemoryError...
    except Exception as error:
        failure = error
    is_needed = not kept or frames is None or tail  # the end, where a cut or damaged file fails
    if failure is not None and (is_needed or isinstance(failure, PyEngineError)):
        raise InputError(f"cannot read '{_named(path)}': {_reason(failure)}") from failure
    if not kept or (frames is not None and len(kept) < frames):
        raise InputError(
            f"'{_named(path)}' must hold at least {frames or 1} readable frames but holds {len(kept)}"
        ) from failure
    return np.stack(kept)


def read_image(path: str | os.PathLike[str], size: tuple[int, int] | None = None) -> np.ndarray:
    """A picture file, or the first frame of a video. uint8 [1, height, width, 3]; `size` and errors as in read_video."""
    return read_video(path, 1, size)


def _decoded(path: str | os.PathLike[str], fps: float | None) -> Iterator[np.ndarray]:
    """Every frame, or what is shown at that rate. uint8 [height, width, 3]"""
    if not isinstance(path, str | bytes | os.PathLike) or b"\0" in os.fsencode(path):
        raise InputError("expected the name of a file")
    # A named pipe would be waited for.
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise InputError("expected a file, not a folder or a device")
    with open(path, "rb") as file:
        head = file.read(16)
        file.seek(0)
        kind = picture_kind(head)
        frames = video_frames(file) if kind is None else pictures(file, kind)
        # A picture of one frame has no pace.
        yield from every(frames) if fps is None else at_rate(frames, fps)


def _fitted(frame: np.ndarray, size: tuple[int, int] | None) -> np.ndarray:
    """The largest middle part of that aspect, resized. uint8 [*size, 3]"""
    if size is None or frame.shape[:2] == size:
        return frame
    (height, width), (rows, columns) = frame.shape[:2], size
    cut_rows = max(1, min(height, round(width * rows / columns)))
    cut_columns = max(1, min(width, round(height * columns / rows)))
    top, left = (height - cut_rows) // 2, (width - cut_columns) // 2
    middle = np.ascontiguousarray(frame[top : top + cut_rows, left : left + cut_columns])
    shrinks = rows <= cut_rows and columns <= cut_columns
    how = (
        Image.Resampling.BOX if shrinks else Image.Resampling.BICUBIC
    )  # BOX: the mean over each pixel's area
    return np.array(Image.fromarray(middle).resize((columns, rows), how))


def _rate(fps: Any) -> float:
    rate = finite("fps", fps)
    if not 0 < rate <= 1000:
        raise ConfigError(f"fps must be above 0 and at most 1000 but is {rate:g}")
    return rate


def _size(size: Any) -> tuple[int, int]:
    try:
        rows, columns = size
    except (TypeError, ValueError) as error:
        raise ConfigError(f"size must be (height, width) but is {size!r}") from error
    rows, columns = whole("height of size", rows), whole("width of size", columns)
    if min(rows, columns) < 1:
        raise ConfigError(f"size must be at least 1 x 1 but is {rows} x {columns}")
    if rows * columns * 3 > MOST_BYTES:
        raise ConfigError(f"size must be of at most 4 GiB per frame but is {rows} x {columns}")
    return rows, columns


def _named(path: Any) -> str:
    return (
        printable(os.fsdecode(path)) if isinstance(path, str | bytes | os.PathLike) else type(path).__name__
    )


def _reason(error: Exception) -> str:
    """Why, in one sentence."""
    if isinstance(error, PyEngineError):
        return str(error)
    if isinstance(error, UnidentifiedImageError):  # its text names a Python object
        return "it is damaged"
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, av.error.FFmpegError) and not isinstance(error, OSError):
        return f"it is no video that is supported, or damaged ({error.strerror})"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"it is damaged ({' '.join(str(error).split()) or type(error).__name__})"
