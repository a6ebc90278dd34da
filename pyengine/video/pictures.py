"""Pictures by Pillow: turned as their tags say, over white where they are transparent, 8 bits, sRGB.

Animations (GIF, APNG, WebP, AVIF) give every frame with its time. Sizes are checked against the header, before anything is decoded.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageCms, ImageOps

from pyengine.errors import InputError
from pyengine.video.pacing import Shown

__all__ = ["picture_kind", "pictures"]

MOST_PIXELS = 178_000_000  # of a picture: cameras of 108 megapixels, and what Pillow itself accepts
MOST_ANIMATED = 2**33  # pixels of all frames of an animation together
SHORTEST = 0.02  # seconds; browsers show frames that ask for less for a tenth of a second
DEFAULT = 0.1
BACKGROUND = "white"
ANIMATED = ("GIF", "PNG", "WEBP", "AVIF")
HEADS = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
    (b"P4", "PPM"),
    (b"P5", "PPM"),
    (b"P6", "PPM"),
)
HEIF = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1")


def picture_kind(head: bytes) -> str | None:
    """Pillow's name of the format that a file beginning with these 16 bytes has; None: no picture that is read here."""
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[4:8] == b"ftyp" and head[8:12] in (b"avif", b"avis"):
        return "AVIF"
    if head[4:8] == b"ftyp" and head[8:12] in HEIF:
        raise InputError("HEIC pictures are not supported; convert it to JPEG or PNG first")
    return next((kind for start, kind in HEADS if head.startswith(start)), None)


def pictures(file: BinaryIO, kind: str) -> Iterator[Shown]:
    """Every frame of a picture file of that kind; one, unless it is an animation.

    Raises InputError for a picture that is too large, and whatever Pillow raises for one that is damaged or ends early.
    """
    image = _opened(file, kind)
    with image:
        pixels = image.width * image.height
        start, number = 0.0, 0
        while True:
            with _quiet():
                frame = _upright(image)
            duration = float(image.info.get("duration") or 0) / 1000
            duration = DEFAULT if not SHORTEST <= duration < 1e9 else duration
            yield Shown(start, duration, lambda frame=frame: frame)  # type: ignore[misc]
            start, number = start + duration, number + 1
            if kind not in ANIMATED:
                return
            try:
                image.seek(number)
            except EOFError:
                return
            if (number + 1) * pixels > MOST_ANIMATED:
                raise InputError(
                    f"it must hold at most {MOST_ANIMATED / pixels:.0f} frames of {image.width} x {image.height}; cut it or make it smaller"
                )


def _opened(file: BinaryIO, kind: str) -> Image.Image:
    try:
        with _quiet():
            image = Image.open(file, formats=[kind])
    except Image.DecompressionBombError as error:
        raise InputError(
            f"it must have at most {MOST_PIXELS} pixels but has more; make it smaller"
        ) from error
    if image.width * image.height > MOST_PIXELS:
        raise InputError(
            f"it must have at most {MOST_PIXELS} pixels but has {image.width} x {image.height}; make it smaller"
        )
    return image


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Pillow's warnings: of half the size that it refuses, and of tags that are damaged."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _upright(image: Any) -> np.ndarray:
    """The frame that the image stands at. uint8 [height, width, 3]"""
    image.load()
    info = dict(image.info)
    frame = image
    with contextlib.suppress(Exception):  # tags that cannot be read turn nothing
        frame = ImageOps.exif_transpose(image)
    if frame.mode == "F" or frame.mode.startswith("I"):
        return _from_16_bits(frame, info.get("transparency"))
    if "A" in frame.mode or "a" in frame.mode or "transparency" in info:
        if frame.mode in ("La", "RGBa"):  # colours multiplied by their alpha
            frame = frame.convert({"La": "LA", "RGBa": "RGBA"}[frame.mode])
        frame = _in_srgb(frame.convert("RGBA"), info)
        ground = Image.new("RGBA", frame.size, BACKGROUND)
        ground.alpha_composite(frame)
        frame = ground
    elif frame.mode == "P":
        frame = _in_srgb(frame.convert("RGB"), info)
    else:
        frame = _in_srgb(frame, info)
    return np.array(frame.convert("RGB"))


def _from_16_bits(frame: Any, transparent: Any) -> np.ndarray:
    """Grey of 16 bits. uint8 [height, width, 3]"""
    grey = np.asarray(frame)
    if frame.mode == "F" or grey.min() < 0 or grey.max() > 0xFFFF:
        raise InputError("pictures of 32 bits per channel are not supported; save it with 8 or 16")
    small = np.rint(grey / np.float32(257)).astype(np.uint8)
    if isinstance(transparent, int):
        small[grey == transparent] = 255
    return np.repeat(small[..., None], 3, axis=2)


def _in_srgb(frame: Any, info: dict[str, Any]) -> Any:
    """The frame in sRGB, where it carries the profile of another colour space, as those of many phones do."""
    if not info.get("icc_profile") or frame.mode not in ("RGB", "RGBA", "CMYK"):
        return frame
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(info["icc_profile"]))
        if "sRGB" in ImageCms.getProfileDescription(profile):
            return frame
        mode = "RGBA" if frame.mode == "RGBA" else "RGB"
        return ImageCms.profileToProfile(frame, profile, ImageCms.createProfile("sRGB"), outputMode=mode)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return frame  # a profile that cannot be read changes nothing
