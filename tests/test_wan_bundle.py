"""Causal Wan end to end at tiny sizes: downloaded files -> bundle -> plan -> stream, against the same loop in PyTorch."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import wan_family as family
from torch import Tensor

import pyengine
from pyengine.cli import main
from pyengine.commands import export_wan
from pyengine.errors import BundleError, ConfigError, InputError
from pyengine.export.families.wan import presets
from pyengine.export.families.wan.export import Options, export_bundle
from pyengine.export.parity import parity
from pyengine.schedule.samplers import frame_noise
from pyengine.streaming.snapshot import read_header
from pyengine.text.captions import clean_whitespace

transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]
PROMPT, OTHER, SEED = "a red fox runs over snow", "waves at night", 3
CHUNK = 3


@pytest.fixture(scope="module")
def wan(plan_cache: Path) -> Iterator[pyengine.Engine]:
    loaded = pyengine.load(family.bundle().folder, precision="fp32", choice="cut", cache_dir=plan_cache)
    yield loaded
    loaded.close()


def states(prompt: str) -> Tensor:
    """UMT5's states as the transformer is given them, padding zero. [1, text_len, channels]"""
    tokenizer = transformers.AutoTokenizer.from_pretrained(family.files() / "tokenizer")
    length = family.DIT["text_len"]
    found = tokenizer(prompt, max_length=length, padding="max_length", return_tensors="pt")
    model = transformers.UMT5EncoderModel.from_pretrained(family.files() / "text_encoder").eval()
    out = model(input_ids=found.input_ids, attention_mask=found.attention_mask).last_hidden_state
    return out * found.attention_mask[..., None]


@torch.inference_mode()
def torch_latents(prompt: str, chunks: int, given: Tensor | None = None) -> Tensor:
    """Self-Forcing's loop in plain PyTorch: no window, ring, plan or record of ours. [1, 16, frames, h, w]"""
    model, system = family.transformer(), presets.system("self-forcing")
    context, shape = states(prompt), (16, *family.LATENT)
    keys: list[list[Tensor]] = [[] for _ in range(model.config.num_layers)]
    values: list[list[Tensor]] = [[] for _ in range(model.config.num_layers)]
    tokens = family.LATENT[0] * family.LATENT[1] // 4
    nothing = torch.zeros(1, 0, tokens, model.config.num_heads, model.config.head_size)
    # A given picture is a chunk of its own.
    parts: list[Tensor] = [] if given is None else list(given.split(min(CHUNK, given.shape[2]), 2))

    def step(x: Tensor, level: float, start: int) -> Tensor:
        cached = [[torch.cat([nothing, *layer], 1) for layer in kept] for kept in (keys, values)]
        size = x.shape[2]
        index = torch.arange(start, start + size)
        flow, new_keys, new_values = model.step(
            x, torch.full((1, size), 1000 * level), context, index, torch.arange(start), *cached
        )
        if level == 0:
            for layer, (key, value) in enumerate(zip(new_keys, new_values, strict=True)):
                keys[layer].append(key)
                values[layer].append(value)
        return flow

    def noise(start: int, call: int | None) -> Tensor:
        frames = [frame_noise(SEED, start + place, shape, call) for place in range(CHUNK)]
        return torch.from_numpy(np.stack(frames, 1))[None]

    before = len(parts)
    for number in range(before + chunks):
        start = sum(part.shape[2] for part in parts[:number])
        if number >= before:
            x = noise(start, None)
            for place, level in enumerate(system.levels[:0:-1]):
                x = x - level * step(x, level, start)
                if place < system.steps - 1:
                    then, call = system.levels[-2 - place], system.steps * (number - before) + place
                    x = (1 - then) * x + then * noise(start, call)
            parts.append(x)
        step(parts[number], 0.0, start)
    return torch.cat(parts, 2)


def pixels(latents: Tensor) -> np.ndarray:
    """uint8 [frames, height, width, 3]"""
    with torch.inference_mode():
        made = family.autoencoder().decode(latents)[0].clamp(-1, 1)
    return ((made + 1) * 127.5 + 0.5).clamp(0, 255).permute(1, 2, 3, 0).to(torch.uint8).numpy()


def assert_same_video(got: np.ndarray, want: np.ndarray) -> None:
    """A value on the edge may round either way."""
    assert got.shape == want.shape
    assert np.abs(got.astype(int) - want).max() <= 1


def test_stream_is_the_loop_in_torch(wan: pyengine.Engine) -> None:
    with wan.stream(PROMPT, seed=SEED, frames=33) as stream:
        clips = list(stream.clips())
    assert [len(clip) for clip in clips] == [9, 12, 12]
    assert_same_video(np.concatenate(clips), pixels(torch_latents(PROMPT, 3)))


def test_length_and_the_head_of_a_longer_stream(wan: pyengine.Engine) -> None:
    """A length that is no whole number of chunks is cut; a stream without a length has the same first frames."""
    with wan.stream(PROMPT, seed=SEED, frames=10) as stream:
        short = np.stack(list(stream))
    with wan.stream(PROMPT, seed=SEED) as endless:
        longer = np.stack([next(endless) for _ in range(30)])
    assert len(short) == 10
    assert np.array_equal(short, longer[:10])


def test_continuation_of_a_given_video(wan: pyengine.Engine) -> None:
    """21 frames are two chunks of latents; frames before them are left out. The decoder goes on where they end."""
    rng = np.random.default_rng(1)
    start = rng.integers(0, 256, (23, *family.SIZE, 3), np.uint8)
    with wan.stream(PROMPT, seed=SEED, frames=12, start=start) as stream:
        got = np.stack(list(stream))
    frames = torch.from_numpy(start[2:]).permute(3, 0, 1, 2)[None] / 127.5 - 1
    with torch.inference_mode():
        given = family.autoencoder().encode(frames)
    assert_same_video(got, pixels(torch_latents(PROMPT, 1, given))[21:])


def test_snapshot_goes_on_to_the_bit(wan: pyengine.Engine) -> None:
    with wan.stream(PROMPT, seed=SEED, frames=45) as stream:
        before = [next(stream) for _ in range(14)]
        saved = stream.snapshot()
        rest = np.stack(list(stream))
    with wan.resume(saved) as resumed:
        assert np.array_equal(np.stack(list(resumed)), rest)
    assert len(before) + len(rest) == 45


def test_snapshot_of_a_continuation(wan: pyengine.Engine) -> None:
    """Its chunks are counted behind what was given: one of 12 frames, not two of 9 and 12."""
    start = np.zeros((9, *family.SIZE, 3), np.uint8)
    with wan.stream(PROMPT, seed=SEED, frames=12, start=start) as stream:
        first = next(stream)
        saved = stream.snapshot()
        rest = np.stack(list(stream))
    with wan.resume(saved) as resumed:
        assert np.array_equal(np.stack(list(resumed)), rest)
    assert first.shape == (*family.SIZE, 3)
    assert len(rest) == 11


def test_prompt_changes_on_the_way(wan: pyengine.Engine) -> None:
    def video(change: bool) -> np.ndarray:
        with wan.stream(PROMPT, seed=SEED, frames=33) as stream:
            first = [next(stream) for _ in range(9)]
            if change:
                stream.prompt = OTHER
            return np.stack([*first, *stream])

    same, changed = video(False), video(True)
    assert np.array_equal(same[:9], changed[:9])
    assert not np.array_equal(same[21:], changed[21:])


def test_a_prompt_that_replaces_the_sink_and_its_snapshot(wan: pyengine.Engine) -> None:
    """The ring's pinned frames are others from then on, which a resumed stream knows."""
    method = {"visible_frames": 9, "sink_frames": 3, "recache": "replaced"}
    with wan.stream(PROMPT, seed=SEED, frames=81, method=method) as stream:
        for _ in range(45):
            next(stream)
        stream.prompt = OTHER
        for _ in range(13):
            next(stream)
        saved = stream.snapshot()
        rest = np.stack(list(stream))
    with wan.resume(saved) as resumed:
        assert np.array_equal(np.stack(list(resumed)), rest)
    header = read_header(saved)
    assert 0 < header["switched"] < 5 * 7
    with np.load(io.BytesIO(saved)) as file:
        arrays = {name: file[name] for name in file.files}
    header["switched"] = 10**6
    arrays["header"] = np.frombuffer(json.dumps(header).encode(), np.uint8)
    changed = io.BytesIO()
    np.savez(changed, **arrays)
    with pytest.raises(InputError, match="'switched' of the snapshot's header as a call up to"):
        wan.resume(changed.getvalue())


def test_video_of_a_picture(wan: pyengine.Engine) -> None:
    """One given frame is a chunk of its own, of one latent."""
    rng = np.random.default_rng(2)
    start = rng.integers(0, 256, (1, *family.SIZE, 3), np.uint8)
    with wan.stream(PROMPT, seed=SEED, frames=24, start=start, method={"first_chunk": 1}) as stream:
        clips = list(stream.clips())
    frames = torch.from_numpy(start).permute(3, 0, 1, 2)[None] / 127.5 - 1
    with torch.inference_mode():
        given = family.autoencoder().encode(frames)
    assert [len(clip) for clip in clips] == [12, 12]
    assert_same_video(np.concatenate(clips), pixels(torch_latents(PROMPT, 2, given))[1:])


def test_streams_of_a_batch_are_what_they_are_alone(wan: pyengine.Engine) -> None:
    with wan.batch(max_streams=2) as batch:
        streams = [batch.stream(PROMPT, seed=SEED, frames=21), batch.stream(OTHER, seed=4, frames=21)]
        together = [np.stack(list(stream)) for stream in streams]
    for prompt, seed, got in zip((PROMPT, OTHER), (SEED, 4), together, strict=True):
        with wan.stream(prompt, seed=seed, frames=21) as stream:
            assert_same_video(got, np.stack(list(stream)))


def test_settings_of_a_caller(wan: pyengine.Engine) -> None:
    """Fewer steps on levels that the network knows; a first chunk of one frame; others are refused in one sentence."""
    two = {"steps": 2, "ladder": [0.0, 0.5, 1.0], "cadence": 2}
    with wan.stream(PROMPT, seed=SEED, frames=9, method=two) as stream:
        assert len(list(stream)) == 9
    with wan.stream(PROMPT, seed=SEED, frames=13, method={"first_chunk": 1}) as stream:
        assert [len(clip) for clip in stream.clips()] == [1, 12]
    with pytest.raises(ConfigError, match=r"levels that the network has tables for.*0\.625.*but got"):
        wan.stream(PROMPT, method={"steps": 3, "ladder": None, "cadence": 3})
    with pytest.raises(ConfigError, match="branch"):
        wan.stream(PROMPT, guidance=3.0)


@pytest.mark.parametrize("component", ["denoiser", "text_encoder", "decoder", "encoder"])
def test_parity(component: str) -> None:
    plan = family.plans()[component]
    parity(family.bundle(), {component: (plan.module, plan.inputs)}).check()


def test_the_command_offers_every_system() -> None:
    """Its list is its own, so that --help needs no PyTorch."""
    assert tuple(presets.SYSTEMS) == export_wan.SYSTEMS


@pytest.mark.parametrize("system", presets.SYSTEMS)
def test_manifest_of_every_system(system: str) -> None:
    options = Options(system=system, size=family.SIZE, bfloat16=True)
    bundle = family.bundle(options, ("text_encoder",))
    assert bundle.name == f"wan-{system}-32x48"
    assert bundle.video is not None
    assert bundle.video.frames(3) == 9
    pyengine.methods.method_settings(bundle.method)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = family.files()
    command = [
        "export",
        "wan",
        "--checkpoint",
        str(files / "dit" / "self_forcing_dmd.pt"),
        "--vae",
        str(files / "vae"),
    ]
    command += ["--text-encoder", str(files), "--output", str(tmp_path / "bundle")]
    assert main([*command, "--system", "self-forcing", "--size", "32x48"]) == 0
    assert "bundle: " in capsys.readouterr().out
    manifest = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    assert manifest["text"]["source"] == str(files)
    for options, message in {
        ("--system", "longlive", "--size", "32x48"): "expected --lora with --system longlive",
        ("--system", "self-forcing", "--size", "30x48"): "multiples of 16",
        ("--system", "self-forcing", "--size", "32 x 48"): "such as 480x832",
    }.items():
        assert main([*command, *options]) != 0
        assert message in capsys.readouterr().err


def test_files_of_two_releases_are_refused(tmp_path: Path) -> None:
    transformer = family.transformer_weights(family.files() / "dit" / "self_forcing_dmd.pt")
    vae = family.autoencoder_weights(family.files() / "vae")
    wrong = {**vae.config, "num_res_blocks": 2}
    with pytest.raises(InputError, match=r"lacks decoder\.upsamples"):
        export_bundle(transformer, type(vae)(vae.tensors, wrong), "umt5", tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
    with pytest.raises(BundleError):
        pyengine.load(tmp_path / "bundle")


def test_whitespace_cleaning_keeps_case_and_marks() -> None:
    assert clean_whitespace("  A  Fox,\n\trunning &amp;amp; Jumping!  ") == "A Fox, running & Jumping!"
