"""Open-Sora end to end at tiny sizes: checkpoints -> bundle -> plan -> stream, against the same loop in PyTorch."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import numpy as np
import opensora_family as family
import pytest
import torch
from transformers import AutoTokenizer, T5EncoderModel

import pyengine
from pyengine.build.builder import build
from pyengine.bundle.variant import Variant
from pyengine.errors import BundleError, ConfigError, PromptError
from pyengine.export.families.opensora.export import components
from pyengine.export.families.opensora.presets import CLEANING
from pyengine.export.parity import parity
from pyengine.runtime.codec import decode_chunk, decoder_variants
from pyengine.runtime.open import load_program
from pyengine.schedule.progressive import noise_levels
from pyengine.schedule.samplers import frame_noise
from pyengine.schedule.warp import rflow_warp
from pyengine.text.captions import cleaned_prompt
from pyengine.text.t5 import T5Prompts

pytestmark = pytest.mark.slow

PROMPT, SEED = "A red fox runs over snow", 3
CHUNK, STEPS, CADENCE = 5, 6, 2


@pytest.fixture(scope="module")
def opensora(plan_cache: Path) -> pyengine.Engine:
    return pyengine.load(family.bundle().folder, precision="fp32", choice="cut", cache_dir=plan_cache)


@torch.inference_mode()
def torch_video(chunks: int, given: np.ndarray | None = None) -> np.ndarray:
    """The video by the formula, in plain PyTorch: no window, ring, plan or record of ours. uint8 [frames, height, width, 3]"""
    model, vae = family.denoiser(), family.autoencoder()
    states, words = t5(PROMPT)
    text = torch.stack((states, model.y_embedder.y_embedding))[:, None]
    height, width = family.SIZE
    shape = (4, height // 8, width // 8)
    sizes = {"fps": [24.0], "height": [float(height)], "width": [float(width)]}

    def noise(chunk: int) -> torch.Tensor:
        return torch.from_numpy(
            np.stack([frame_noise(SEED, chunk * CHUNK + place, shape) for place in range(CHUNK)])
        )

    def velocity(latents: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        x = latents.transpose(0, 1).expand(2, -1, -1, -1, -1)
        out = model(x, (level * 1000).expand(2, -1), text, mask=words[None], **sizes)[:, :4].transpose(1, 2)
        return out[1] + 7.0 * (out[0] - out[1])

    if given is None:  # the first chunk by the ordinary sampler, with the warp of a 17-frame clip
        tau = noise_levels(STEPS, rflow_warp(height, width, 17, "released"))
        first = noise(0)
        for step in range(STEPS, 0, -1):
            first = first + (tau[step] - tau[step - 1]) * velocity(first, torch.full((CHUNK,), tau[step]))
        done = [first]
    else:
        pixels = torch.from_numpy(given).permute(3, 0, 1, 2)[None] / 127.5 - 1
        done = [vae.encode(pixels)[0].transpose(0, 1)]
    tau = noise_levels(STEPS, rflow_warp(height, width, 68, "released"))
    ages: dict[int, int] = {}  # of the noisy chunks, oldest first
    held: dict[int, torch.Tensor] = {}
    for call in range(CADENCE * (chunks - 2) + STEPS):
        if call % CADENCE == 0 and call // CADENCE < chunks - 1:
            born = 1 + call // CADENCE
            ages[born], held[born] = 0, noise(born)
        level = torch.tensor(
            [0.0] * CHUNK + [tau[STEPS - age] for age in ages.values() for _ in range(CHUNK)]
        )
        moved = velocity(torch.cat([done[-1], *held.values()]), level)[CHUNK:].split(CHUNK)
        for part, chunk in zip(moved, list(ages), strict=True):
            age = ages[chunk]
            held[chunk] = held[chunk] + (tau[STEPS - age] - tau[STEPS - age - 1]) * part
            ages[chunk] += 1
            if ages[chunk] == STEPS:
                done.append(held.pop(chunk))
                del ages[chunk]
    if given is not None:
        done = done[1:]
    video = vae.decode(torch.cat(done).transpose(0, 1)[None], 17 * len(done))[0]
    return ((video.clamp(-1, 1) + 1) * 127.5 + 0.5).permute(1, 2, 3, 0).to(torch.uint8).numpy()


def t5(prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
    folder = family.checkpoints()["text_encoder"]
    tokens = AutoTokenizer.from_pretrained(folder)(
        cleaned_prompt(prompt, CLEANING), max_length=12, padding="max_length", return_tensors="pt"
    )
    out = T5EncoderModel.from_pretrained(folder)(
        input_ids=tokens.input_ids, attention_mask=tokens.attention_mask
    )
    return out.last_hidden_state[0], tokens.attention_mask[0]


def close(frames: np.ndarray, exact: np.ndarray) -> None:
    """uint8 videos that differ by rounding alone: a level here and there."""
    assert frames.shape == exact.shape
    apart = np.abs(frames.astype(int) - exact.astype(int))
    assert apart.max() <= 2
    assert (apart > 0).mean() < 0.02


def test_a_video_from_text_equals_the_torch_loop(opensora: pyengine.Engine) -> None:
    with opensora.stream(PROMPT, seed=SEED, frames=4 * 17) as stream:
        clips = list(stream.clips())
        calls = stream.calls_made
    assert [len(clip) for clip in clips] == [17] * 4
    assert calls == STEPS + CADENCE * 2 + STEPS
    frames = np.concatenate(clips)
    assert frames.std() > 5
    close(frames, torch_video(4))


def test_a_video_from_given_frames_equals_the_torch_loop(opensora: pyengine.Engine) -> None:
    height, width = family.SIZE
    given = np.random.default_rng(0).integers(0, 256, (17, height, width, 3), np.uint8)
    with opensora.stream(PROMPT, seed=SEED, frames=2 * 17, start=given) as stream:
        frames = np.stack(list(stream))
    close(frames, torch_video(3, given))


def test_the_published_method_is_the_preset() -> None:
    """445 calls, 425 latents, 1,445 frames of which 1,440 are 60 seconds; 17 of them given."""
    from pyengine.export.families.opensora import presets
    from pyengine.methods import make_method, method_settings

    settings = presets.method((240, 426))
    method = make_method(settings, 84, 1)
    assert (method.calls, method.first_call, method.row_counts) == (445, 0, (5, 35))
    assert settings["guidance"] == 7.0
    frames = [method.step_at(call) for call in range(445)]
    assert sum(len(step.emit) for step in frames) * 5 + 5 == 425
    assert sum(step.present for step in frames) == 14825
    from_text = make_method(settings, 85, 0)
    assert (from_text.calls, from_text.first_call) == (445, -30)
    for name, (steps, rows) in {
        "s50": (50, 55),
        "s100": (100, 55),
        "s150": (150, 55),
        "pa-o": (30, 35),
    }.items():
        preset = make_method(method_settings(settings, {"preset": name}), 20, 1)
        assert preset.config.steps == steps
        assert max(preset.row_counts) == rows
        assert len(set(preset.step_at(preset.calls // 2).chunk)) == rows // 5
    rn = make_method(method_settings(settings, {"preset": "rn"}), 84, 1)
    assert (rn.calls, rn.row_counts) == (42 * 30, (15,))
    rw = make_method(method_settings(settings, {"preset": "rw"}), 84, 1)
    assert rw.step_at(0).renoised == tuple(range(5))


@pytest.mark.parametrize("preset", ["rflow", "rn"])
def test_other_presets_stream(opensora: pyengine.Engine, preset: str) -> None:
    method = {"preset": preset, "steps": 2}
    if preset == "rn":
        method |= {"clip_frames": 10}
    with opensora.stream(PROMPT, seed=SEED, frames=34, method=method) as stream:
        frames = np.stack(list(stream))
    assert frames.shape == (34, *family.SIZE, 3)
    assert frames.std() > 5
    with pytest.raises(
        ConfigError, match="expected a preset out of pa-o, rflow, rn, rw, s100, s150, s50 but got 'rm'"
    ):
        opensora.stream(PROMPT, method={"preset": "rm"})


def test_prompts_are_read_by_t5(opensora: pyengine.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    states, words = t5(PROMPT)
    got = opensora.tokenizer.inputs(PROMPT)
    np.testing.assert_allclose(got["states"], states.detach().numpy(), rtol=0, atol=1e-5)
    assert np.array_equal(got["words"], words.numpy())
    with pytest.raises(PromptError, match="got an empty one"):
        opensora.stream("  ")
    monkeypatch.setenv("PYENGINE_TEXT_ENCODER", "/nowhere")
    lost = T5Prompts("also nowhere", 12)
    with pytest.raises(BundleError, match=r"at ./nowhere. but .*set PYENGINE_TEXT_ENCODER"):
        lost.encode(PROMPT)


def test_snapshot_goes_on_bit_identically(opensora: pyengine.Engine) -> None:
    """Also while the opening clip is being made."""
    for taken in (0, 17):
        with opensora.stream(PROMPT, seed=SEED, frames=51) as stream:
            for _ in range(taken):
                next(stream)
            state = stream.snapshot()
            rest = np.stack(list(stream))
        with opensora.resume(state) as resumed:
            assert np.array_equal(np.stack(list(resumed)), rest)


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_torch_portable_and_plans_agree(backend: str, plan_cache: Path) -> None:
    """The denoiser in both forms and every other network, to twice torch's own error."""
    networks = components(family.denoiser(), family.autoencoder(), family.OPTIONS)
    modules = {name: (network.module, network.inputs) for name, network in networks.items()}
    precisions = ["fp32", "bf16"] if backend == "openvino" else ["fp32"]
    report = parity(family.bundle(), modules, backend=backend, precisions=precisions, cache_dir=plan_cache)
    assert {row.component for row in report.rows} == set(family.bundle().components)
    report.check()


@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason="tensorrt_rtx is not installed: pip install 'pyengine-video[tensorrt]'",
)
def test_frames_can_be_decoded_on_a_gpu_that_is_not_here(plan_cache: Path) -> None:
    """Nearest-neighbour Resize wants float32 factors in a bf16 graph."""
    variant = Variant.of("frame_decoder")
    options = {"backend": "tensorrt", "target": "sm89", "precision": "bf16", "cache_dir": plan_cache}
    part = build(family.bundle(), variants=[variant], **options).part(variant)
    assert all((part.folder / file).stat().st_size for file in part.engines)


def test_a_ring_is_an_approximation_of_known_size(opensora: pyengine.Engine, plan_cache: Path) -> None:
    """The first clip is the same; later ones differ, because cached keys were made beside other frames."""
    options = dataclasses.replace(family.OPTIONS, context="ring")
    bundle = family.bundle(options, ("text_encoder", "denoiser", "decoder", "frame_decoder"))
    cached = pyengine.load(bundle.folder, precision="fp32", choice="cut", cache_dir=plan_cache)
    videos = []
    for engine in (opensora, cached):
        with engine.stream(PROMPT, seed=SEED, frames=51) as stream:
            videos.append(np.stack(list(stream)).astype(float))
    assert np.abs(videos[0][:17] - videos[1][:17]).max() <= 1
    apart = np.abs(videos[0][17:] - videos[1][17:]).mean()
    assert 0 < apart < 30  # levels of 255, on random weights


def test_tiles_blend_into_the_frame(plan_cache: Path) -> None:
    """Two tiles side by side; the difference is what a tile cannot see."""
    tiles = dataclasses.replace(family.OPTIONS, tile=(40, 40), decode_batch=4)
    latents = frame_noise(SEED, 0, (CHUNK, 4, 5, 7))
    videos = []
    for bundle in (family.bundle(), family.bundle(tiles, ("decoder", "frame_decoder"))):
        variants = decoder_variants(bundle, CHUNK)
        plan = build(bundle, variants=variants, precision="fp32", cache_dir=plan_cache)
        videos.append(decode_chunk(load_program(plan).executor(), bundle, latents).astype(float))
    assert videos[0].shape == (17, *family.SIZE, 3)
    apart = np.abs(videos[0] - videos[1])
    assert 0 < apart.mean() < 0.3 * videos[0].std()
