"""What the autoencoder's latents are asked to say, against the world's own formulas."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pyengine.bundle.bundle import Bundle
from pyengine.export.families.shapes.captions import SHAPES
from pyengine.export.families.shapes.modules import Modules, autoencoder_weights
from training.shapes import train_autoencoder
from training.shapes.alignment import Alignment, CellLabels, label_cells
from training.shapes.world import MovingShape, Scene, coverage, sample_scene

pytestmark = pytest.mark.usefixtures("one_thread")


def cell_of(shape: MovingShape, frame: float) -> tuple[int, int]:
    """Row and column of the cell under the shape's centre."""
    x, y = shape.centre(np.array([frame]))[0]
    return int(y) // 8, int(x) // 8


@pytest.mark.parametrize("kind", SHAPES)
def test_the_cell_under_a_shape_names_it(kind: str) -> None:
    shape = MovingShape(kind, "red", "", "bounce", (30.0, 34.0), velocity=(1.1, -0.7))
    labels = label_cells(Scene((shape,), "black"), range(40, 80))
    assert labels.kind.shape == labels.share.shape == (10, 8, 8)
    assert labels.pose.shape == (10, 3, 8, 8)
    for latent in range(10):
        row, column = cell_of(shape, 40 + 4 * latent + 1.5)
        assert labels.kind[latent, row, column] == 1 + SHAPES.index(kind)
        # Upright, at rest.
        np.testing.assert_allclose(labels.pose[latent, :, row, column], [1, 0, 0], atol=1e-6)


def test_shares_are_what_the_renderer_covers() -> None:
    scene = sample_scene(np.random.default_rng(3))
    shape = scene.shapes[0]
    labels = label_cells(Scene((shape,), "black"), range(100, 124))
    covered = coverage(shape, np.arange(100, 124)).sum() / 4 / 64  # cells' worth, per latent
    np.testing.assert_allclose(labels.share.sum(), covered, rtol=1e-4)
    assert ((labels.kind > 0) == (labels.share >= 0.1)).all()


def test_the_pose_of_a_spinning_shape_turns_with_its_symmetry() -> None:
    shape = MovingShape("square", "red", "large", "spin", (32.0, 32.0), angle=0.3, turn=0.1)
    pose = label_cells(Scene((shape,), "black"), range(0, 40)).pose[:, :, 4, 4].numpy()
    angle = 4 * (0.3 + 0.1 * (np.arange(10) * 4 + 1.5))
    np.testing.assert_allclose(pose[:, 0], np.cos(angle), atol=1e-5)
    np.testing.assert_allclose(pose[:, 1], np.sin(angle), atol=1e-5)
    np.testing.assert_allclose(pose[:, 2], 4 * 0.1 / 0.5, atol=1e-6)


def test_the_shape_in_front_names_the_cells_that_it_covers() -> None:
    back = MovingShape("square", "red", "large", "spin", (32.0, 32.0))
    front = MovingShape("circle", "blue", "small", "spin", (32.0, 32.0))
    kind = label_cells(Scene((back, front), "black"), range(4)).kind[0]
    assert kind[3, 3] == 1 + SHAPES.index("circle")
    assert (kind == 1 + SHAPES.index("square")).sum() > 0


def test_latents_that_say_the_kind_are_read_and_others_are_not() -> None:
    torch.manual_seed(0)
    scenes = [sample_scene(np.random.default_rng(seed)) for seed in range(48)]
    parts = [label_cells(scene, range(8)) for scene in scenes]
    labels = CellLabels(*(torch.cat(field) for field in zip(*parts, strict=True)))
    shown = torch.nn.functional.one_hot(labels.kind, 5).permute(0, 3, 1, 2).float() * 3
    telling = torch.cat([shown, labels.pose], 1)
    reached = {}
    for name, latents in {"telling": telling, "silent": torch.randn_like(telling)}.items():
        head = Alignment()
        optimiser = torch.optim.Adam(head.parameters(), 3e-2)
        for _ in range(60):
            loss, right = head.loss(latents, labels)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        reached[name] = float(right)
    assert reached["telling"] > 0.85 > 0.5 > reached["silent"]


def test_the_autoencoder_trains_whole_then_the_decoder_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(folder: str, *options: object) -> dict[str, torch.Tensor]:
        words = ["train", "--folder", str(tmp_path / folder), "--batch", "1", "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", [*words, *map(str, options)])
        train_autoencoder.main()
        return load_file(tmp_path / folder / "model.safetensors")

    first = train("whole", "--steps", 1)
    second = train("whole", "--steps", 2)  # goes on where it stopped
    changed = {name for name in first if not torch.equal(first[name], second[name])}
    assert {name.split(".")[0] for name in changed} == {"encoder", "decoder", "alignment"}

    alone = train("decoder", "--steps", 1, "--encoder", tmp_path / "whole")
    average = autoencoder_weights(tmp_path / "whole")
    assert alone.keys() == average.keys()
    for name in average:
        assert torch.equal(alone[name], average[name]) == name.startswith("encoder."), name

    modules = Modules.trained(tmp_path / "decoder", None, Bundle.load("shapes"))
    torch.testing.assert_close(
        modules.encoder.stem.weight.detach(), average["encoder.stem.weight"], atol=1e-3, rtol=1e-3
    )
