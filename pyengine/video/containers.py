"""Video files by PyAV: turned and stretched as their headers say, over white where they are transparent, each frame with its time.

A file is read through Python, so its name is never taken for an address or a pattern. Only the containers listed here are opened,
none of which refers to other files, and no protocol is allowed: a playlist is refused before anything that it names is touched.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, BinaryIO

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

from pyengine.errors import InputError
from pyengine.video.pacing import LONGEST, Shown

__all__ = ["video_frames"]

DEMUXERS = "mov,matroska,avi,mpegts,mpeg,ogg,flv,asf,ivf,yuv4mpegpipe"
MOST_PIXELS = 2**26  # of a frame: 8192 x 8192
OPTIONS = {"format_whitelist": DEMUXERS, "protocol_whitelist": "none", "max_pixels": str(MOST_PIXELS)}
MOST_STRETCH = 16  # a pixel aspect beyond it is damage
TRUSTED_MATRICES = (1, 4, 5, 6, 7, 9)  # AVCOL_SPC_* that swscale converts
BT709, UNSPECIFIED, RGB = 1, 2, 0
HDR = (16, 18)  # AVCOL_TRC_* of PQ and HLG, which phones film in: brought to the range of a usual screen
SCALING = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
HD_ROWS = 720  # what is untagged is BT.709 from here on, BT.601 below, as every player has it


def video_frames(file: BinaryIO) -> Iterator[Shown]:
    """Every frame of the first video in the file, in the order shown.

    Raises InputError if it holds no video, is too large or ends before its time, and av.error.FFmpegError where it is damaged.
    """
    with av.open(file, "r", options=OPTIONS, metadata_errors="replace") as container:
        stream = next((video for video in container.streams.video if not _is_cover(video)), None)
        if stream is None:
            raise InputError("it holds no video")
        codec: Any = stream.codec_context
        if codec.width * codec.height > MOST_PIXELS:
            raise InputError(
                f"its frames must have at most {MOST_PIXELS} pixels but have {codec.width} x {codec.height}"
            )
        codec.options = {"max_pixels": str(MOST_PIXELS)}
        aspect, scaler = _aspect(stream), VideoReformatter()  # which prepares tables: one for all frames
        rate = stream.average_rate or stream.guessed_rate
        usual = float(1 / rate) if rate else 1 / 25
        start: float | None = None
        end = origin = duration = 0.0
        for frame in _decoded(container, stream):
            last = start
            if frame.pts is not None and frame.time_base:
                start = float(frame.pts * frame.time_base)
            if last is not None and (frame.pts is None or start is None or start <= last):
                start = last + duration
            start = 0.0 if start is None else start
            origin = start if last is None else origin
            duration = (
                float(frame.duration * frame.time_base) if frame.duration and frame.time_base else usual
            )
            duration = duration if 0 < duration <= LONGEST else usual
            end = start + duration - origin
            yield Shown(start, duration, lambda frame=frame: _picture(frame, aspect, scaler))  # type: ignore[misc]
        _check_whole(container, stream, end)


def _is_cover(stream: Any) -> bool:
    """Whether it is a cover picture of music."""
    return bool(stream.disposition & av.stream.Disposition.attached_pic)


def _decoded(container: Any, stream: Any) -> Iterator[Any]:
    """Frames of the stream. VP8 and VP9 keep transparency beside their packets, where only libvpx looks for it."""
    name = {"vp8": "libvpx", "vp9": "libvpx-vp9"}.get(stream.codec_context.name)
    tags = {key.lower(): value for key, value in stream.metadata.items()}
    if tags.get("alpha_mode") != "1" or name not in av.codecs_available:
        yield from container.decode(stream)
        return
    codec: Any = av.CodecContext.create(name, "r")
    codec.options = {"max_pixels": str(MOST_PIXELS)}
    for packet in container.demux(stream):
        yield from codec.decode(packet if packet.size else None)


def _check_whole(container: Any, stream: Any, end: float) -> None:
    """Refuses a file whose header promises more than it holds: a transfer that was cut."""
    promised = 0.0
    if container.format.name == "avi" and stream.average_rate:
        promised = float(
            stream.frames / stream.average_rate
        )  # its duration is what the file could still hold
    elif stream.duration and stream.time_base:
        promised = float(stream.duration * stream.time_base)
    elif container.duration and len(container.streams) == 1:  # with sound it may be the length of that
        promised = container.duration / av.time_base
    if end + 0.3 + promised / 20 < promised <= LONGEST:  # the last frame's own time is not always known
        raise InputError(f"it ends after {end:.1f} of {promised:.1f} seconds; copy it again")


def _aspect(stream: Any) -> Fraction:
    """Width of a pixel by its height."""
    aspect = stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio or Fraction(1)
    aspect = Fraction(aspect)
    return aspect if Fraction(1, MOST_STRETCH) <= aspect <= MOST_STRETCH else Fraction(1)


def _picture(frame: Any, aspect: Fraction, scaler: VideoReformatter) -> np.ndarray:
    """uint8 [height, width, 3] with square pixels, upright"""
    width, height = round(frame.width * max(aspect, 1)), round(frame.height / min(aspect, 1))
    if width * height > MOST_PIXELS:
        raise InputError(f"its frames must have at most {MOST_PIXELS} pixels but have {width} x {height}")
    if frame.colorspace not in (*TRUSTED_MATRICES, RGB):
        frame.colorspace = BT709 if frame.height >= HD_ROWS else UNSPECIFIED
    layered = frame.format.has_palette or any(part.is_alpha for part in frame.format.components)
    tone = {"dst_color_trc": BT709, "dst_color_primaries": BT709} if frame.color_trc in HDR else {}
    kind = "rgba" if layered else "rgb24"
    picture = scaler.reformat(frame, width, height, kind, interpolation=SCALING, **tone).to_ndarray()
    if layered:
        alpha = picture[..., 3:].astype(np.uint16)
        picture = ((picture[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
    return np.ascontiguousarray(_turned(picture, _display_matrix(frame)))


def _display_matrix(frame: Any) -> tuple[int, int, int, int]:
    """(a, b, c, d): a pixel at (x, y) is shown at (ax + cy, bx + dy)."""
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None or len(bytes(data)) < 36:
        return 1, 0, 0, 1
    values = struct.unpack_from("=9i", bytes(data))
    return values[0], values[1], values[3], values[4]


def _turned(picture: np.ndarray, matrix: tuple[int, int, int, int]) -> np.ndarray:
    """Turned to the nearest right angle and mirrored as the matrix says. [height, width, 3]"""
    a, b, c, d = matrix
    if abs(a) + abs(d) >= abs(b) + abs(c):
        mirrored, flipped = a < 0, d < 0
    else:
        picture = picture.transpose(1, 0, 2)
        mirrored, flipped = c < 0, b < 0
    return picture[:: -1 if flipped else 1, :: -1 if mirrored else 1]
