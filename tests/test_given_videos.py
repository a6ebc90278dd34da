"""Videos as people have them: turned, stretched, of any rate, with pauses, cut off, huge, or no video at all."""

from __future__ import annotations

import struct
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_pictures import close, is_upright, quadrants, refused

from pyengine.errors import ConfigError, InputError
from pyengine.video import containers, reader
from pyengine.video.pacing import LONGEST, Shown, at_rate
from pyengine.video.reader import read_video
from pyengine.video.writer import VideoWriter


def write(
    path: Path,
    frames: list[np.ndarray],
    rate: int = 24,
    times: list[int] | None = None,
    codec: str = "libx264",
    pixels: str = "yuv420p",
    **context: Any,
) -> Path:
    """A small video; `times` of its frames in 1 / rate seconds."""
    tags = context.pop("tags", {})
    with av.open(str(path), "w", options=context.pop("options", {})) as container:
        container.metadata.update(context.pop("metadata", {}))
        stream: Any = container.add_stream(codec, rate=rate, options={"crf": "4"})
        stream.metadata.update(tags)
        stream.codec_context.height, stream.codec_context.width = frames[0].shape[:2]
        stream.codec_context.pix_fmt = pixels
        for name, value in context.items():
            setattr(stream.codec_context, name, value)
        for index, frame in enumerate(frames):
            picture: Any = av.VideoFrame.from_ndarray(frame, "rgba" if frame.shape[2] == 4 else "rgb24")
            picture.pts, picture.time_base = times[index] if times else index, Fraction(1, rate)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return path


def turn(path: Path, a: int, b: int, c: int, d: int) -> None:
    """Writes a display matrix into the track header, as a phone does."""
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 4
    values = (a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    struct.pack_into(">9i", data, start + (40 if data[start] == 0 else 52), *values)
    path.write_bytes(data)


def shades(count: int) -> list[np.ndarray]:
    return [np.full((32, 32, 3), 20 + 3 * index, np.uint8) for index in range(count)]


def shown(frames: np.ndarray) -> list[int]:
    """Which of `shades` each frame is."""
    return [round((float(frame.mean()) - 20) / 3) for frame in frames]


MATRICES = {
    "quarter": ((0, 1, -1, 0), lambda picture: np.rot90(picture)),
    "half": ((-1, 0, 0, -1), lambda picture: np.rot90(picture, 2)),
    "three quarters": ((0, -1, 1, 0), lambda picture: np.rot90(picture, 3)),
    "mirror": ((-1, 0, 0, 1), lambda picture: picture[:, ::-1]),
    "mirror and quarter": ((0, 1, 1, 0), lambda picture: picture.transpose(1, 0, 2)),
}


@pytest.mark.parametrize("name", MATRICES)
def test_a_track_header_turns_the_video(tmp_path: Path, name: str) -> None:
    matrix, stored = MATRICES[name]
    path = write(tmp_path / "a.mp4", [np.ascontiguousarray(stored(quadrants()))] * 3)
    turn(path, *matrix)
    frames = read_video(path)
    assert frames.shape == (3, 64, 96, 3)
    assert is_upright(frames[0])


def test_pixels_that_are_not_square_are_stretched(tmp_path: Path) -> None:
    for aspect, shape in [
        (Fraction(4, 3), (64, 128)),
        (Fraction(1, 2), (128, 96)),
        (Fraction(1, 100), (64, 96)),
    ]:
        write(tmp_path / "a.mp4", [quadrants()] * 2, sample_aspect_ratio=aspect)
        assert read_video(tmp_path / "a.mp4").shape == (2, *shape, 3)
    path = write(
        tmp_path / "a.mp4", [np.ascontiguousarray(np.rot90(quadrants()))] * 2, sample_aspect_ratio=Fraction(2)
    )
    turn(path, 0, 1, -1, 0)  # the stretch is of the stored picture, before it is turned
    assert read_video(path).shape == (2, 128, 96, 3)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi"])
@pytest.mark.parametrize("rate", [24, 25, 30, 60])
def test_another_rate_keeps_its_pace(tmp_path: Path, rate: int, suffix: str) -> None:
    path = write(tmp_path / f"a.{suffix}", shades(rate), rate)
    frames = read_video(path, fps=24)
    assert len(frames) == 24
    wanted = [int((index + 0.5) * rate / 24) for index in range(24)]
    assert np.abs(np.subtract(shown(frames), wanted)).max() <= 1
    if rate == 24:
        assert shown(frames) == wanted
    assert len(read_video(path)) == rate  # each frame once, where no rate is asked for


def test_pauses_are_kept(tmp_path: Path) -> None:
    times = [*range(6), *range(30, 36)]
    frames = shown(read_video(write(tmp_path / "a.mp4", shades(12), 24, times), fps=24))
    assert frames == [*range(6), *[5] * 24, *range(6, 12)]


@given(
    st.lists(st.floats(0.001, 2), min_size=1, max_size=8),
    st.floats(0.5, 120),
    st.floats(-1e6, 1e6),
)
def test_every_moment_shows_the_frame_of_that_moment(gaps: list[float], fps: float, origin: float) -> None:
    starts = np.concatenate([[0], np.cumsum(gaps)[:-1]])
    given_frames = [
        Shown(origin + start, gap, lambda index=index: np.full((1, 1, 3), index))  # type: ignore[misc]
        for index, (start, gap) in enumerate(zip(starts, gaps, strict=True))
    ]
    taken = [int(frame[0, 0, 0]) for frame in at_rate(given_frames, fps)]
    assert abs(len(taken) - max(1, sum(gaps) * fps)) <= 1
    assert taken == sorted(taken)
    for index, frame in enumerate(taken):
        moment = (index + 0.5) / fps
        assert starts[frame] - 1e-6 <= moment or not index
        assert moment <= starts[frame] + gaps[frame] + 1e-6 or not index


def test_times_beyond_a_day_are_refused_and_not_filled(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mkv", shades(2), 24, [0, int(LONGEST) * 24 + 1])
    with pytest.raises(InputError, match="must last at most a day"):
        read_video(path, fps=24, frames=5, tail=True)


def test_transparency_shows_white(tmp_path: Path) -> None:
    picture = np.dstack([quadrants(), np.full((64, 96), 255, np.uint8)])
    picture[16:48, 32:64] = (255, 0, 255, 0)
    path = write(
        tmp_path / "a.webm", [picture] * 3, codec="libvpx-vp9", pixels="yuva420p", tags={"alpha_mode": "1"}
    )
    write(tmp_path / "a.mov", [picture] * 3, codec="png", pixels="rgba")
    for path in (tmp_path / "a.webm", tmp_path / "a.mov"):
        frame = read_video(path)[0]
        assert close(frame[32, 48], (255, 255, 255), 3)
        assert close(frame[8, 8], (220, 30, 30))


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi", "webm"])
def test_a_transfer_that_was_cut_is_refused(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (72, 64, 64, 3), np.uint8)
    front = {"options": {"movflags": "faststart"}} if suffix == "mp4" else {}
    codec = "libvpx-vp9" if suffix == "webm" else "libx264"
    path = write(tmp_path / f"a.{suffix}", list(noise), codec=codec, **front)
    data = path.read_bytes()
    for part in (0.05, 0.4, 0.7):
        path.write_bytes(data[: int(len(data) * part)])
        with pytest.raises(InputError, match=r"cannot read|readable frames"):
            read_video(path)
    path.write_bytes(data)
    assert len(read_video(path)) == 72


@pytest.mark.parametrize("name", ["list.m3u8", "list.mp4", "list"])
def test_what_opens_other_files_is_refused_at_once(tmp_path: Path, name: str) -> None:
    private = write(tmp_path / "private.mp4", shades(4))
    lists = [
        f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1.0,\nfile://{private}\n",
        f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1.0,\n{private}\n#EXT-X-ENDLIST\n",
        f"ffconcat version 1.0\nfile '{private}'\n",
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
        f'<?xml version="1.0"?><MPD type="dynamic"><Period><BaseURL>{private}</BaseURL></Period></MPD>',
        f"[playlist]\nFile1={private}\n",
        f'<svg xmlns="http://www.w3.org/2000/svg"><image href="{private}"/></svg>',
    ]
    for text in lists:
        (tmp_path / name).write_text(text)
        started = time.monotonic()
        refused(tmp_path / name, "cannot read")
        assert time.monotonic() - started < 2


def test_titles_in_any_encoding(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", shades(3), metadata={"title": "A street XX night"})
    path.write_bytes(path.read_bytes().replace(b"XX", b"\xe0\xe9"))
    assert len(read_video(path)) == 3


def test_frames_of_too_many_pixels_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.mkv", shades(3))
    monkeypatch.setattr(containers, "MOST_PIXELS", 1000)
    with pytest.raises(InputError, match="at most 1000 pixels but have 32 x 32"):
        read_video(path)


def test_more_pixels_than_memory_should_hold_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.mp4", shades(20))
    monkeypatch.setattr(reader, "MOST_BYTES", 10 * 32 * 32 * 3)
    with pytest.raises(InputError, match="must fit 4 GiB; take fewer or smaller ones"):
        read_video(path)
    assert len(read_video(path, frames=10)) == 10
    assert len(read_video(path, frames=10, tail=True)) == 10
    assert len(read_video(path, at_most=10)) == 10
    assert len(read_video(path, size=(16, 16))) == 20


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"frames": 0}, "frames"), ({"frames": 2**70, "tail": True}, "frames"), ({"tail": np.arange(2)}, "tail"),
        ({"frames": 1.5}, "frames"), ({"frames": "2"}, "frames"), ({"frames": True}, "frames"),
        ({"at_most": -1}, "at_most"), ({"fps": float("nan")}, "fps"), ({"fps": 0}, "fps"), ({"fps": "24"}, "fps"),
        ({"size": 5}, "size"), ({"size": (0, 4)}, "size"), ({"size": (4, 1.5)}, "size"), ({"size": (10**6, 10**6)}, "size"),
    ],
)  # fmt: skip
def test_arguments_are_refused_by_name(tmp_path: Path, options: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        read_video(tmp_path / "missing.mp4", **options)
    assert read_video(write(tmp_path / "a.mp4", shades(3)), np.int64(2), (np.int32(8), 8)).shape == (
        2,
        8,
        8,
        3,
    )


@pytest.mark.parametrize("name", ["a.mp4", "a.webm"])
def test_what_is_written_is_bt709_by_tag_and_by_value(tmp_path: Path, name: str) -> None:
    """Decoded to luma and chroma by hand, with the numbers of BT.709 and limited range."""
    colours = np.array(
        [(220, 30, 30), (30, 200, 30), (30, 30, 220), (128, 128, 128), (255, 255, 255)], np.uint8
    )
    with VideoWriter(tmp_path / name, height=64, width=64) as writer:
        for colour in colours:
            writer.write(np.broadcast_to(colour, (64, 64, 3)).copy())
    with av.open(str(tmp_path / name)) as container:
        codec: Any = container.streams.video[0].codec_context
        assert (codec.colorspace, codec.color_primaries, codec.color_trc) == (1, 1, 1)
        assert codec.color_range == 1
        planes = [frame.to_ndarray() for frame in container.decode(video=0)]  # [96, 64], luma over chroma
    for colour, plane in zip(colours, planes, strict=True):
        red, green, blue = colour / 255
        luma = 0.2126 * red + 0.7152 * green + 0.0722 * blue
        wanted = [16 + 219 * luma, 128 + 224 * (blue - luma) / 1.8556, 128 + 224 * (red - luma) / 1.5748]
        got = [plane[32, 32], plane[64 + 8, 16], plane[64 + 24, 16]]
        assert np.abs(np.subtract(got, wanted)).max() <= 2.5
    assert np.abs(read_video(tmp_path / name)[:, 32, 32].astype(int) - colours).max() <= 4


@pytest.mark.parametrize(("height", "matrix"), [(480, "ITU601"), (720, "ITU709")])
def test_untagged_colours_are_read_as_players_do(tmp_path: Path, height: int, matrix: str) -> None:
    red = np.broadcast_to(np.array([220, 30, 30], np.uint8), (height, 64, 3)).copy()
    picture: Any = av.VideoFrame.from_ndarray(red, "rgb24").reformat(format="yuv420p", dst_colorspace=matrix)
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream: Any = container.add_stream("libx264", rate=24, options={"crf": "4"})
        stream.codec_context.height, stream.codec_context.width = height, 64
        picture.colorspace = 2  # unspecified
        container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    assert close(read_video(tmp_path / "a.mp4")[0, 20, 20], (220, 30, 30), 4)


def test_high_dynamic_range_is_brought_to_a_usual_screen(tmp_path: Path) -> None:
    """White of a PQ video, at about 200 candela, must not come out as the middle grey that its code is."""
    grey = np.full((64, 64, 3), 148, np.uint8)  # PQ code of 203 candela per square metre
    write(tmp_path / "a.mkv", [grey] * 2, color_trc=16, color_primaries=9, colorspace=9)
    assert read_video(tmp_path / "a.mkv")[0, 32, 32].mean() > 170
    write(tmp_path / "b.mkv", [grey] * 2, color_trc=1, color_primaries=1)
    assert abs(read_video(tmp_path / "b.mkv")[0, 32, 32].mean() - 148) < 4
