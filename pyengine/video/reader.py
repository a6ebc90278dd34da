"""Frames from a video or image file, uint8 [frames, height, width, 3], RGB. Needs PyAV."""

import os
from collections import deque
from collections.abc import Iterator
from typing import Any

import av
import numpy as np
from av.video.reformatter import Interpolation

from pyengine.errors import ConfigError, InputError

__all__ = ["read_image", "read_video"]


def read_video(
    path: str | os.PathLike[str],
    frames: int | None = None,
    size: tuple[int, int] | None = None,
    tail: bool = False,
) -> np.ndarray:
    """Frames of a video (or GIF, or image) file. uint8 [frames, height, width, 3]

    frames  how many: the first, or with `tail` the last; None = all. InputError if there are fewer
    size    (height, width): the middle of each frame, cut to this aspect, is resized; None = as it is
    """
    if frames is not None and frames < 1:
        raise ConfigError(f"frames must be at least 1 but is {frames}")
    if size is not None and min(size) < 1:
        raise ConfigError(f"size must be at least 1 x 1 but is {size[0]} x {size[1]}")
    kept: deque[np.ndarray] = deque(maxlen=frames if tail else None)
    try:
        for frame in _decoded(path):
            kept.append(_fitted(frame, size))
            if not tail and len(kept) == frames:
                break
    except av.error.FFmpegError as error:
        if not kept or tail or isinstance(error, OSError):
            raise InputError(f"cannot read '{path}' as a video or image: {error.strerror}") from error
        # A damaged end matters only if its frames are needed, which the count below decides.
    if not kept or (frames is not None and len(kept) < frames):
        raise InputError(f"'{path}' must hold at least {frames or 1} readable frames but holds {len(kept)}")
    return np.stack(kept)


def read_image(path: str | os.PathLike[str], size: tuple[int, int] | None = None) -> np.ndarray:
    """An image file as a video of one frame. uint8 [1, height, width, 3]; `size` as in read_video."""
    return read_video(path, 1, size)


def _decoded(path: str | os.PathLike[str]) -> Iterator[np.ndarray]:
    """Every frame, uint8 [height, width, 3]."""
    if not os.path.isfile(path):
        raise InputError(f"cannot read '{path}': there is no such file")
    with av.open(os.fspath(path)) as container:
        if not container.streams.video:
            raise InputError(f"cannot read '{path}': it holds no video")
        for frame in container.decode(video=0):
            yield frame.to_ndarray(format="rgb24")


def _fitted(frame: np.ndarray, size: tuple[int, int] | None) -> np.ndarray:
    """The largest middle part of that aspect, resized by area. uint8 [*size, 3]"""
    if size is None or frame.shape[:2] == size:
        return frame
    (height, width), (rows, columns) = frame.shape[:2], size
    cut_rows = max(1, min(height, round(width * rows / columns)))
    cut_columns = max(1, min(width, round(height * columns / rows)))
    top, left = (height - cut_rows) // 2, (width - cut_columns) // 2
    middle = np.ascontiguousarray(frame[top : top + cut_rows, left : left + cut_columns])
    picture: Any = av.VideoFrame.from_ndarray(middle, "rgb24")
    picture = picture.reformat(width=columns, height=rows, interpolation=Interpolation.AREA)
    return picture.to_ndarray(format="rgb24")
