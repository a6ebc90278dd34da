"""Template matching on the torus: which of the world's shapes a mask is, where, how large, how far turned.

Templates of every kind, size, offset and angle form one matrix; one matrix product matches a batch of frames.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from pyengine.export.families.shapes.captions import SHAPES
from pyengine.export.families.shapes.recipe import HEIGHT, WIDTH
from training.shapes.world import SIZES, MovingShape, signed_distance

__all__ = ["PATCH", "SYMMETRY", "Fit", "fit_templates", "rough_centres", "take_patches"]

PATCH = 44  # pixels: the largest shape, and room to be off the middle
EDGE = 1.6  # width in pixels of a template's edge; an autoencoder's is a little softer than the renderer's
# Circumscribed over nominal radius.
EXTENT = {kind: MovingShape(kind, "", "", "spin", (0.0, 0.0)).extent / SIZES[""] for kind in SHAPES}
SYMMETRY = {"circle": 1, "square": 4, "triangle": 3, "star": 5}  # turns that look alike
COARSE_ANGLE, FINE_ANGLE = 0.26, 0.08  # radians between templates
COARSE_OFFSETS = tuple(product((-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0), repeat=2))
FINE_OFFSETS = tuple(product((-1.0, -0.5, 0.0, 0.5, 1.0), repeat=2))
SPIN_OFFSETS = tuple(product((-1.0, 0.0, 1.0), repeat=2))
FINE_SCALES = (0.7, 0.85, 1.0, 1.15, 1.35)


class Fit(NamedTuple):
    """The best template of every frame. Centre, angle and scale are those of the captioned kind's best."""

    centre: np.ndarray  # [F, 2] (x, y) in pixels
    angle: np.ndarray  # [F] radians
    scale: np.ndarray  # [F] size over the captioned size
    visible: np.ndarray  # [F] share of the template that nothing covers
    overlap: np.ndarray  # [F, kinds] Dice of the best template of each kind


class _Bank(NamedTuple):
    """Templates, grouped by kind in the order of SHAPES."""

    masks: np.ndarray  # [PATCH * PATCH, K] float32
    first: np.ndarray  # [kinds] first template of each kind
    offset: np.ndarray  # [K, 2]
    scale: np.ndarray  # [K]
    angle: np.ndarray  # [K]


@lru_cache(maxsize=32)
def _bank(radius: float, spins: bool, fine: bool) -> _Bank:
    """All templates for a nominal radius in pixels."""

    offsets = (SPIN_OFFSETS if spins else FINE_OFFSETS) if fine else COARSE_OFFSETS
    scales = FINE_SCALES if fine and not spins else (0.85, 1.0, 1.15) if fine else (1.0,)
    place = np.arange(PATCH, dtype=np.float32) + np.float32(0.5 - PATCH / 2)
    rows: list[tuple[Any, ...]] = []
    first: list[int] = []
    masks: list[np.ndarray] = []
    for kind in SHAPES:
        first.append(len(rows))
        for scale, angle in product(scales, _angles(kind, spins, FINE_ANGLE if fine else COARSE_ANGLE)):
            for offset in offsets:
                x, y = place[None, :] - np.float32(offset[0]), place[:, None] - np.float32(offset[1])
                cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
                distance = signed_distance(
                    kind, x * cos + y * sin, y * cos - x * sin, radius * scale * EXTENT[kind]
                )
                masks.append(np.clip(0.5 - distance / np.float32(EDGE), 0, 1).ravel())
                rows.append((*offset, scale, angle))
    table = np.array(rows)
    return _Bank(
        np.stack(masks, 1).astype(np.float32), np.array(first), table[:, :2], table[:, 2], table[:, 3]
    )


def _angles(kind: str, spins: bool, step: float) -> np.ndarray:
    """Angles that look different, about `step` apart."""
    if not spins or kind == "circle":
        return np.zeros(1)
    turn = 2 * np.pi / SYMMETRY[kind]
    return np.arange(0, turn - 1e-6, turn / np.ceil(turn / step))


def take_patches(pictures: np.ndarray, corner: np.ndarray) -> np.ndarray:
    """Square around each middle (x, y), wrapped round. [F, height, width, ...] -> [F, PATCH, PATCH, ...]"""
    around = np.arange(PATCH) - PATCH // 2
    x, y = np.mod(corner[:, 0, None] + around, WIDTH), np.mod(corner[:, 1, None] + around, HEIGHT)
    return pictures[np.arange(len(pictures))[:, None, None], y[:, :, None], x[:, None, :]]


def rough_centres(mask: np.ndarray, extent: float) -> np.ndarray:
    """Where most of a soft mask lies within the extent. [F, height, width] -> [F, 2] (x, y) in pixels"""
    smooth = _smoothing(round(extent / 2.5, 3))
    blurred = smooth @ mask @ smooth
    peak = blurred.reshape(len(mask), -1).argmax(1)
    return np.stack([peak % WIDTH, peak // WIDTH], -1) + 0.5


@lru_cache(maxsize=32)
def _smoothing(sigma: float) -> np.ndarray:
    """Gaussian smoothing on the ring of pixels, as a matrix. [64, 64] float32"""
    apart = np.mod(np.arange(WIDTH)[:, None] - np.arange(WIDTH) + WIDTH / 2, WIDTH) - WIDTH / 2
    return np.exp(-0.5 * (apart / sigma) ** 2).astype(np.float32)


def fit_templates(
    kind: str, extent: float, spins: bool, mask: np.ndarray, weight: np.ndarray | None, guess: np.ndarray
) -> Fit:
    """Match soft masks [F, height, width]; `weight` of that shape is 0 where nothing is known, None = all is.

    extent  circumscribed radius of the captioned kind; other kinds are tried at the same nominal radius
    guess   [F, 2] centres to start from, good to about 6 pixels
    """

    radius = extent / EXTENT[kind]
    own = SHAPES.index(kind)
    frames = np.arange(len(mask))
    for fine in (False, True):
        bank = _bank(radius, spins, fine)
        middle = np.rint(guess).astype(int)
        scores, covered = _dice(
            bank, take_patches(mask, middle), None if weight is None else take_patches(weight, middle)
        )
        # Where to look closer is decided by the best of all kinds, the pose by the captioned kind's best.
        group = slice(bank.first[own], bank.first[own + 1] if own + 1 < len(SHAPES) else None)
        best = bank.first[own] + scores[:, group].argmax(1) if fine else scores.argmax(1)
        guess = np.mod(middle + bank.offset[best], WIDTH)
    visible = np.ones(len(mask)) if covered is None else covered[frames, best]
    overlap = np.maximum.reduceat(scores, bank.first, axis=1)
    return Fit(guess.astype(np.float32), bank.angle[best], bank.scale[best], visible, overlap)


def _dice(bank: _Bank, mask: np.ndarray, weight: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None]:
    """Weighted Dice of each patch with each template, and how much of the template has weight. [F, K] each"""
    flat = mask.reshape(len(mask), -1)
    area = bank.masks.sum(0)
    square = np.einsum("pk,pk->k", bank.masks, bank.masks)
    if weight is None:
        return 2 * (flat @ bank.masks) / (square + np.einsum("fp,fp->f", flat, flat)[:, None] + 1e-6), None
    known = weight.reshape(len(mask), -1)
    seen = known * flat
    weighed = known @ bank.masks
    # Template edges are thin, so the weighted square of a template is nearly its weighted area.
    own = weighed * (square / area)
    return 2 * (seen @ bank.masks) / (own + np.einsum("fp,fp->f", seen, flat)[:, None] + 1e-6), weighed / area
