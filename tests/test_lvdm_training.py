"""Training of the small LVDM: which clips it takes, what is known of them, and that it learns and resumes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pyengine.export.families.shapes.captions import build_tokenizer, token_ids
from training.lvdm import train_shapes

CAPTIONS = (
    "a red circle bounces over a blue background",
    "a red circle bounces over a blue gradient background",
    "a red circle bounces and a green star drifts over a blue background",
    "a small white star spins over a grey background",
    "a white star spins over a grey background",
)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A corpus of two clips that are plain scenes, whose latents are 0 and 1."""
    tokenizer, source = build_tokenizer(), tmp_path / "shapes"
    source.mkdir()
    tokens = torch.stack([torch.from_numpy(token_ids(tokenizer, caption)) for caption in CAPTIONS])
    latents = (torch.arange(5) / 4).reshape(5, 1, 1, 1, 1).expand(5, 20, 8, 8, 8).half().contiguous()
    save_file({"latents": latents, "tokens": tokens}, source / "0000.safetensors")
    train_shapes.select_corpus(tmp_path / "lvdm", source)
    return tmp_path / "lvdm"


def test_clips_of_one_shape_over_one_colour_that_is_not_small_are_selected(corpus: Path) -> None:
    latents = train_shapes.load_corpus(corpus)
    assert latents.shape == (2, 20, 8, 8, 8)
    assert latents.dtype == torch.float16
    assert latents[:, 0, 0, 0, 0].tolist() == [0, 1]


@pytest.mark.parametrize(("network", "frames"), [("prediction", 4), ("interpolation", 5)])
def test_known_latents_are_those_that_sampling_knows(network: str, frames: int) -> None:
    torch.manual_seed(0)
    place = torch.arange(20).reshape(1, 20, 1, 1, 1).expand(3, 20, 8, 8, 8).half()
    clean, mask = train_shapes.draw(place, network)
    batch = train_shapes.BATCH[network]
    assert clean.shape == (batch, 8, frames, 8, 8)
    assert mask.shape == (batch, 1, frames, 8, 8)
    stride = train_shapes.KEY_STRIDE if network == "prediction" else 1
    assert (clean[:, 0, :, 0, 0].diff(dim=1) == stride).all()
    kinds = {tuple(row) for row in mask[:, 0, :, 0, 0].int().tolist()}
    if network == "prediction":
        assert kinds == {(0, 0, 0, 0), (1, 0, 0, 0), (1, 1, 0, 0)}
    else:
        assert kinds == {(0, 0, 0, 0, 0), (1, 0, 0, 0, 1)}


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_it_learns_and_resumes(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_shapes, "BATCH", {"prediction": 4, "interpolation": 4})
    monkeypatch.setattr(train_shapes, "clock", lambda folder, minutes: iter([0.5] * 20))
    monkeypatch.setattr(train_shapes, "learning_rate", lambda progress, step: 1.0)  # no warm-up
    folder = tmp_path / "runs"
    train_shapes.train(folder, corpus, 1)
    train_shapes.train(folder, corpus, 1)
    for network in ("prediction", "interpolation"):
        rows = (folder / network / "loss.csv").read_text().splitlines()[1:]
        steps, losses = zip(
            *((int(row.split(",")[0]), float(row.split(",")[1])) for row in rows), strict=True
        )
        assert steps == ((20, 40, 60, 80) if network == "prediction" else (20, 40))
        assert losses[-1] < 0.9 * losses[0] < 2
