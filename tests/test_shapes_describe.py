"""What describe() says about drawn scenes is what was drawn."""

from __future__ import annotations

import numpy as np
import pytest

from training.shapes.describe import describe, kind_of
from training.shapes.reader import read
from training.shapes.world import MovingShape, Scene, render

SCENES = [
    Scene((MovingShape("star", "red", "large", "bounce", (30, 20), velocity=(1.0, 0.7)),), "blue"),
    Scene((MovingShape("circle", "white", "small", "orbit", (32, 32), turn=0.1, orbit_radius=18),), "black"),
    Scene((MovingShape("square", "cyan", "", "drift", (60, 32), velocity=(-1.3, 0.2)),), "purple"),
    Scene((MovingShape("triangle", "green", "", "spin", (30, 34), turn=0.1),), "grey"),
]


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.caption().replace(" ", "_"))
def test_a_drawn_scene_is_described_and_then_found(scene: Scene) -> None:
    frames = render(scene, range(96))
    caption = describe(frames[:24])
    said, drawn = caption.shapes[0], scene.shapes[0]
    assert (said.kind, said.colour, said.size) == (drawn.kind, drawn.colour, drawn.size)
    assert (caption.background, said.motion == "spin") == (scene.background, drawn.motion == "spin")
    rates = read(caption, frames).rates()
    assert min(rates["shape"], rates["colour"], rates["moving"], rates["background"]) > 97
    assert rates["teleports"] == 0


def test_a_scene_that_becomes_another_is_not_found_again() -> None:
    frames = np.concatenate([render(SCENES[0], range(48)), render(SCENES[2], range(48))])
    rates = read(describe(frames[:24]), frames)
    assert rates.rates(0, 48)["shape"] > 97
    assert rates.rates(48, 96)["shape"] < 3
    assert rates.rates()["teleports"] > 0


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.shapes[0].kind)
def test_a_kind_is_seen_in_any_colour(scene: Scene) -> None:
    frames = render(scene, range(24)).astype(np.float32)
    mixed = np.stack((0.6 * frames[..., 1] + 0.3 * frames[..., 2], frames[..., 0], 255 - frames[..., 1]), -1)
    assert kind_of(mixed.round().astype(np.uint8)) == scene.shapes[0].kind


def test_nothing_and_a_blob_have_no_kind() -> None:
    assert kind_of(np.full((24, 64, 64, 3), 90, np.uint8)) is None
    rows, columns = np.indices((64, 64)) - 32
    blob = np.hypot(rows, columns) < 14 + 5 * np.sin(5 * np.arctan2(rows, columns) + np.cos(rows))
    assert (
        kind_of(np.where(blob[None, ..., None], 220, 40).repeat(3, -1).repeat(24, 0).astype(np.uint8)) is None
    )
