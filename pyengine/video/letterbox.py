"""Frames brought to another size whole: scaled, and black where their shape leaves room."""

from __future__ import annotations

import numpy as np
from PIL import Image

__all__ = ["content", "letterboxed"]


def content(size: tuple[int, int], into: tuple[int, int]) -> tuple[slice, slice]:
    """Rows and columns that a picture of a size, height and width, takes in the middle of another."""
    scale = min(into[0] / size[0], into[1] / size[1])
    sides = [max(1, min(whole, round(side * scale))) for side, whole in zip(size, into, strict=True)]
    first = [(whole - side) // 2 for side, whole in zip(sides, into, strict=True)]
    return slice(first[0], first[0] + sides[0]), slice(first[1], first[1] + sides[1])


def letterboxed(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [frames, h, w, 3] -> [frames, height, width, 3], scaled by bicubic interpolation (Pillow's)."""
    rows, columns = content(frames.shape[1:3], (height, width))
    out = np.zeros((len(frames), height, width, 3), np.uint8)
    size = (columns.stop - columns.start, rows.stop - rows.start)
    for frame, target in zip(frames, out, strict=True):
        target[rows, columns] = np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC))
    return out
