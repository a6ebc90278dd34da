"""Reads generated frames of the `shapes` world: what a prompt promised, measured frame by frame.

    reading = read("a red circle bounces over a blue background", frames)  # uint8 [frames, 64, 64, 3]
    reading.rates()  # {"colour": 99.8, "shape": 99.1}

Nothing is learned. A pixel's share of each captioned colour follows from how the renderer blends; shape,
centre and angle are those of the template, drawn by the renderer's own formula on the torus, that overlaps it
best.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from pyengine.export.families.shapes.captions import MOTIONS, SHAPES, VARIATIONS
from pyengine.export.families.shapes.recipe import HEIGHT, WIDTH
from training.shapes.templates import PATCH, SYMMETRY, Fit, fit_templates, rough_centres, take_patches
from training.shapes.world import (
    BACKGROUNDS,
    COLOURS,
    SIZES,
    MovingShape,
    Scene,
    backdrop,
    coverage,
    signed_distance,
)

__all__ = ["Caption", "Reading", "Wanted", "parse_caption", "read"]

WINDOW = 12  # frames of half a second, the unit of `moving`
BATCH = 240  # frames read together, so that the patches stay in the cache's reach
# In a window the world's slowest shape goes 8.8 pixels (4.4 if it turns back half way) or turns 0.66 radians.
LEAST_SHIFT, LEAST_TURN = 2.0, 0.35
# The fastest goes 1.8 pixels per frame: a jump over `gap` frames is one of more than this.
JUMP, JUMP_PER_FRAME = 4.0, 2.2
CUT = 14.0  # change of the background's median from frame to frame, of 255
COLOUR_DISTANCE = 60.0  # the nearest two colours are 87 apart
BACKGROUND_DISTANCE = 40.0
LEAST_AREA, MOST_AREA = 0.4, 2.5  # of the area that the captioned size has
# Dice of the template, below which a region has no shape: what the renderer draws has 0.96 or more even as
# blurred and noisy as an autoencoder leaves it, a ragged blob of the right size 0.8 to 0.9.
LEAST_OVERLAP = 0.92
MOST_STRAY = 0.25  # of a colour's solid pixels may lie elsewhere
HALF_SEEN = 0.5  # of a shape that the other one covers more than this, nothing is asked
LEAST_SEEN = 0.25  # enough of it to say where it is
TIE = 0.03  # Dice by which a half covered shape may lose to another kind that its visible part fits as well
SHARPNESS_EVERY = 4  # frames


@dataclass(frozen=True)
class Wanted:
    """A captioned shape, in the names of world.py."""

    kind: str
    colour: str
    size: str
    motion: str

    @property
    def extent(self) -> float:
        """Circumscribed radius in pixels."""
        return MovingShape(self.kind, self.colour, self.size, self.motion, (0.0, 0.0)).extent


@dataclass(frozen=True)
class Caption:
    """A caption taken apart; the later shape is in front."""

    shapes: tuple[Wanted, ...]
    background: str
    gradient: bool


def parse_caption(text: str) -> Caption:
    """Take a caption of the grammar of world.py and captions.py apart. ValueError for any other sentence."""
    plain = {other: word for word, other in VARIATIONS.items()}
    words = " ".join(plain.get(word, word) for word in re.sub(r"[.,]", " ", text.lower()).split())
    motions = {verb: name for name, verb in MOTIONS.items()}
    size, colour, kind, verb = (
        f"({'|'.join(filter(None, names))})" for names in (SIZES, COLOURS, SHAPES, motions)
    )
    phrase = rf"an? (?:{size} )?{colour} {kind} {verb}"
    ground = rf"over an? ({'|'.join(BACKGROUNDS)}) (gradient )?background"
    match = re.fullmatch(rf"{phrase}(?: and {phrase})? {ground}", words)
    if match is None:
        raise ValueError(
            f"[reader] expected a caption like 'a red circle bounces over a blue background' but got {text!r}"
        )
    parts = match.groups()
    found = [parts[start : start + 4] for start in (0, 4) if parts[start + 1]]
    shapes = tuple(Wanted(kind, colour, size or "", motions[verb]) for size, colour, kind, verb in found)
    return Caption(shapes, parts[8], parts[9] is not None)


@dataclass(frozen=True)
class Reading:
    """What was measured. S captioned shapes, F frames, W windows of half a second."""

    colour: np.ndarray  # [F] bool: every captioned colour is there
    shape: np.ndarray  # [F] bool: every captioned shape is there, in its colour
    background: np.ndarray  # [F] bool: the background is the captioned one
    moving: np.ndarray  # [W] bool: every shape moves
    jump: np.ndarray  # [F] bool: a teleport, a disappearance or a cut from the frame before
    # [F] float32: edge width of the renderer over that of the frame; nan where it was not measured.
    sharpness: np.ndarray
    centre: np.ndarray  # [S, F, 2] float32 (x, y) in pixels; on the torus if the shape drifts
    angle: np.ndarray  # [S, F] float32 radians, within one turn of the shape's symmetry; 0 unless it spins
    visible: np.ndarray  # [S, F] float32: how much of the shape nothing covers; 0 where it was not found

    def rates(self, start: int = 0, stop: int | None = None) -> dict[str, float]:
        """Percent of the frames (windows) from `start` to before `stop`; `sharpness` is the median."""
        part = slice(start, stop)
        windows = self.moving[start // WINDOW : None if stop is None else stop // WINDOW]
        sharpness = self.sharpness[part][~np.isnan(self.sharpness[part])]
        return {
            "colour": 100 * float(self.colour[part].mean()),
            "shape": 100 * float(self.shape[part].mean()),
            "moving": 100 * float(windows.mean()) if len(windows) else float("nan"),
            "teleports": 100 * float(self.jump[part].mean()),
            "sharpness": float(np.median(sharpness)) if len(sharpness) else 0.0,
            "background": 100 * float(self.background[part].mean()),
        }


@dataclass(frozen=True)
class _Seen:
    """One shape in every frame. All arrays [F] or [F, ...]."""

    coloured: np.ndarray  # bool
    shaped: np.ndarray  # bool
    fit: Fit
    sharpness: np.ndarray


def read(prompt: str | Caption, frames: np.ndarray) -> Reading:
    """Measure a video against its prompt. frames: uint8 [F, 64, 64, 3]. ValueError for another prompt."""
    caption = parse_caption(prompt) if isinstance(prompt, str) else prompt
    if (
        frames.ndim != 4
        or frames.shape[1:] != (HEIGHT, WIDTH, 3)
        or frames.dtype != np.uint8
        or not len(frames)
    ):
        got = f"{frames.dtype} {list(frames.shape)}"
        raise ValueError(f"[reader] expected uint8 [frames, {HEIGHT}, {WIDTH}, 3] but got {got}")
    batches = [_read_batch(caption, frames[start : start + BATCH]) for start in range(0, len(frames), BATCH)]
    level, background = (np.concatenate([batch[part] for batch in batches]) for part in (0, 1))
    seen = [_join([batch[2][place] for batch in batches]) for place in range(len(caption.shapes))]
    excused = [_covered(caption, seen, place) for place in range(len(seen))]
    cut = np.zeros(len(frames), bool)
    cut[1:] = np.abs(np.diff(level, axis=0)).max(-1) > CUT
    jumps = [
        _jumps(wanted, one.fit, out) for wanted, one, out in zip(caption.shapes, seen, excused, strict=True)
    ]
    moving = [
        _moving(wanted, one.fit, out) for wanted, one, out in zip(caption.shapes, seen, excused, strict=True)
    ]
    return Reading(
        colour=np.all([one.coloured | out for one, out in zip(seen, excused, strict=True)], 0),
        shape=np.all([one.shaped | out for one, out in zip(seen, excused, strict=True)], 0),
        background=background,
        moving=np.all(moving, 0),
        jump=np.any([cut, *jumps], 0),
        sharpness=_mean_of_known(np.stack([one.sharpness for one in seen])),
        centre=np.stack([one.fit.centre for one in seen]),
        angle=np.stack([one.fit.angle for one in seen]),
        visible=np.stack([one.fit.visible for one in seen]),
    )


def _read_batch(caption: Caption, frames: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[_Seen]]:
    """Background level [F, 3], whether it is right [F], and every shape."""
    planes = np.ascontiguousarray(frames.transpose(3, 0, 1, 2), np.float32)  # [3, F, height, width]
    ground = np.ascontiguousarray(
        backdrop(Scene((), caption.background, caption.gradient)).transpose(2, 0, 1)
    )
    planes -= ground[:, None]
    # Shapes cover less than half of the picture, so the median difference is the background's.
    level = np.median(planes[:, :, 1::3, 1::3].reshape(3, len(frames), -1), axis=-1)
    off = np.abs(planes[:, :, ::2, ::2]).max(0) > BACKGROUND_DISTANCE
    planes -= level[:, :, None, None].astype(np.float32)
    shares = _colour_shares(caption, planes)
    free = np.maximum.reduce(list(shares))[:, ::2, ::2] < 0.1  # pixels that no shape has a share in
    background = (off & free).sum((1, 2)) < 0.1 * np.maximum(free.sum((1, 2)), 1)
    background &= np.abs(level).max(0) < BACKGROUND_DISTANCE
    seen = []
    for place, wanted in enumerate(caption.shapes):
        in_front = shares[place + 1 :]
        weight = 1 - _stretched(np.maximum.reduce(list(in_front))) if len(in_front) else None
        seen.append(_see(wanted, shares[place], weight, frames))
    return level.T, background, seen


def _colour_shares(caption: Caption, planes: np.ndarray) -> np.ndarray:
    """How much of each captioned colour a pixel holds, by least squares.

    planes [3, F, height, width] less the background -> [S, F, height, width]
    """
    ground = backdrop(Scene((), caption.background, caption.gradient))[:, 0]  # [height, 3]
    colours = np.array([COLOURS[wanted.colour] for wanted in caption.shapes], np.float32)
    difference = colours[None] - ground[:, None]  # [height, S, 3]
    weights = np.linalg.pinv(difference.transpose(0, 2, 1)).astype(np.float32)  # [height, S, 3]
    return np.stack([sum(weights[:, i, c, None] * planes[c] for c in range(3)) for i in range(len(colours))])


def _stretched(share: np.ndarray) -> np.ndarray:
    """The share with noise cut off at both ends, in [0, 1]."""
    return np.clip((share - 0.15) / 0.7, 0, 1)


def _see(wanted: Wanted, share: np.ndarray, weight: np.ndarray | None, frames: np.ndarray) -> _Seen:
    """Find one shape. share, weight: [F, height, width]; weight is 0 where another shape is in front."""
    clear = _stretched(share)
    fit = fit_templates(
        wanted.kind,
        wanted.extent,
        wanted.motion == "spin",
        clear,
        weight,
        rough_centres(clear, wanted.extent),
    )
    corner = np.rint(fit.centre).astype(int)
    patch = take_patches(share, corner)
    seen_patch = _stretched(patch)
    expected = _area(wanted.kind, wanted.extent) * np.maximum(fit.visible, 0.1)
    area = seen_patch.sum((1, 2)) / expected
    # The colour where the share is fullest, so that soft edges hardly count.
    core = np.clip(patch, 0, 1) ** 6
    core = np.where(core > 0.3, core, 0)
    pixels = take_patches(frames, corner)
    mean = (
        np.einsum("fyx,fyxc->fc", core, pixels, optimize=True) / np.maximum(core.sum((1, 2)), 1e-6)[:, None]
    )
    names = list(COLOURS)
    # [F, colours]
    distance = np.linalg.norm(
        mean[:, None] - np.array([COLOURS[name] for name in names], np.float32), axis=-1
    )
    right = (distance.argmin(1) == names.index(wanted.colour)) & (distance.min(1) < COLOUR_DISTANCE)
    there = (area > LEAST_AREA) & (area < MOST_AREA) & right
    best = fit.overlap.max(1)
    own = fit.overlap[:, SHAPES.index(wanted.kind)]
    allowed = np.where(fit.visible < 0.8, TIE, 0.0)
    solid = (share > 0.5).sum((1, 2))
    stray = solid - (patch > 0.5).sum((1, 2))
    shaped = there & (own >= best - allowed) & (own > LEAST_OVERLAP) & (stray <= MOST_STRAY * solid)
    fit = fit._replace(visible=np.where(there & (best > 0.5), fit.visible, 0))
    return _Seen(there, shaped, fit, _sharpness(wanted, fit, patch, shaped))


@lru_cache(maxsize=64)
def _area(kind: str, extent: float) -> float:
    """Pixels that a shape covers."""
    place = np.arange(4 * PATCH, dtype=np.float32) / 4 - PATCH / 2
    return float((signed_distance(kind, place[None, :], place[:, None], extent) < 0).sum() / 16)


def _join(parts: list[_Seen]) -> _Seen:
    """Batches one after the other."""
    fit = Fit(*(np.concatenate(arrays) for arrays in zip(*(part.fit for part in parts), strict=True)))
    names = ("coloured", "shaped", "sharpness")
    return _Seen(fit=fit, **{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})


def _wrapped(wanted: Wanted, shift: np.ndarray) -> np.ndarray:
    """A difference of centres, the short way round if the shape wraps."""
    return np.mod(shift + WIDTH / 2, WIDTH) - WIDTH / 2 if wanted.motion == "drift" else shift


def _covered(caption: Caption, seen: list[_Seen], place: int) -> np.ndarray:
    """Frames [F] in which the shape in front hides more than half of this one.

    Where nothing of it is seen, the frames before and after say where it should be.
    """
    wanted, fit = caption.shapes[place], seen[place].fit
    count = len(fit.centre)
    found = np.flatnonzero(fit.visible > 0)
    if place + 1 == len(seen) or not len(found):
        return np.zeros(count, bool)
    steps = _wrapped(wanted, np.diff(fit.centre[found], axis=0))
    path = np.concatenate([fit.centre[found[:1]], fit.centre[found[0]] + np.cumsum(steps, 0)])
    centre = np.stack([np.interp(np.arange(count), found, path[:, axis]) for axis in range(2)], -1)
    front, other = caption.shapes[place + 1], seen[place + 1].fit
    drifts = wanted if wanted.motion == "drift" else front
    distance = np.linalg.norm(_wrapped(drifts, centre - other.centre), axis=-1)
    near = (distance < 0.75 * front.extent + 0.5 * wanted.extent) & (other.visible > 0)
    return near & (fit.visible < HALF_SEEN)


def _jumps(wanted: Wanted, fit: Fit, excused: np.ndarray) -> np.ndarray:
    """Frames [F] to which the shape jumped, or in which it is gone for the first time."""
    jump = np.zeros(len(fit.centre), bool)
    gone = (fit.visible == 0) & ~excused
    jump[1:] = gone[1:] & ~gone[:-1]
    good = np.flatnonzero(fit.visible >= HALF_SEEN)
    if not len(good):
        return jump
    distance = np.linalg.norm(_wrapped(wanted, np.diff(fit.centre[good], axis=0)), axis=-1)
    lost = np.cumsum(gone)  # a gap counts once, when it begins
    far = (distance > JUMP + JUMP_PER_FRAME * np.diff(good)) & (np.diff(lost[good]) == 0)
    jump[good[1:][far]] = True
    return jump


def _moving(wanted: Wanted, fit: Fit, excused: np.ndarray) -> np.ndarray:
    """Windows [W] in which the shape goes or turns; also those in which it is covered a third of the time."""
    windows = max(1, len(fit.centre) // WINDOW)
    result = np.zeros(windows, bool)
    turn = 2 * np.pi / SYMMETRY[wanted.kind]
    for window in range(windows):
        part = slice(window * WINDOW, (window + 1) * WINDOW)
        good = np.flatnonzero(fit.visible[part] >= LEAST_SEEN)
        if excused[part].sum() >= WINDOW // 3 or len(good) < WINDOW // 3:
            result[window] = excused[part].any()
            continue
        shift = _wrapped(wanted, fit.centre[part][good] - fit.centre[part][good[0]])
        result[window] = np.linalg.norm(shift, axis=-1).max() > LEAST_SHIFT
        if wanted.motion == "spin" and not result[window]:
            steps = np.mod(np.diff(fit.angle[part][good]) + turn / 2, turn) - turn / 2
            result[window] = wanted.kind == "circle" or np.ptp(np.cumsum([0.0, *steps])) > LEAST_TURN
    return result


def _edge_width(kind: str, extent: float, fit: Fit, patch: np.ndarray) -> np.ndarray:
    """Integral of share * (1 - share) along the edge's normal, of the mean profile.

    patch: raw shares [F, PATCH, PATCH] -> [F] pixels
    """
    place = np.arange(PATCH, dtype=np.float32) + np.float32(0.5 - PATCH / 2)
    offset = (np.rint(fit.centre) - fit.centre).astype(np.float32)
    x, y = np.broadcast_arrays(
        place[None, None, :] + offset[:, 0, None, None], place[None, :, None] + offset[:, 1, None, None]
    )
    cos, sin = (function(fit.angle.astype(np.float32))[:, None, None] for function in (np.cos, np.sin))
    scale = fit.scale.astype(np.float32)[:, None, None]
    distance = signed_distance(kind, (x * cos + y * sin) / scale, (y * cos - x * sin) / scale, extent) * scale
    # No finer than the pixels: an upright square's edge meets only every whole step.
    bins, step, reach = (
        10,
        1.0,
        5.0,
    )
    index = np.floor((distance + reach) / step).astype(int)
    inside = (index >= 0) & (index < bins)
    index += bins * np.arange(len(patch))[:, None, None]
    count = np.bincount(index[inside], minlength=bins * len(patch))
    total = np.bincount(index[inside], weights=patch[inside], minlength=bins * len(patch))
    profile = np.clip(total / np.maximum(count, 1), 0, 1)
    return np.where(count > 0, profile * (1 - profile), 0).reshape(len(patch), bins).sum(1) * step


@lru_cache(maxsize=64)
def _own_width(kind: str, extent: float, spins: bool) -> float:
    """The edge width of the renderer's own drawing, measured the same way. Pixels."""
    rng = np.random.default_rng(0)
    size = next(name for name in SIZES if abs(Wanted(kind, "red", name, "spin").extent - extent) < 1e-6)
    places = [
        MovingShape(kind, "red", size, "spin" if spins else "bounce", (32, 32), angle=a)
        for a in rng.uniform(0, 6, 16)
    ]
    moved = [MovingShape(**{**vars(one), "start": tuple(32 + rng.uniform(-0.5, 0.5, 2))}) for one in places]
    share = np.concatenate([coverage(one, np.zeros(1)) for one in moved])
    fit = fit_templates(
        kind, extent, spins, _stretched(share), None, rough_centres(_stretched(share), extent)
    )
    return float(
        np.median(_edge_width(kind, extent, fit, take_patches(share, np.rint(fit.centre).astype(int))))
    )


def _sharpness(wanted: Wanted, fit: Fit, patch: np.ndarray, shaped: np.ndarray) -> np.ndarray:
    """1 = as sharp as drawn, 0.5 = edges twice as wide, nan = not measured. [F] float32"""
    result = np.full(len(patch), np.nan, np.float32)
    chosen = np.arange(0, len(patch), SHARPNESS_EVERY)
    chosen = chosen[shaped[chosen] & (fit.visible[chosen] > 0.95)]
    if len(chosen):
        part = Fit(*(array[chosen] for array in fit))
        width = _edge_width(wanted.kind, wanted.extent, part, patch[chosen])
        result[chosen] = _own_width(wanted.kind, wanted.extent, wanted.motion == "spin") / np.maximum(
            width, 1e-3
        )
    return result


def _mean_of_known(values: np.ndarray) -> np.ndarray:
    """Mean over the first axis of what is not nan."""
    known = ~np.isnan(values)
    total = np.where(known, values, 0).sum(0)
    return np.where(known.any(0), total / np.maximum(known.sum(0), 1), np.nan).astype(np.float32)
