"""What the benchmark of StreamingT2V's claims says of videos whose borders are known."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from training.shapes.world import MovingShape, Scene, render

PROMPT = "a red circle bounces over a blue background"
FRAMES = 160  # chunks begin at 64, 96 and 128


@pytest.fixture
def benchmark_module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    return importlib.import_module("quality_streamingt2v")


def video(start: tuple[float, float], frames: range) -> np.ndarray:
    return render(Scene((MovingShape("circle", "red", "", "bounce", start, (1.0, 0.4)),), "blue"), frames)


def test_the_renderer_has_no_borders(benchmark_module: ModuleType) -> None:
    found = benchmark_module.borders(PROMPT, video((20, 20), range(FRAMES)))
    assert found["cuts"] == found["cuts_elsewhere"] == 0
    assert found["unsteady"] < 0.5


def test_a_jump_at_a_border_is_counted_there(benchmark_module: ModuleType) -> None:
    frames = np.concatenate([video((20, 20), range(96)), video((45, 40), range(96, FRAMES))])
    found = benchmark_module.borders(PROMPT, frames)
    assert found["cuts"] == pytest.approx(100 / 3)
    assert found["cuts_elsewhere"] == 0
    assert found["unsteady"] > 5 * max(found["unsteady_elsewhere"], 0.1)


def test_a_jump_within_a_chunk_is_counted_elsewhere(benchmark_module: ModuleType) -> None:
    frames = np.concatenate([video((20, 20), range(80)), video((45, 40), range(80, FRAMES))])
    found = benchmark_module.borders(PROMPT, frames)
    assert found["cuts"] == 0
    assert found["cuts_elsewhere"] == pytest.approx(100 / (FRAMES - 3))


def test_goals_are_reported_as_reached_or_missed(benchmark_module: ModuleType) -> None:
    rates = {
        "colour": 96.0, "shape": 90.0, "moving": 97.0, "teleports": 0.1, "sharpness": 0.8, "background": 99.0,
    }  # fmt: skip
    parts = [{**rates, "kind": kind} for kind in (96.0, 96.0, 93.0, 92.0)]
    marks = {"cuts": 1.0, "cuts_elsewhere": 0.5, "unsteady": 0.4, "unsteady_elsewhere": 0.2}
    result = {
        "variant": "shipped", "prompt": PROMPT, "seed": 0, "frames": FRAMES, "calls": 3, "seconds": 1.0,
        "whole": {**rates, "kind": 94.2}, "quarters": parts, "course": parts, "borders": marks, "key": "x",
    }  # fmt: skip
    text = benchmark_module.claims([result])
    assert "| as shipped, by the engine | kind | >= 95 | 94.2 | missed |" in text
    assert "| as shipped, by the engine | colour | >= 95 | 96.0 | reached |" in text
    assert "| as shipped, by the engine | kind, last quarter less first | >= -3 | -4.0 | missed |" in text
    assert "| as shipped, by the engine | 1.00 | 0.50 | 0.40 | 0.20 |" in text
