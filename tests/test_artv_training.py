"""The training of the small ART-V: its corpus, its batches and its loss."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pyengine.export.families.artv.small import TextTower, small_denoiser
from pyengine.export.families.shapes.autoencoder import Encoder
from training.artv import train
from training.artv.corpus import CLIP_LATENTS, SWITCH, continued, encode_shard, single_scene
from training.artv.train import WITHOUT, draw, frame_loss, plain
from training.shapes.world import WIDTH, MovingShape, Scene

torch.set_num_threads(1)


def numbered(clips: int = 3) -> dict[str, Tensor]:
    """A corpus whose latents say where they are from: 1000 * clip + 100 * scene + place, and 99 for an anchor."""
    clip, scene, place = (torch.arange(n) for n in (clips, 2, CLIP_LATENTS))
    value = 1000 * clip[:, None, None] + 100 * scene[None, :, None] + place
    spread = torch.ones(1, 1, 1, 8, 8, 8)
    return {
        "latents": value[..., None, None, None] * spread,
        "anchors": (1000 * clip[:, None] + 100 * scene + 99)[..., None, None, None] * spread[0],
        "tokens": (10 + 2 * clip[:, None] + scene)[..., None].expand(-1, -1, 20).contiguous(),
    }


def test_a_batch_has_every_situation_that_a_stream_meets() -> None:
    torch.manual_seed(0)
    batch = draw(numbered(), 4000)
    target, newest, older, anchor = (
        each[:, 0, 0, 0].long() for each in (batch.target, *batch.references.unbind(1), batch.anchor)
    )
    named = batch.tokens[:, 0] > 1  # the caption was not dropped
    assert torch.equal((10 + 2 * (target // 1000) + target // 100 % 10)[named], batch.tokens[:, 0][named])
    place, of_newest, of_older = (each % 100 for each in (target, newest, older))
    assert torch.equal(of_newest, place - 1)
    repeated = newest == older
    assert torch.equal(of_older[~repeated], place[~repeated] - 2)
    assert torch.equal(anchor[repeated], newest[repeated])
    scene, before = target // 100 % 10, older // 100 % 10
    switched = scene != before
    assert set(place[switched].tolist()) == {SWITCH, SWITCH + 1}
    assert bool((scene[switched] == 1).all())
    old_anchor = (anchor // 100 % 10) != scene
    alone = batch.referenced == 0
    shares = [float(each.float().mean()) for each in (repeated, switched, old_anchor, alone, ~named)]
    assert np.allclose(shares, [0.06, 0.08, 0.18, 0.155, 0.1], atol=0.025)
    assert bool((batch.anchored[alone] == 0).float().mean() > 0.5)


@pytest.mark.parametrize("seed", range(12))
def test_a_scene_goes_on_from_where_another_is(seed: int) -> None:
    rng = np.random.default_rng(seed)
    first, frame = single_scene(rng), 100
    second = continued(first, single_scene(rng), frame)
    before, after = first.shapes[0], second.shapes[0]
    here, there = (shape.centre(np.array([frame]))[0] for shape in (before, after))
    if after.motion in ("drift", "spin", "bounce"):
        inside = np.clip(here, after.extent, WIDTH - after.extent)
        apart = (there - (here if after.motion == "drift" else inside) + WIDTH / 2) % WIDTH - WIDTH / 2
        assert np.abs(apart).max() < 1e-6
    else:
        assert np.hypot(*(there - WIDTH / 2)) <= 30
    assert second.caption() != ""


def test_a_straight_motion_keeps_its_velocity() -> None:
    bounces = MovingShape("circle", "red", "", "bounce", (30.0, 30.0), velocity=(1.0, -0.5))
    drifts = MovingShape("star", "blue", "", "drift", (0.0, 0.0), velocity=(0.3, 1.2))
    scene = Scene((bounces,), "black")
    made = continued(scene, Scene((drifts,), "grey"), 8).shapes[0]
    assert np.allclose(made.velocity, (1.0, -0.5))
    assert np.allclose(made.centre(np.array([8])), bounces.centre(np.array([8])))


def test_a_shard_has_pairs_of_scenes() -> None:
    torch.manual_seed(0)
    made = encode_shard(Encoder().eval(), np.random.default_rng(0), 2)
    assert {name: tuple(value.shape) for name, value in made.items()} == {
        "latents": (2, 2, CLIP_LATENTS, 8, 8, 8),
        "anchors": (2, 2, 8, 8, 8),
        "tokens": (2, 2, 20),
    }


def test_plain_scenes_are_known_by_their_captions() -> None:
    corpus = numbered()
    corpus["tokens"][0, 1, 3] = train.build_tokenizer().get_vocab()["gradient"]
    assert plain(corpus)["latents"].shape[0] == 2


@pytest.mark.parametrize("without", [None, *WITHOUT])
def test_the_loss_reaches_what_is_trained(without: str | None) -> None:
    """Every part gets a gradient but the one that is left out."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"denoiser": small_denoiser(), "text": TextTower()})
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    corpus = {name: value / 2000 if value.ndim > 3 else value for name, value in numbered().items()}
    loss, _ = frame_loss(model, draw(corpus, 16), without)
    loss.backward()
    reached = {
        name.split(".")[1]
        for name, parameter in model["denoiser"].named_parameters(prefix="denoiser")
        if parameter.grad is not None and parameter.grad.any()
    }
    wanted = {"unet", "adapter", "mask", "anchor"} - {without or ""}
    assert reached == wanted
    assert all(parameter.grad is not None for parameter in model["text"].parameters())
