"""Stable Diffusion 2.1 from a diffusers folder, tiny: read strictly, exported tensor by tensor, and run as diffusers runs it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import pyengine
from pyengine.cli import main
from pyengine.errors import ConfigError, InputError
from pyengine.export.families.artv.base import Base
from pyengine.export.families.artv.pretrained import UNTRAINED, is_own, pretrained
from pyengine.schedule.samplers import frame_noise

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)

WORDS = ["<|startoftext|>", "<|endoftext|>", "a", "boat", "sails"]
TOKENS, WIDTHS, SIDE = 6, (32, 64), 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny Stable Diffusion 2.1 with v-prediction, as diffusers saves it."""
    root = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=SIDE,
        down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
        up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"],
        block_out_channels=WIDTHS,
        layers_per_block=1,
        attention_head_dim=[2, 4],
        cross_attention_dim=24,
        use_linear_projection=True,
    )
    vae = diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[32, 32, 32, 32],
        latent_channels=4,
        norm_num_groups=32,
        layers_per_block=1,
    )
    for module in (unet, vae):
        for parameter in module.parameters():
            parameter.data = parameter.data.half().float()
    unet.save_pretrained(root / "unet")
    vae.save_pretrained(root / "vae")
    text = transformers.CLIPTextConfig(
        vocab_size=len(WORDS), hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=TOKENS, bos_token_id=0, eos_token_id=1, pad_token_id=1, hidden_act="gelu",
    )  # fmt: skip
    tower = transformers.CLIPTextModel(text)
    for parameter in tower.parameters():
        parameter.data = parameter.data.half().float()
    tower.save_pretrained(root / "text_encoder")
    diffusers.DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        clip_sample=False,
        steps_offset=1,
    ).save_pretrained(root / "scheduler")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token=WORDS[1]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single=f"{WORDS[0]} $A {WORDS[1]}", special_tokens=[(WORDS[0], 0), (WORDS[1], 1)]
    )
    names = dict(
        zip(("bos_token", "eos_token", "pad_token", "unk_token"), WORDS[:1] + WORDS[1:2] * 3, strict=True)
    )
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(
        root / "tokenizer"
    )
    return root


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "base"))


NULL = torch.tensor([0, 1, 1, 1, 1, 1])


def adapter_file(folder: Path, path: Path, **other: Any) -> Path:
    """Random weights of all that is ART-V's on that base."""
    made = pretrained(Base.open(folder), None, "", NULL, untrained=True, **other)
    torch.manual_seed(1)
    own = {
        name: (0.05 * torch.randn(value.shape)).half().float()
        for name, value in made.modules.denoiser.state_dict().items()
        if is_own(name)
    }
    save_file(own, path)
    return path


def test_a_folder_says_all_sizes(folder: Path) -> None:
    base = Base.open(folder)
    assert (base.unet.widths, base.unet.heads, base.unet.text_width) == (WIDTHS, (2, 4), 24)
    assert (base.predicts, base.betas, base.sample, base.scale) == (
        "velocity",
        (0.00085, 0.012),
        SIDE,
        0.18215,
    )
    made = pretrained(base, None, "", NULL, untrained=True)
    weights = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert torch.equal(made.read("denoiser.unet.conv_in.weight"), weights["conv_in.weight"])
    assert not made.read("denoiser.adapter.conv_in.weight").any()
    assert all(value.is_meta for value in made.root.parameters())


def test_the_early_names_of_the_autoencoder_are_known(copied: Path) -> None:
    """stable-diffusion-2-1 was uploaded before diffusers renamed the attention of its VAE."""
    path = copied / "vae" / "diffusion_pytorch_model.safetensors"
    early = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = load_file(path)
    for now, then in early.items():
        weights = {
            name.replace(f"attentions.0.{now}.", f"attentions.0.{then}."): each
            for name, each in weights.items()
        }
    save_file(weights, path)
    assert any("proj_attn" in name for name in weights)
    pretrained(Base.open(copied), None, "", NULL, untrained=True)


def test_an_adapter_over_pictures_and_one_over_latents_say_what_they_are(
    folder: Path, tmp_path: Path
) -> None:
    path = adapter_file(folder, tmp_path / "adapter.safetensors")
    made = pretrained(Base.open(folder), path, "", NULL)
    config = made.modules.denoiser.config
    assert (config.adapter.channels, config.adapter.unshuffle, config.adapter.references) == (3, 8, 2)
    weights = load_file(path)
    assert torch.equal(made.read("denoiser.mask.conv_in.weight"), weights["mask.conv_in.weight"])
    weights["adapter.conv_in.weight"] = torch.zeros(32, 3 * 4, 3, 3)
    save_file(weights, path)
    config = pretrained(Base.open(folder), path, "", NULL).modules.denoiser.config
    assert (config.adapter.channels, config.adapter.unshuffle, config.adapter.references) == (4, 1, 3)


def changed(path: Path, **values: Any) -> None:
    found = json.loads(path.read_text())
    path.write_text(json.dumps(found | values))


@pytest.mark.parametrize(
    ("part", "values", "said"),
    [
        ("unet/config.json", {"use_linear_projection": False}, "expected use_linear_projection True"),
        ("unet/config.json", {"in_channels": 9}, "as many channels out as in"),
        ("unet/config.json", {"_class_name": "UNet3D"}, "expected _class_name 'UNet2DConditionModel'"),
        ("unet/config.json", {"cross_attention_dim": 48}, "a text encoder of the UNet's width 48"),
        ("unet/config.json", {"block_out_channels": [33, 64]}, "groups 32 and the level's heads 2"),
        ("unet/config.json", {"layers_per_block": 2}, "the UNet, the VAE and the text encoder but .* lacks"),
        ("vae/config.json", {"block_out_channels": [32, 32, 32, 64]}, "has another shape for vae"),
        ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, "epsilon or v_prediction"),
        (
            "scheduler/scheduler_config.json",
            {"beta_schedule": "linear"},
            "expected beta_schedule 'scaled_linear'",
        ),
    ],
)
def test_another_model_is_refused_in_a_sentence(
    copied: Path, part: str, values: dict[str, Any], said: str
) -> None:
    changed(copied / part, **values)
    with pytest.raises((InputError, ConfigError), match=said):
        pretrained(Base.open(copied), None, "", NULL, untrained=True)


@pytest.mark.parametrize(
    "gone", ["unet/config.json", "vae/diffusion_pytorch_model.safetensors", "text_encoder", "scheduler"]
)
def test_what_a_folder_lacks_is_named(copied: Path, gone: str) -> None:
    shutil.rmtree(copied / gone) if (copied / gone).is_dir() else (copied / gone).unlink()
    with pytest.raises(InputError, match=gone.split("/")[0]):
        Base.open(copied)


def test_a_file_that_is_no_adapter_of_art_v_is_refused(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "t2i.safetensors"
    save_file({"adapter.conv_in.weight": torch.zeros(32, 64, 3, 3)}, path)
    with pytest.raises(InputError, match="a T2I-Adapter alone does not do"):
        pretrained(Base.open(folder), path, "", NULL)


def test_an_adapter_that_lacks_weights_is_refused(folder: Path, tmp_path: Path) -> None:
    path = adapter_file(folder, tmp_path / "adapter.safetensors")
    weights = load_file(path)
    weights.pop("mask.conv_out.bias")
    save_file(weights, path)
    with pytest.raises(InputError, match=r"lacks artv\.mask\.conv_out\.bias"):
        pretrained(Base.open(folder), path, "", NULL)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], UNTRAINED),
        (["--untrained", "--adapter", "x"], "--adapter or --untrained but got both"),
        (["--untrained", "--size", "100x64"], "a size in multiples of 64"),
    ],
)
def test_the_command_refuses(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    command = ["export", "artv", "--base", str(folder), "--output", str(tmp_path / "made"), *options]
    assert main(command) != 0
    assert said in capsys.readouterr().err
    assert not (tmp_path / "made").exists()


# ---- a video, against diffusers ------------------------------------------------------------------


@pytest.mark.slow
@torch.no_grad()
def test_the_first_frame_is_that_of_stable_diffusion(
    folder: Path, tmp_path: Path, plan_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without references there is nothing of ART-V in it: guidance, DDIM and decoding as diffusers does them. The second frame has some."""
    adapter = adapter_file(folder, tmp_path / "adapter.safetensors")
    weights = load_file(adapter)
    for name in ("weight", "bias"):  # what training begins with: the noise level of no references is none
        weights[f"unet.augmentation_embedding.linear_2.{name}"].zero_()
    save_file(weights, adapter)
    made = tmp_path / "made"
    command = ["export", "artv", "--base", str(folder), "--adapter", str(adapter), "--output", str(made)]
    assert main(command) == 0
    assert "MB" in capsys.readouterr().out
    engine = pyengine.load(made, precision="fp32", threads=1)
    options = {"seed": 3, "frames": 3, "guidance": 3.0, "method": {"steps": 4}}
    with engine.stream("a boat sails", **options) as stream:
        frames = np.concatenate(list(stream.clips()))
        latents = stream._state.store.window([0, 1, 2])
    assert frames.shape == (3, 64, 64, 3)

    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet").eval()
    vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae").eval()
    tower = transformers.CLIPTextModel.from_pretrained(folder / "text_encoder").eval()
    scheduler = diffusers.DDIMScheduler.from_pretrained(folder / "scheduler", set_alpha_to_one=True)
    scheduler.set_timesteps(4)
    ids = torch.tensor([[0, 2, 3, 4, 1, 1], NULL.tolist()])
    text = tower(input_ids=ids).last_hidden_state
    x = torch.from_numpy(frame_noise(3, 0, (4, SIDE, SIDE)))[None]
    for timestep in scheduler.timesteps:
        own, null = unet(torch.cat([x, x]), timestep, text).sample
        guided = (null + 3.0 * (own - null))[None]
        at = scheduler.alphas_cumprod[timestep]
        later = timestep - 1000 // 4
        then = scheduler.alphas_cumprod[later] if later >= 0 else torch.tensor(1.0)
        clean, noise = at.sqrt() * x - (1 - at).sqrt() * guided, (1 - at).sqrt() * x + at.sqrt() * guided
        x = then.sqrt() * clean + (1 - then).sqrt() * noise
    assert np.abs(latents[0] - x[0].numpy()).max() < 1e-3 * float(x.abs().max())
    pixels = vae.decode(x / 0.18215).sample.clamp(-1, 1)[0].permute(1, 2, 0)
    assert np.abs(frames[0].astype(float) - ((pixels + 1) * 127.5).numpy()).max() < 1.5
    with engine.stream("a boat sails", **options) as other:  # the same start gives the same second frame
        assert np.array_equal(np.concatenate(list(other.clips())), frames)
    assert np.abs(latents[1] - latents[0]).max() > 0.1
