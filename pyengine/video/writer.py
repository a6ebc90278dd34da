"""Frames to and from files: MP4, WebM, GIF or a folder of PNGs, written as frames come. Needs PyAV.

Frames are uint8 [height, width, 3], RGB. A file is playable at every moment: MP4 is written in fragments of
half a second and WebM in clusters, so a killed process or a full disk loses only the last moment.
"""

import contextlib
import errno
import os
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Protocol

import av
import numpy as np
from av.video.reformatter import Colorspace

from pyengine.errors import ConfigError, OutputError, ShapeError
from pyengine.video.reader import read_image, read_video

__all__ = ["VideoWriter", "read_image", "read_video"]

# Encoders by suffix, best first; which exist depends on how PyAV was built. Small pictures want quality.
ENCODERS: dict[str, dict[str, dict[str, str]]] = {
    ".mp4": {
        # zerolatency: no look-ahead, so that frames reach the file as they come.
        "libx264": {"crf": "12", "preset": "veryfast", "tune": "zerolatency"},
        "libopenh264": {"b": "2M"},
        "mpeg4": {"b": "4M"},
    },
    ".webm": {
        "libvpx-vp9": {"crf": "16", "b": "0", "deadline": "realtime", "cpu-used": "5", "lag-in-frames": "0"},
        "libvpx": {"crf": "6", "b": "4M", "deadline": "realtime"},
    },
    ".gif": {"gif": {}},
}
FRAGMENTS = "frag_keyframe+empty_moov+default_base_moof"
HYBRID_SINCE = (61, 7)  # FFmpeg 7.1: on closing, makes a fragmented MP4 an ordinary, seekable one
KEY_FRAMES_PER_SECOND = 2  # also the fragments per second
BT709 = 1  # value of the colour fields in H.264 and VP9


class VideoWriter:
    """Writes frames to `path`, whose suffix says how: .mp4 (H.264), .webm (VP9), .gif, or a folder of PNGs
    where there is no suffix or a slash at the end.

    height, width  of the frames that `write` will get
    upscale        integer factor, nearest neighbour
    Odd sizes of MP4 and WebM get their last row or column twice, since 4:2:0 needs even ones.
    Raises OutputError if the file cannot be opened or, later, written; what was written stays playable.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, height: int, width: int, fps: float = 24, upscale: int = 1
    ) -> None:
        for name, value in [("height", height), ("width", width), ("upscale", upscale)]:
            if value < 1:
                raise ConfigError(f"{name} must be at least 1 but is {value}")
        if not 0 < fps <= 1000:
            raise ConfigError(f"fps must be above 0 and at most 1000 but is {fps}")
        self.path = Path(path)
        self.frames_written = 0
        self._shape = (height, width, 3)
        self._upscale = upscale
        self._failure: OutputError | None = None
        self._closed = False
        suffix = self.path.suffix.lower()
        is_folder = os.fspath(path).endswith(("/", os.sep)) or not suffix or self.path.is_dir()
        if not is_folder and suffix not in ENCODERS:
            raise OutputError(
                f"output must end in {', '.join(ENCODERS)} or, for a folder of PNGs, a slash but is '{path}'"
            )
        size = (height * upscale, width * upscale)
        try:
            self._sink: _Sink = _Folder(self.path) if is_folder else _File(self.path, suffix, *size, fps)
        except (OSError, av.error.FFmpegError) as error:
            raise self._failed(error) from error

    def write(self, frame: np.ndarray) -> None:
        """Append one frame, uint8 [height, width, 3]."""
        if self._closed:
            raise OutputError(f"'{self.path}' is closed after {self.frames_written} frames")
        if self._failure is not None:
            raise self._failure
        if frame.shape != self._shape or frame.dtype != np.uint8:
            raise ShapeError(
                f"[video] expected uint8 {list(self._shape)} but got {frame.dtype} {list(frame.shape)}"
            )
        large = frame.repeat(self._upscale, axis=0).repeat(self._upscale, axis=1)
        try:
            self._sink.write(large)
        except (OSError, av.error.FFmpegError) as error:
            raise self._failed(error) from error
        self.frames_written += 1

    def close(self) -> None:
        """Finish the file. Does nothing the second time."""
        if self._closed:
            return
        self._closed = True
        try:
            self._sink.close(finish=self._failure is None)
        except (OSError, av.error.FFmpegError) as error:
            raise self._failed(error) from error

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except OutputError:
            if error is None:  # else the error that is already on its way says more
                raise

    def _failed(self, error: Exception) -> OutputError:
        number = getattr(error, "errno", None)
        reason = getattr(error, "strerror", None) or str(error)
        kept = f" after {self.frames_written} frames, which stay playable" if self.frames_written else ""
        remedy = (
            "free some space or choose another place" if number == errno.ENOSPC else "choose another place"
        )
        self._failure = OutputError(f"cannot write '{self.path}'{kept}: {reason}; {remedy}")
        return self._failure


class _Sink(Protocol):
    def write(self, frame: np.ndarray) -> None: ...
    def close(self, finish: bool) -> None: ...


class _Folder:
    """frames as 000000.png, 000001.png, ..., each complete or absent."""

    def __init__(self, path: Path) -> None:
        path.mkdir(exist_ok=True)
        if next(path.glob("*.png"), None) is not None:
            raise OSError(errno.EEXIST, "it already holds PNG files")
        if not os.access(path, os.W_OK):
            raise OSError(errno.EACCES, "it is not writable")
        self._path = path
        self._count = 0

    def write(self, frame: np.ndarray) -> None:
        codec = av.CodecContext.create("png", "w")
        codec.height, codec.width, codec.pix_fmt = *frame.shape[:2], "rgb24"
        codec.time_base = Fraction(1, 1)
        picture = av.VideoFrame.from_ndarray(frame, "rgb24")
        data = b"".join(bytes(packet) for packet in [*codec.encode(picture), *codec.encode(None)])
        part = self._path / f"{self._count:06d}.part"
        try:
            part.write_bytes(data)
            part.replace(part.with_suffix(".png"))
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        self._count += 1

    def close(self, finish: bool) -> None:
        pass


class _Tap:
    """The file under a muxer: unbuffered, and deaf after the first error, so that nothing good is spoilt."""

    def __init__(self, path: Path) -> None:
        self._raw: BinaryIO = open(path, "wb", buffering=0)  # noqa: SIM115
        self.seek, self.tell = self._raw.seek, self._raw.tell
        self.error: BaseException | None = None
        self.good = 0  # bytes up to the end of the last whole fragment

    def write(self, data: bytes) -> int:
        # Errors are kept for `check`: PyAV calls this from C, where an interrupt would be dropped.
        try:
            rest = memoryview(data if self.error is None else b"")
            while rest:
                rest = rest[self._raw.write(rest) :]
        except BaseException as error:
            self.error = error
        return len(data)

    def check(self) -> None:
        """To be called when the muxer has come back: raise what went wrong."""
        if self.error is not None:
            raise self.error
        self.good = self._raw.tell()

    def close(self) -> None:
        if self.error is not None:
            with contextlib.suppress(OSError):  # a device, not a file
                self._raw.truncate(self.good)
        self._raw.close()


class _File:
    """One encoder and one muxer."""

    def __init__(self, path: Path, suffix: str, height: int, width: int, fps: float) -> None:
        name = next(filter(_can_encode, ENCODERS[suffix]), None)
        if name is None:
            raise OSError(errno.ENOSYS, f"this build of PyAV has no encoder for {suffix}")
        self._is_gif = suffix == ".gif"
        self._tap = _Tap(path)
        options = {"flush_packets": "1"}
        if suffix == ".webm":
            options["cluster_time_limit"] = "500"  # ms
        if suffix == ".mp4":
            hybrid = "+hybrid_fragmented" if av.library_versions["libavformat"][:2] >= HYBRID_SINCE else ""
            options["movflags"] = FRAGMENTS + hybrid
        self._rate = Fraction(fps).limit_denominator(1001)
        try:
            self._container = av.open(self._tap, "w", format=suffix[1:], options=options)
            self._stream: Any = self._container.add_stream(
                name, rate=self._rate, options=ENCODERS[suffix][name]
            )
            codec: Any = self._stream.codec_context
            even = 0 if self._is_gif else 1
            codec.height, codec.width = height + (height & even), width + (width & even)
            codec.pix_fmt = "pal8" if self._is_gif else "yuv420p"
            codec.thread_count = 1  # the processor belongs to the model
            if self._is_gif:
                self._palette = _palette_graph(height, width, self._rate)
            else:
                codec.gop_size = max(1, round(self._rate / KEY_FRAMES_PER_SECOND))
                codec.color_primaries = codec.color_trc = codec.colorspace = BT709
            self._container.start_encoding()
            self._tap.check()
        except BaseException:
            self._tap.close()
            raise
        self._count = 0

    def write(self, frame: np.ndarray) -> None:
        codec: Any = self._stream.codec_context
        below, right = codec.height - frame.shape[0], codec.width - frame.shape[1]
        if below or right:
            frame = np.pad(frame, [(0, below), (0, right), (0, 0)], mode="edge")
        picture: Any = av.VideoFrame.from_ndarray(frame, "rgb24")
        picture.pts, picture.time_base = self._count, 1 / self._rate
        if self._is_gif:
            self._palette.push(picture)
            picture = self._palette.pull()
        else:
            picture = picture.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709)
        picture.pts, picture.time_base = self._count, 1 / self._rate
        self._mux(picture)
        self._count += 1

    def close(self, finish: bool) -> None:
        try:
            if finish:
                self._mux(None)
            elif (
                self._tap.error is None
            ):  # the encoder failed, not the disk: leave the file at its last fragment
                self._tap.error = OSError(errno.EIO, "the encoder failed")
            try:
                self._container.close()
            except (OSError, av.error.FFmpegError):
                if finish and self._count:  # a GIF without frames cannot be finished
                    raise
            if finish:
                self._tap.check()
        finally:
            self._tap.close()

    def _mux(self, picture: Any) -> None:
        for packet in self._stream.encode(picture):
            self._container.mux(packet)
        self._tap.check()


def _can_encode(name: str) -> bool:
    try:
        return bool(av.Codec(name, "w"))
    except ValueError:  # av.codec.codec.UnknownCodecError
        return False


def _palette_graph(height: int, width: int, rate: Fraction) -> Any:
    """A palette of its own for every frame, so that a GIF needs no look at the whole video."""
    graph = av.filter.Graph()
    source = graph.add_buffer(width=width, height=height, format=av.VideoFormat("rgb24"), time_base=1 / rate)
    split = graph.add("split")
    palette = graph.add("palettegen", "stats_mode=single:reserve_transparent=0")
    use = graph.add("paletteuse", "new=1:dither=bayer:bayer_scale=4")
    sink = graph.add("buffersink")
    source.link_to(split)
    split.link_to(palette, output_idx=0)
    split.link_to(use, output_idx=1, input_idx=0)
    palette.link_to(use, input_idx=1)
    use.link_to(sink)
    graph.configure()
    return graph
