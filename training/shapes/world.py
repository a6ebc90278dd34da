"""The world of the `shapes` family: a procedural renderer with exact ground truth.

One or two anti-aliased shapes move over a plain or gradient background, 64x64 RGB at 24 frames per second. Every position is a
closed formula of the frame number, so any frame of an endless video can be drawn alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np

from pyengine.export.families.shapes.captions import MOTIONS, SHAPES
from pyengine.export.families.shapes.recipe import HEIGHT, WIDTH

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (232, 48, 48),
    "orange": (248, 140, 32),
    "yellow": (248, 224, 56),
    "green": (56, 196, 80),
    "cyan": (64, 216, 224),
    "blue": (56, 104, 248),
    "purple": (168, 80, 224),
    "white": (248, 248, 248),
}
# Backgrounds are muted, so that a shape stands out from any of them that does not bear its own name.
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "black": (16, 16, 20),
    "grey": (112, 112, 116),
    "red": (96, 32, 36),
    "orange": (116, 72, 32),
    "yellow": (120, 108, 44),
    "green": (32, 80, 48),
    "cyan": (32, 84, 92),
    "blue": (32, 48, 104),
    "purple": (68, 40, 96),
    "white": (200, 200, 204),
}
GRADIENT_END = 0.4  # a gradient runs from the colour (top) to this fraction of it (bottom)

# Nominal radius in pixels; "" is not said in the caption.
SIZES: dict[str, float] = {
    "small": 7.0,
    "": 9.5,
    "large": 12.5,
}

# Each shape's circumscribed radius over its nominal radius, so that all four look about equally large.
_EXTENT = {"circle": 1.0, "square": 1.25, "triangle": 1.45, "star": 1.45}
_STAR_INNER = 0.5  # inner over outer radius of the five-pointed star


@dataclass(frozen=True)
class MovingShape:
    """One shape. `start` and `velocity` are in pixels and pixels per frame; `angle` and `turn` in radians (per frame)."""

    kind: str
    colour: str
    size: str
    motion: str
    start: tuple[float, float]
    velocity: tuple[float, float] = (0.0, 0.0)
    angle: float = 0.0
    turn: float = 0.0
    orbit_radius: float = 0.0

    @property
    def extent(self) -> float:
        """Circumscribed radius in pixels."""
        return SIZES[self.size] * _EXTENT[self.kind]

    def centre(self, frames: np.ndarray) -> np.ndarray:
        """Centre (x, y) in pixels at each frame number. [frames] -> [frames, 2] float64."""
        frames = np.asarray(frames, np.float64)
        start, velocity = np.asarray(self.start), np.asarray(self.velocity)
        if self.motion == "orbit":
            phase = self.angle + self.turn * frames
            return start + self.orbit_radius * np.stack([np.cos(phase), np.sin(phase)], -1)
        moved = start + frames[:, None] * velocity
        if self.motion == "drift":
            return np.mod(moved, WIDTH)
        if self.motion == "bounce":  # a triangle wave between the walls
            span = WIDTH - 2 * self.extent
            folded = np.mod(moved - self.extent, 2 * span)
            return self.extent + np.minimum(folded, 2 * span - folded)
        return np.broadcast_to(start, moved.shape)

    def rotation(self, frames: np.ndarray) -> np.ndarray:
        """Angle in radians at each frame number; only a spinning shape turns. [frames] float64."""
        frames = np.asarray(frames, np.float64)
        return self.angle + self.turn * frames if self.motion == "spin" else np.zeros_like(frames)

    def phrase(self) -> str:
        """Its part of the caption: "a small red circle bounces"."""
        return f"{with_article(' '.join(filter(None, (self.size, self.colour, self.kind))))} {MOTIONS[self.motion]}"


@dataclass(frozen=True)
class Scene:
    """What a video shows; the later shape is drawn on top."""

    shapes: tuple[MovingShape, ...]
    background: str
    gradient: bool = False

    def caption(self) -> str:
        """The scene in plain words."""
        ground = (
            f"{self.background} gradient background" if self.gradient else f"{self.background} background"
        )
        return f"{' and '.join(shape.phrase() for shape in self.shapes)} over {with_article(ground)}"


def with_article(noun: str) -> str:
    """ "an orange star", "a red star"."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def sample_scene(rng: np.random.Generator) -> Scene:
    """Draw a scene: two shapes in three of ten, a gradient in one of four."""
    background = str(rng.choice(list(BACKGROUNDS)))
    colours = [name for name in COLOURS if name != background]
    count = 2 if rng.random() < 0.3 else 1
    picked = rng.choice(colours, size=count, replace=False)
    kinds = rng.choice(SHAPES, size=count, replace=False)
    return Scene(
        shapes=tuple(
            sample_shape(rng, str(kind), str(colour)) for kind, colour in zip(kinds, picked, strict=True)
        ),
        background=background,
        gradient=bool(rng.random() < 0.25),
    )


def sample_shape(rng: np.random.Generator, kind: str, colour: str) -> MovingShape:
    """Draw size and motion. A circle does not spin: nobody could see it."""
    size = str(rng.choice(list(SIZES)))
    motion = str(rng.choice([name for name in MOTIONS if (kind, name) != ("circle", "spin")]))
    extent = SIZES[size] * _EXTENT[kind]
    direction = rng.uniform(0, 2 * np.pi)
    speed = rng.uniform(0.8, 1.8)
    sign = rng.choice([-1.0, 1.0])
    make = partial(MovingShape, kind, colour, size, motion)
    if motion == "orbit":
        radius = rng.uniform(10.0, 30.0 - extent) if extent < 20 else 10.0
        return make(
            start=(WIDTH / 2 + rng.uniform(-2, 2), HEIGHT / 2 + rng.uniform(-2, 2)),
            angle=direction,
            turn=sign * speed / radius,
            orbit_radius=radius,
        )
    lowest, highest = extent, WIDTH - extent
    start = (rng.uniform(lowest, highest), rng.uniform(lowest, highest))
    if motion == "spin":
        return make(start=start, angle=direction, turn=sign * rng.uniform(0.06, 0.16))
    return make(start=start, velocity=(speed * np.cos(direction), speed * np.sin(direction)))


def coverage(shape: MovingShape, frames: np.ndarray) -> np.ndarray:
    """How much of each pixel the shape covers, anti-aliased over one pixel. [frames, height, width] float32 in [0, 1]."""
    centre = shape.centre(frames).astype(np.float32)
    pixel = np.arange(WIDTH, dtype=np.float32) + 0.5
    x = pixel[None, None, :] - centre[:, 0, None, None]  # [frames, 1, width]
    y = pixel[None, :, None] - centre[:, 1, None, None]  # [frames, height, 1]
    if shape.motion == "drift":  # wraps round: the nearest copy counts
        x = np.mod(x + WIDTH / 2, WIDTH) - WIDTH / 2
        y = np.mod(y + HEIGHT / 2, HEIGHT) - HEIGHT / 2
    if shape.motion == "spin":
        angle = shape.rotation(frames).astype(np.float32)[:, None, None]
        x, y = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    return np.clip(0.5 - signed_distance(shape.kind, x, y, shape.extent), 0.0, 1.0)


def signed_distance(kind: str, x: np.ndarray, y: np.ndarray, extent: float) -> np.ndarray:
    """Distance in pixels from (x, y) to the edge of a shape centred on the origin, negative inside; y points down."""
    if kind == "circle":
        return np.sqrt(x * x + y * y) - extent
    if kind == "square":
        return np.maximum(np.abs(x), np.abs(y)) - extent / np.float32(np.sqrt(2))
    if kind == "triangle":  # equilateral, apex up: three half-planes at half the circumscribed radius
        slope_x, slope_y = np.float32(np.sqrt(3) / 2), np.float32(0.5)
        return np.maximum(np.abs(x) * slope_x - y * slope_y, y) - extent / 2
    if kind == "star":  # fold into one of ten mirrored wedges, then one straight edge from tip to notch
        wedge = np.float32(np.pi / 5)
        angle = np.arctan2(x, -y)
        angle = np.abs(np.mod(angle + wedge, 2 * wedge) - wedge)
        radius = np.sqrt(x * x + y * y)
        u, v = radius * np.cos(angle), radius * np.sin(angle)
        notch = np.array([np.cos(wedge), np.sin(wedge)], np.float32) * np.float32(_STAR_INNER * extent)
        edge = notch - np.array([extent, 0.0], np.float32)
        normal = np.array([edge[1], -edge[0]], np.float32) / np.float32(np.hypot(*edge))
        return (u - np.float32(extent)) * normal[0] + v * normal[1]
    raise ValueError(f"[world] expected a shape of {', '.join(SHAPES)} but got {kind!r}")


def backdrop(scene: Scene) -> np.ndarray:
    """The background alone. [height, width, 3] float32 in 0..255."""
    colour = np.array(BACKGROUNDS[scene.background], np.float32)
    fall = np.linspace(1.0, GRADIENT_END if scene.gradient else 1.0, HEIGHT, dtype=np.float32)
    return np.broadcast_to(fall[:, None, None] * colour, (HEIGHT, WIDTH, 3))


def render(scene: Scene, frames: np.ndarray | range) -> np.ndarray:
    """Draw the given frame numbers of a scene. [frames] -> uint8 [frames, 64, 64, 3] RGB."""
    frames = np.asarray(frames)
    picture = np.broadcast_to(backdrop(scene), (len(frames), HEIGHT, WIDTH, 3)).copy()
    for shape in scene.shapes:
        colour = np.array(COLOURS[shape.colour], np.float32)
        picture += coverage(shape, frames)[..., None] * (colour - picture)
    return (picture + 0.5).astype(np.uint8)
