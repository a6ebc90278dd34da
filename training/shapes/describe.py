"""Says what a video without a caption shows, in the caption's words, so that `reader` can tell whether it stays so.

    caption = describe(frames[:24])  # the first second
    reading = read(caption, frames)
    kind_of(frames[24:48])  # of a shape whose colour may have changed

One shape over a plain background is assumed. Whatever is shown, the nearest caption is returned: reading the same frames by it says
how near.
"""

from __future__ import annotations

from itertools import product

import numpy as np

from pyengine.export.families.shapes.captions import SHAPES
from training.shapes.reader import COLOUR_DISTANCE, LEAST_SHIFT, Caption, Wanted, read
from training.shapes.world import BACKGROUNDS, COLOURS, SIZES, MovingShape, coverage

__all__ = ["describe", "kind_of"]

CONTRAST = 40.0  # of 255, between a shape and its background
LEAST_PIXELS = 30  # of a frame's 4,096
SHOWN = 50.0  # percent of frames


def describe(frames: np.ndarray) -> Caption:
    """The caption that fits best. frames: uint8 [F, 64, 64, 3].

    A shape that stays in its place is said to spin, any other to drift: on the torus no way of going counts as a jump but a real one.
    """
    background = _background(frames)
    colour = _colour(frames, background)
    area = _area(frames, background, colour)
    candidates = [
        Caption((Wanted(kind, colour, _size(kind, area), motion),), background, False)
        for kind, motion in product(SHAPES, ("drift", "spin"))
    ]
    readings = [(read(caption, frames), caption) for caption in candidates]
    best, caption = max(readings, key=lambda pair: (pair[0].rates()["shape"], pair[0].rates()["colour"]))
    wanted = caption.shapes[0]
    centre = best.centre[0][best.visible[0] > 0]
    goes = len(centre) > 0 and np.linalg.norm(centre - centre[0], axis=-1).max() > LEAST_SHIFT
    return Caption(
        (Wanted(wanted.kind, wanted.colour, wanted.size, "drift" if goes else "spin"),), background, False
    )


def kind_of(frames: np.ndarray) -> str | None:
    """The kind of shape that at least half of the frames show, in whatever colour. frames: uint8 [F, 64, 64, 3]"""
    pixels = frames.reshape(-1, 3).astype(np.float32)
    ground = np.median(pixels, axis=0)
    stands_out = np.abs(pixels - ground).max(1) > CONTRAST
    if stands_out.sum() < LEAST_PIXELS * len(frames):
        return None
    way = np.median(pixels[stands_out], axis=0) - ground
    share = np.clip((pixels - ground) @ way / (way @ way), 0, 1)[:, None]
    black, full = np.array(BACKGROUNDS["black"]), np.array(COLOURS["white"])
    white = np.rint(black + share * (full - black)).astype(np.uint8).reshape(frames.shape)
    caption = describe(white)
    return caption.shapes[0].kind if read(caption, white).rates()["shape"] >= SHOWN else None


def _background(frames: np.ndarray) -> str:
    """The background nearest to the median pixel: a shape covers less than half of the picture."""
    level = np.median(frames.reshape(-1, 3), axis=0)
    return min(BACKGROUNDS, key=lambda name: float(np.linalg.norm(level - BACKGROUNDS[name])))


def _colour(frames: np.ndarray, background: str) -> str:
    """The colour that most pixels have, of those that stand out from the background."""
    pixels = frames[:, ::2, ::2].reshape(-1, 3).astype(np.float32)
    pixels = pixels[np.abs(pixels - BACKGROUNDS[background]).max(1) > CONTRAST]
    names = [name for name in COLOURS if name != background]
    distance = np.linalg.norm(pixels[:, None] - np.array([COLOURS[name] for name in names]), axis=-1)
    near = distance < COLOUR_DISTANCE
    return names[int((near & (distance == distance.min(1, keepdims=True))).sum(0).argmax())]


def _area(frames: np.ndarray, background: str, colour: str) -> float:
    """Pixels that the colour covers in the median frame; a pixel at the edge counts by its share."""
    ground = np.array(BACKGROUNDS[background], np.float32)
    way = np.array(COLOURS[colour], np.float32) - ground
    share = (frames - ground) @ way / (way @ way)
    return float(np.median(np.clip((share - 0.15) / 0.7, 0, 1).sum((1, 2))))


def _size(kind: str, area: float) -> str:
    """The size whose area is nearest."""
    drawn = {
        size: float(coverage(MovingShape(kind, "red", size, "spin", (32, 32)), np.zeros(1)).sum())
        for size in SIZES
    }
    return min(drawn, key=lambda size: abs(drawn[size] - area))
