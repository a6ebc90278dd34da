"""The small StreamingT2V: its components against what was trained, its training, and its sampling."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import pyengine
from pyengine.errors import ConfigError, ShapeError
from pyengine.export.families.shapes.autoencoder import Decoder
from pyengine.export.families.shapes.text_encoder import null_ids
from pyengine.export.families.streamingt2v.small import CONDITION_FRAMES, FRAMES, TIMESTEPS, SmallNetworks
from pyengine.export.families.streamingt2v.small_export import assemble_small, export_small, method
from pyengine.export.parity import parity
from pyengine.methods import StreamingT2VSettings, method_settings
from pyengine.schedule.samplers import Coefficients, alphas_cumprod
from training.streamingt2v import sample, train
from training.streamingt2v.model import CONDITIONINGS, Model

pytestmark = pytest.mark.usefixtures("one_thread")
CAPTIONS = ("a red circle bounces over a blue background", "a white star spins over a grey background")
CONSTANT = ("text_encoder", "image_encoder", "appearance", "condition", "first_text", "decoder")


def filled(model: nn.Module) -> nn.Module:
    """What begins as zero, drawn, so that a forgotten path shows."""
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return model.eval().requires_grad_(False)


@pytest.fixture
def model() -> Model:
    torch.manual_seed(5)
    found = filled(Model())
    assert isinstance(found, Model)
    return found


def networks_of(model: Model) -> SmallNetworks:
    networks = SmallNetworks()
    networks.load_state_dict(model.state_dict())
    return networks


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_the_components_compute_what_was_trained(model: Model) -> None:
    _, parts = assemble_small(networks := networks_of(model), Decoder())
    model.load_state_dict(networks.state_dict())  # rounded as the bundle has them
    tokens, anchor = sample.encode(CAPTIONS[:1]), normal(1, 8, 8, 8)
    given, x, timestep = normal(1, CONDITION_FRAMES, 8, 8, 8), normal(1, FRAMES, 8, 8, 8), 121
    text = parts["text_encoder"].module(tokens[0])
    keys = parts["appearance"].module(text, parts["image_encoder"].module(anchor[0]))
    keys = [key[:, None] for key in keys]  # an axis of streams
    count = 2 * len(model.base_model.cross_attentions())
    level = torch.full((1, FRAMES), (timestep + 1) / TIMESTEPS)
    condition = parts["condition"].module(given)
    texts = [part[kind::2] for part in (keys[:count], keys[count:]) for kind in range(2)]
    both = parts["denoiser"].module(x, level, condition, *texts)[:, 0]
    contexts = (model.context(tokens, anchor), model.context(null_ids()[None], torch.zeros_like(anchor)))
    for found, context in zip(both, contexts, strict=True):
        expected = model.predict(x, torch.tensor([timestep]), context, given)[0]
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-3 * float(expected.abs().max()))
    plain = [key[:, None] for key in parts["first_text"].module(text)]
    first = parts["first_denoiser"].module(x, level, plain[::2], plain[1::2])[0, 0]
    expected = model.predict(x, torch.tensor([timestep]), model.context(tokens))[0]
    torch.testing.assert_close(first, expected, rtol=0, atol=2e-3 * float(expected.abs().max()))
    assert (both[0] - both[1]).abs().max() > 0.01
    assert (both[0] - first).abs().max() > 0.01


def test_the_shipped_settings_are_those_of_the_training() -> None:
    settings = method_settings(method(SmallNetworks()))
    assert isinstance(settings, StreamingT2VSettings)
    assert settings.start_chunks == 0
    assert settings.attentions == (4, 2)
    # A network that predicts v exactly: x at the highest level, and a step from there to clean ones gives x0 but for the first noise.
    table = alphas_cumprod(settings.betas[0], settings.betas[1], TIMESTEPS)
    level = 242 / TIMESTEPS
    scales = settings.make_sampler()([level], [0.0])
    a, s = table[241] ** 0.5, (1 - table[241]) ** 0.5
    assert isinstance(scales, Coefficients)
    clean, noise = 0.7, -1.3
    velocity = a * noise - s * clean
    out = scales.sample[0] * (a * clean + s * noise) + scales.prediction[0] * velocity
    assert out == pytest.approx(clean, abs=0.05)
    with pytest.raises(ConfigError, match=r"\[method.takes_frames\] expected true"):
        method_settings({**method(SmallNetworks()), "first": None})


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CONSTANT, "denoiser", "first_denoiser"])
def test_a_component_runs_as_torch_computes_it(
    name: str, model: Model, tmp_path: Path, plan_cache: Path
) -> None:
    networks = networks_of(model)
    decoder = filled(Decoder())
    assert isinstance(decoder, Decoder)
    bundle = export_small(networks, decoder, tmp_path / "bundle", only={name})
    part = assemble_small(networks, decoder)[1][name]
    parity(bundle, {name: (part.module, part.inputs)}, precisions=("fp32",), cache_dir=plan_cache).check()


@pytest.mark.slow
def test_a_bundle_streams_and_is_small(model: Model, tmp_path: Path, plan_cache: Path) -> None:
    bundle = export_small(networks_of(model), Decoder(), tmp_path / "bundle")
    assert sum(path.stat().st_size for path in bundle.folder.iterdir()) < 8e6
    engine = pyengine.load(bundle.folder, cache_dir=plan_cache, threads=1)
    frames = 4 * FRAMES + 40  # a first window, a whole chunk, and a part of one
    settings = {"steps": 2, "first": {"steps": 2, "guidance": 2.0}}
    with engine.stream(CAPTIONS[0], frames=frames, method=settings) as stream:
        video = np.concatenate(list(stream.clips()))
    assert video.shape == (frames, 64, 64, 3)
    with pytest.raises(ShapeError, match="expected no start frames"):
        engine.stream(CAPTIONS[0], start=video[:1])
    with engine.stream(CAPTIONS[0], frames=4 * FRAMES, method=settings) as stream:
        np.testing.assert_array_equal(np.concatenate(list(stream.clips())), video[: 4 * FRAMES])


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_conditioning_changes_nothing_before_it_is_trained(conditioning: str) -> None:
    model = Model(conditioning).requires_grad_(False)
    nn.init.normal_(model.base_model.conv_out.weight)
    x, t, context = normal(2, FRAMES, 8, 8, 8), torch.tensor([3, 200]), model.context(sample.encode(CAPTIONS))
    plain = model.predict(x, t, context)
    torch.testing.assert_close(model.predict(x, t, context, normal(2, CONDITION_FRAMES, 8, 8, 8)), plain)
    filled(model)
    one, other = (
        model.predict(x, t, context, scale * normal(2, CONDITION_FRAMES, 8, 8, 8)) for scale in (1, 2)
    )
    assert (one - other).abs().max() > 1e-4


def test_the_extractor_begins_as_the_encoder(model: Model) -> None:
    model.begin_extractor()
    own, base = model.unet.state_dict(), model.base_model.state_dict()
    copied = [name for name in own if name in base]
    assert len(copied) > 50
    assert all(torch.equal(own[name], base[name]) for name in copied)
    assert {name.split(".")[0] for name in set(own) - set(copied)} == {"controlnet_cond_embedding"}


def test_an_anchor_lies_before_its_window() -> None:
    torch.manual_seed(0)
    place = torch.arange(32).reshape(1, 32, 1, 1, 1).expand(3, 32, 8, 8, 8).half()
    tokens = torch.arange(3)[:, None].expand(3, 20)
    clean, anchor, captions = train.draw(place, tokens, 2000)
    window, before = clean[:, :, 0, 0, 0], anchor[:, 0, 0, 0]
    assert (window.diff(dim=1) == 1).all()
    assert (window.min(), window.max()) == (CONDITION_FRAMES, 31)
    distance = window[:, 0] - before
    assert (distance.min(), distance.max()) == (1, 16)
    assert captions.shape == (2000, 20)


@pytest.mark.slow
def test_it_learns_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "rate_at", lambda progress, step: 1.0)  # no warm-up
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    ramp = (torch.arange(4) / 2 - 1).reshape(4, 1, 1, 1, 1).expand(4, 32, 8, 8, 8)
    save_file(
        {"latents": ramp.half().contiguous(), "tokens": sample.encode(CAPTIONS * 2)},
        corpus / "0000.safetensors",
    )
    common = {
        "folder": tmp_path, "corpus": None, "conditioning": "cam", "minutes": None,
        "batch": 2, "rate": 2e-3, "ema": 0.9,
    }  # fmt: skip
    for stage, steps in (("base", 20), ("base", 40), ("stream", 20), ("stream", 40)):
        train.train(argparse.Namespace(stage=stage, steps=steps, **common))
    for stage in train.STAGES:
        rows = [row.split(",") for row in (tmp_path / stage / "loss.csv").read_text().splitlines()[1:]]
        assert [int(row[0]) for row in rows] == [20, 40]
        assert float(rows[1][1]) < float(rows[0][1]) < 1.5
    base, stream = (load_file(tmp_path / stage / "average.safetensors") for stage in train.STAGES)
    merger = "base_model.cross_attention_merger_mid_block.temporal_transformer.proj_out.weight"
    assert not base[merger].any()
    assert stream[merger].any()


def test_chunks_that_are_cut_are_the_video_again() -> None:
    video = normal(1, 32, 2, 2, 2)
    parts = sample.split(video)
    assert [part.shape[1] for part in parts] == [16, 16, 16]
    torch.testing.assert_close(sample.join(parts, [3, 7]), video)
    other = [part + index for index, part in enumerate(parts)]
    joined = sample.join(other, [3, 7]) - video
    assert joined[0, :, 0, 0, 0].round().tolist() == [0] * 11 + [1] * 12 + [2] * 9


def test_enhancing_shares_noise_where_it_should(model: Model) -> None:
    """With a network that says nothing but noise, overlapping chunks agree if and only if their noise is shared."""
    latents, tokens = normal(1, 24, 8, 8, 8), sample.encode(CAPTIONS[:1])
    quick = sample.Sampling(steps=2, eta=0.0, guidance=1.0)
    found = {}
    for blending in ("independent", "shared", "randomized"):
        torch.manual_seed(1)
        found[blending] = sample.enhance(model, latents, tokens, blending, sampling=quick, seed=2)
        assert found[blending].shape == latents.shape
    assert (found["independent"] - found["shared"]).abs().max() > 0.1
    assert (found["randomized"] - found["shared"]).abs().max() > 1e-4
    again = sample.enhance(model, latents, tokens, "randomized", sampling=quick, seed=2)
    torch.testing.assert_close(again, found["randomized"])
