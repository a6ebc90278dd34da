"""What describe() says about drawn scenes is what was drawn."""

from __future__ import annotations

import numpy as np
import pytest

from pyengine.export.families.shapes.describe import describe
from pyengine.export.families.shapes.reader import read
from pyengine.export.families.shapes.world import MovingShape, Scene, render

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
