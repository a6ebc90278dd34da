"""Frames to what a socket sends: JPEG, WebP, raw, H.264 as Annex B, or fragments of an MP4. One encoder per socket."""

from __future__ import annotations

import io
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple, Protocol

import av
import numpy as np
from av.video.reformatter import Colorspace
from PIL import Image

from pyengine.serve.wire import Codec

__all__ = ["MIMES", "Encoded", "Encoder", "Fragments", "encoder"]

MIMES = {
    "jpeg": "image/jpeg",
    "webp": "image/webp",
    "raw": "application/octet-stream",
    "h264": "video/h264",
    "m4s": 'video/mp4; codecs="avc1.42c01e"',
}
X264 = {"preset": "ultrafast", "tune": "zerolatency"}
BT709, LIMITED = 1, 1  # as libavutil numbers them


class Encoded(NamedTuple):
    data: bytes
    is_key: bool


class Encoder(Protocol):
    codec: Codec

    def encode(self, frames: np.ndarray) -> Sequence[Encoded]:
        """One for each of uint8 [frames, height, width, 3]."""
        ...

    def restart(self) -> None:
        """What comes next does not follow what came before."""
        ...


def encoder(name: str, fps: float, quality: int) -> Encoder:
    """The encoder of a format but m4s. `quality` from 1 to 100."""
    if name == "h264":
        return H264(fps, quality)
    return Pictures(name, quality)


class Pictures:
    """Each frame by itself."""

    def __init__(self, name: str, quality: int) -> None:
        self.codec = {"jpeg": Codec.JPEG, "webp": Codec.WEBP, "raw": Codec.RGB24}[name]
        self._name, self._quality = name, quality

    def encode(self, frames: np.ndarray) -> Sequence[Encoded]:
        return [Encoded(self._encode(np.ascontiguousarray(frame)), True) for frame in frames]

    def restart(self) -> None:
        pass

    def _encode(self, frame: np.ndarray) -> bytes:
        if self._name == "raw":
            return frame.tobytes()
        out = io.BytesIO()
        options = {"method": 0} if self._name == "webp" else {"subsampling": 0}
        Image.fromarray(frame).save(out, self._name.upper(), quality=self._quality, **options)
        return out.getvalue()


class H264:
    """Annex B, a key frame every second and wherever the video does not go on; each frame leaves as it comes."""

    codec = Codec.H264

    def __init__(self, fps: float, quality: int) -> None:
        self._rate, self._quality = Fraction(fps).limit_denominator(1001), quality
        self._context: Any = None
        self._count = 0

    def encode(self, frames: np.ndarray) -> Sequence[Encoded]:
        if self._context is None:
            self._context = _x264(av.CodecContext.create("libx264", "w"), frames, self._rate, self._quality)
            self._count = 0
        made = []
        for frame in frames:
            packets = self._context.encode(_picture(frame, self._count, self._rate))
            self._count += 1
            made.append(Encoded(b"".join(map(bytes, packets)), any(packet.is_keyframe for packet in packets)))
        return made

    def restart(self) -> None:
        self._context = None


class Fragments:
    """A fragmented MP4 that a browser's MediaSource or a file takes as it comes. The muxer holds the last frame back."""

    def __init__(self, fps: float, quality: int) -> None:
        self._rate, self._quality = Fraction(fps).limit_denominator(1001), quality
        self._out = _Tap()
        self._container: Any = None
        self._stream: Any = None
        self._count = self._told = 0

    def encode(self, frames: np.ndarray) -> tuple[bytes, int]:
        """The bytes that follow, and how many frames they hold."""
        if self._container is None:
            flags = "frag_every_frame+empty_moov+default_base_moof"
            self._container = av.open(self._out, "w", format="mp4", options={"movflags": flags})
            self._stream = self._container.add_stream("libx264", rate=self._rate)
            _x264(self._stream.codec_context, frames, self._rate, self._quality)
        for frame in frames:
            for packet in self._stream.encode(_picture(frame, self._count, self._rate)):
                self._container.mux(packet)
            self._count += 1
        return self._taken(self._count - 1)

    def finish(self) -> tuple[bytes, int]:
        """The rest, and its frames."""
        if self._container is None:
            return b"", 0
        for packet in self._stream.encode(None):
            self._container.mux(packet)
        self._container.close()
        self._container = None
        return self._taken(self._count)

    def _taken(self, upto: int) -> tuple[bytes, int]:
        frames, self._told = upto - self._told, upto
        return self._out.take(), frames


class _Tap(io.RawIOBase):
    """A file that cannot be sought, whose bytes are taken out as they come."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._parts.append(bytes(data))
        return len(data)

    def take(self) -> bytes:
        data = b"".join(self._parts)
        self._parts.clear()
        return data


def _x264(codec: Any, frames: np.ndarray, rate: Fraction, quality: int) -> Any:
    height, width = frames.shape[1:3]
    codec.height, codec.width = height + (height & 1), width + (width & 1)
    codec.pix_fmt, codec.time_base, codec.framerate = "yuv420p", 1 / rate, rate
    codec.options = X264 | {"crf": str(round(40 - 0.3 * quality))}
    codec.gop_size, codec.max_b_frames, codec.thread_count = max(1, round(rate)), 0, 1
    codec.color_primaries = codec.color_trc = codec.colorspace = BT709
    codec.color_range = LIMITED
    return codec


def _picture(frame: np.ndarray, number: int, rate: Fraction) -> Any:
    """4:2:0 needs even sizes: an odd one gets its last row or column twice."""
    height, width = frame.shape[:2]
    frame = np.pad(frame, [(0, height & 1), (0, width & 1), (0, 0)], mode="edge")
    picture: Any = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), "rgb24")
    picture = picture.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709)
    picture.pts, picture.time_base = number, 1 / rate
    return picture
