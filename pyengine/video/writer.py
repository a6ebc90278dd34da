"""Frames to files: MP4, WebM, GIF or a folder of PNGs, written as frames come. Needs PyAV.

Frames are uint8 [height, width, 3], RGB. A file is playable from the moment that it is there: MP4 is written in fragments of
half a second and WebM in clusters, the first of them under another name, so a killed process or a full disk loses only the
last moment, and an earlier file of that name is kept until there is something to put in its place.
"""

import contextlib
import errno
import os
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import av
import numpy as np
from av.video.reformatter import Colorspace

from pyengine.arguments import as_array, finite, printable, whole
from pyengine.errors import ConfigError, OutputError, ShapeError
from pyengine.video.target import Target

__all__ = ["ENCODERS", "VideoWriter", "can_encode"]

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
LIMITED = 1  # AVCOL_RANGE_MPEG: luma from 16 to 235
LARGEST = 16384  # rows or columns that encoders take


class VideoWriter:
    """Writes frames to `path`, whose suffix says how: .mp4 (H.264), .webm (VP9), .gif, or a folder of PNGs
    where there is no suffix or a slash at the end. Without frames nothing is written, and an earlier file stays.

    height, width  of the frames that `write` will get
    upscale        integer factor, nearest neighbour
    Odd sizes of MP4 and WebM get their last row or column twice, since 4:2:0 needs even ones.
    Raises OutputError if the file cannot be opened or, later, written; what was written stays playable.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, height: int, width: int, fps: float = 24, upscale: int = 1
    ) -> None:
        height, width = whole("height", height, 1), whole("width", width, 1)
        upscale, fps = whole("upscale", upscale, 1), finite("fps", fps)
        if not 0 < fps <= 1000:
            raise ConfigError(f"fps must be above 0 and at most 1000 but is {fps}")
        if max(height, width) * upscale > LARGEST:
            raise ConfigError(
                f"frames must have at most {LARGEST} rows and columns but have {height * upscale} x {width * upscale}; lower upscale"
            )
        name = _name(path)
        self.path = Path(name)
        self.frames_written = 0
        self._shape = (height, width, 3)
        self._upscale = upscale
        self._failure: OutputError | None = None
        self._closed = False
        suffix = self.path.suffix.lower()
        try:
            is_folder = name.endswith(("/", os.sep)) or not suffix or self.path.is_dir()
            if not is_folder and suffix not in ENCODERS:
                raise OutputError(
                    f"output must end in {', '.join(ENCODERS)} or, for a folder of PNGs, a slash but is '{printable(name)}'"
                )
            self._sink: _Sink = (
                _Folder(self.path)
                if is_folder
                else _File(self.path, suffix, height * upscale, width * upscale, fps)
            )
        except (OSError, av.error.FFmpegError) as error:
            raise self._failed(error, 0) from error

    def write(self, frame: np.ndarray) -> None:
        """Append one frame, uint8 [height, width, 3]."""
        if self._closed:
            raise OutputError(f"'{printable(str(self.path))}' is closed after {self.frames_written} frames")
        if self._failure is not None:
            raise self._failure
        frame = as_array("video", frame)
        if frame.shape != self._shape or frame.dtype != np.uint8:
            raise ShapeError(
                f"[video] expected uint8 {list(self._shape)} but got {frame.dtype} {list(frame.shape)}"
            )
        large = frame.repeat(self._upscale, axis=0).repeat(self._upscale, axis=1)
        try:
            self._sink.write(large)
        except (OSError, av.error.FFmpegError) as error:
            raise self._failed(error, self._sink.playable) from error
        self.frames_written += 1

    def close(self) -> None:
        """Finish the file. Does nothing the second time."""
        if self._closed:
            return
        self._closed = True
        try:
            self._sink.close(finish=self._failure is None)
        except (OSError, av.error.FFmpegError) as error:
            raise self._failed(error, self._sink.playable) from error

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

    def _failed(self, error: Exception, playable: int) -> OutputError:
        self.frames_written = playable
        number = getattr(error, "errno", None)
        reason = getattr(error, "strerror", None) or str(error)
        kept = f" after {self.frames_written} frames, which stay playable" if self.frames_written else ""
        remedy = (
            "free some space or choose another place" if number == errno.ENOSPC else "choose another place"
        )
        self._failure = OutputError(f"cannot write '{printable(str(self.path))}'{kept}: {reason}; {remedy}")
        return self._failure


def _name(path: str | os.PathLike[str]) -> str:
    """The output's name, refused where it names nothing."""
    name = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else ""
    if not name.strip() or "\0" in name:
        raise OutputError(f"output must be the name of a file or a folder but is {path!r}")
    if name == "-":
        raise OutputError("output cannot be standard output ('-'); name a file, such as video.mp4")
    return name


class _Sink(Protocol):
    playable: int  # frames that can be played, whatever happens next

    def write(self, frame: np.ndarray) -> None: ...
    def close(self, finish: bool) -> None: ...


class _Folder:
    """frames as 000000.png, 000001.png, ..., each complete or absent."""

    def __init__(self, path: Path) -> None:
        self._is_new = not path.exists()
        path.mkdir(exist_ok=True)
        if next(path.glob("*.png"), None) is not None:
            raise OSError(errno.EEXIST, "it already holds PNG files")
        if not os.access(path, os.W_OK):
            raise OSError(errno.EACCES, "it is not writable")
        self._path = path
        self.playable = 0

    def write(self, frame: np.ndarray) -> None:
        codec = av.CodecContext.create("png", "w")
        codec.height, codec.width, codec.pix_fmt = *frame.shape[:2], "rgb24"
        codec.time_base = Fraction(1, 1)
        picture = av.VideoFrame.from_ndarray(frame, "rgb24")
        data = b"".join(bytes(packet) for packet in [*codec.encode(picture), *codec.encode(None)])
        part = self._path / f"{self.playable:06d}.part"
        try:
            part.write_bytes(data)
            part.replace(part.with_suffix(".png"))
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        self.playable += 1

    def close(self, finish: bool) -> None:
        if self._is_new and not self.playable:
            with contextlib.suppress(OSError):  # somebody else's files are in it by now
                self._path.rmdir()


class _File:
    """One encoder and one muxer."""

    def __init__(self, path: Path, suffix: str, height: int, width: int, fps: float) -> None:
        name = next(filter(can_encode, ENCODERS[suffix]), None)
        if name is None:
            raise OSError(errno.ENOSYS, f"this build of PyAV has no encoder for {suffix}")
        self._is_gif = suffix == ".gif"
        self._tap = Target(path)
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
                codec.color_range = LIMITED
            self._container.start_encoding()
            self._tap.check()
        except BaseException:
            self._tap.close()
            raise
        self._count = 0
        self._muxed = 0  # frames that the muxer has
        self.playable = 0

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
            if finish and self._count:
                self._tap.check()
                self._tap.publish()
                self.playable = self._count
        finally:
            self._tap.close()

    def _mux(self, picture: Any) -> None:
        for packet in self._stream.encode(picture):
            self._container.mux(packet)
            if self._tap.check() and self._muxed:
                # What the muxer writes before it takes a frame is whole: all frames but this one.
                self._tap.publish()
                self.playable = self._muxed
            self._muxed += 1
        self._tap.check()


def can_encode(name: str) -> bool:
    """Whether this build of PyAV has the encoder."""
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
