"""Pictures as people have them: turned by a tag, transparent, of 16 bits, cut off, huge, of any name."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms

from pyengine.errors import InputError
from pyengine.video.reader import read_image, read_video

RED, GREEN, BLUE, YELLOW = (220, 30, 30), (30, 200, 30), (30, 30, 220), (220, 220, 30)
T = Image.Transpose
# How a camera that was held otherwise stores an upright picture, by EXIF orientation.
STORED = {
    1: None,
    2: T.FLIP_LEFT_RIGHT,
    3: T.ROTATE_180,
    4: T.FLIP_TOP_BOTTOM,
    5: T.TRANSPOSE,
    6: T.ROTATE_90,
    7: T.TRANSVERSE,
    8: T.ROTATE_270,
}


def quadrants(height: int = 64, width: int = 96) -> np.ndarray:
    """Red and green over blue and yellow. uint8 [height, width, 3]"""
    picture = np.zeros((height, width, 3), np.uint8)
    picture[: height // 2, : width // 2], picture[: height // 2, width // 2 :] = RED, GREEN
    picture[height // 2 :, : width // 2], picture[height // 2 :, width // 2 :] = BLUE, YELLOW
    return picture


def close(pixel: np.ndarray, wanted: tuple[int, ...], within: int = 12) -> bool:
    return bool(np.abs(pixel.astype(int) - wanted).max() <= within)


def is_upright(frame: np.ndarray) -> bool:
    height, width = frame.shape[:2]
    places = [(y * height // 4, x * width // 4) for y in (1, 3) for x in (1, 3)]
    return all(
        close(frame[place], colour) for place, colour in zip(places, (RED, GREEN, BLUE, YELLOW), strict=True)
    )


def refused(path: object, match: str = "") -> None:
    for read in (read_image, read_video):
        with pytest.raises(InputError, match=match) as caught:
            read(path)  # type: ignore[operator]
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "avif"])
def test_orientation_is_obeyed(tmp_path: Path, suffix: str) -> None:
    for orientation, how in STORED.items():
        stored = Image.fromarray(quadrants())
        tags = Image.Exif()
        tags[0x0112] = orientation
        (stored if how is None else stored.transpose(how)).save(path := tmp_path / f"a.{suffix}", exif=tags)
        frame = read_image(path)[0]
        assert frame.shape == (64, 96, 3)
        assert is_upright(frame), f"{suffix} with orientation {orientation}"


def test_tags_that_cannot_be_read_turn_nothing(tmp_path: Path) -> None:
    Image.fromarray(quadrants()).save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f", quality=95)
    assert is_upright(read_image(tmp_path / "a.jpg")[0])


HIDDEN = np.array([255, 0, 255], np.uint8)  # the colour stored where nothing is to be seen


def _transparent(alpha: int = 0) -> Image.Image:
    picture = np.dstack([quadrants(), np.full((64, 96), 255, np.uint8)])
    picture[16:48, 32:64] = (*HIDDEN, alpha)
    return Image.fromarray(picture)


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.tif", "a.avif"])
def test_transparency_shows_white(tmp_path: Path, name: str) -> None:
    lossless = {"lossless": True, "exact": True} if name == "a.webp" else {}
    _transparent().save(tmp_path / name, **lossless)
    frame = read_image(tmp_path / name)[0]
    assert close(frame[32, 48], (255, 255, 255), 2)
    assert close(frame[8, 8], RED)


def test_half_transparency_is_mixed_with_white(tmp_path: Path) -> None:
    _transparent(128).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png")[0, 32, 48].tolist() == [255, 127, 255]


def test_transparency_of_palettes_and_of_single_values(tmp_path: Path) -> None:
    palette = Image.fromarray(np.eye(8, dtype=np.uint8), "P")
    palette.putpalette([200, 0, 0, 255, 0, 255])
    palette.save(tmp_path / "a.png", transparency=1)
    palette.save(tmp_path / "a.gif", transparency=1)
    for name in ("a.png", "a.gif"):
        frame = read_image(tmp_path / name)[0]
        assert frame[3, 3].tolist() == [255, 255, 255]
        assert frame[3, 4].tolist() == [200, 0, 0]
    Image.fromarray(np.eye(8, dtype=np.uint8) * 7).save(tmp_path / "grey.png", transparency=7)
    assert read_image(tmp_path / "grey.png")[0, 3, 3:5].tolist() == [[255] * 3, [0] * 3]
    Image.fromarray(np.eye(8, dtype=np.uint8) * 7).convert("RGB").save(
        tmp_path / "rgb.png", transparency=(7, 7, 7)
    )
    assert read_image(tmp_path / "rgb.png")[0, 3, 3:5].tolist() == [[255] * 3, [0] * 3]


def test_grey_of_16_bits_keeps_its_range(tmp_path: Path) -> None:
    grey = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(8, 0)
    for name in ("a.png", "a.tif"):
        Image.fromarray(grey).save(tmp_path / name)
        assert read_image(tmp_path / name)[0, 0, :, 1].tolist() == list(range(256))
    Image.fromarray(np.ones((8, 8), np.float32)).save(tmp_path / "float.tif")
    refused(tmp_path / "float.tif", "32 bits per channel")


def test_colours_of_16_bits_keep_their_range(tmp_path: Path) -> None:
    rows = b"".join(b"\0" + struct.pack(">3H", 0xC800, 0x6400, 0x3200) * 4 for _ in range(4))
    (tmp_path / "a.png").write_bytes(_png(4, 4, rows, depth=16))
    assert close(read_image(tmp_path / "a.png")[0, 0, 0], (200, 100, 50), 1)


def test_other_modes_and_profiles(tmp_path: Path) -> None:
    for mode in ("1", "L", "CMYK"):
        Image.new(mode, (8, 8), {"1": 1, "L": 255, "CMYK": (0, 0, 0, 0)}[mode]).save(tmp_path / "a.tif")
        assert read_image(tmp_path / "a.tif")[0, 0, 0].tolist() == [255, 255, 255]
    # A picture in linear light, as its profile says, is brighter on a screen than its numbers.
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    Image.new("RGB", (8, 8), (90, 90, 90)).save(tmp_path / "b.png", icc_profile=b"no profile at all")
    assert read_image(tmp_path / "b.png")[0, 0, 0].tolist() == [90, 90, 90]
    Image.new("RGB", (8, 8), (90, 90, 90)).save(tmp_path / "c.png", icc_profile=profile)
    assert read_image(tmp_path / "c.png").shape == (1, 8, 8, 3)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "gif", "bmp", "avif"])
def test_a_picture_that_ends_early_is_refused(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (128, 128, 3), np.uint8)
    Image.fromarray(noise).save(path := tmp_path / f"a.{suffix}")
    data = path.read_bytes()
    for part in (0.02, 0.3, 0.9):
        path.write_bytes(data[: int(len(data) * part)])
        refused(path, "cannot read")
    path.write_bytes(data)
    assert read_image(path).shape == (1, 128, 128, 3)


def _png(width: int, height: int, rows: bytes, depth: int = 8) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">2I5B", width, height, depth, 2, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def test_a_huge_picture_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    for side in (14_000, 60_000, 2**31 - 1):
        (tmp_path / "bomb.png").write_bytes(_png(side, side, b"\0" * 1000))
        refused(tmp_path / "bomb.png", "at most .* pixels|cannot read")


@pytest.mark.parametrize(
    "name",
    [
        "2026-01-01T12:00.png",
        "frame%03d.png",
        "http:a.png",
        "a [red].png",
        "-",
        "a*?.png",
        "\udcff.png",
        "ü.jpeg",
    ],
)
def test_any_name_is_a_file_of_this_machine(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.fromarray(quadrants()).save("frame001.jpg")
    Image.fromarray(quadrants()[::-1]).save("frame001.png")
    with open(name, "wb") as file:
        Image.fromarray(quadrants()).save(file, "PNG")
    assert is_upright(read_image(name)[0])
    assert is_upright(read_image(os.fsencode(name))[0])  # type: ignore[arg-type]


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    for path in (
        "",
        "a\0b",
        "x" * 5000,
        tmp_path,
        tmp_path / "missing",
        0,
        None,
        "http://127.0.0.1/a.png",
        "file:a.png",
        "a\nb.png",
    ):
        refused(path, "cannot read")
    os.mkfifo(tmp_path / "pipe.png")
    refused(tmp_path / "pipe.png", "expected a file")


def test_heic_is_told_to_be_converted(tmp_path: Path) -> None:
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic" + b"\0" * 100)
    refused(tmp_path / "a.heic", "HEIC pictures are not supported; convert")


def test_an_animation_keeps_its_frames_and_its_pace(tmp_path: Path) -> None:
    pictures = [Image.new("RGB", (8, 8), (10 + 40 * index, 0, 0)) for index in range(5)]
    times = [100, 100, 500, 100, 200]  # ms
    for suffix in ("gif", "png", "webp"):
        options = {"lossless": True} if suffix == "webp" else {}
        path = tmp_path / f"a.{suffix}"
        pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=times, **options)
        assert read_video(path)[:, 0, 0, 0].tolist() == [10, 50, 90, 130, 170]
        paced = read_video(path, fps=10)[:, 0, 0, 0].tolist()
        assert paced == [10, 50, 90, 90, 90, 90, 90, 130, 170, 170]
    assert len(read_video(tmp_path / "a.gif", fps=10, at_most=4)) == 4
    assert len(read_video(tmp_path / "a.gif", fps=10, at_most=40)) == 10


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    folder = tmp_path_factory.mktemp("originals")
    picture = Image.fromarray(quadrants(16, 24))
    found = []
    for suffix in ("jpg", "png", "gif", "webp", "tif", "bmp"):
        tags = Image.Exif()
        tags[0x0112] = 6
        picture.save(folder / f"a.{suffix}", exif=tags)
        found.append((folder / f"a.{suffix}").read_bytes())
    return found


@given(st.data())
def test_any_bytes_are_read_or_refused(
    originals: list[bytes], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    changed = bytearray(data.draw(st.sampled_from(originals)))
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "any picture"
    path.write_bytes(
        changed[: data.draw(st.integers(0, len(changed)))] if data.draw(st.booleans()) else changed
    )
    try:
        frames = read_video(path, size=(8, 8), at_most=3)
    except InputError:
        return
    assert frames.dtype == np.uint8
    assert frames.shape[1:] == (8, 8, 3)
