"""Captions as training says them: what a scene shows, in varied words."""

from __future__ import annotations

import numpy as np

from pyengine.export.families.shapes.captions import VARIATIONS
from training.shapes.world import Scene


def varied_caption(scene: Scene, rng: np.random.Generator) -> str:
    """The scene's caption; each word that has another form takes it once in five."""
    return " ".join(
        VARIATIONS[word] if word in VARIATIONS and rng.random() < 0.2 else word
        for word in scene.caption().split()
    )
