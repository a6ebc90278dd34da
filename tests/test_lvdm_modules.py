"""The LVDM modules against numbers of the original code, and their parameter names against the released configurations."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from lvdm_golden import CASES, FOLDER, cases, error, model, tensors

from pyengine.errors import ConfigError
from pyengine.export.families.lvdm import Autoencoder3D, AutoencoderKL, UNet
from pyengine.export.families.lvdm.autoencoder3d import sample_latent
from pyengine.export.families.lvdm.released import CONFIGURATIONS

KEYS = json.loads((FOLDER / "full_keys.json").read_text())


@pytest.mark.parametrize("name", cases("unet"))
@torch.no_grad()
def test_unet_predicts_what_the_original_predicts(name: str) -> None:
    case, given = CASES[name], tensors(name)
    x = given["in_x"].clone()
    if "in_cond" in given:
        x[:, :, case["spec"]["cond_frames"]] = given["in_cond"]
    if "in_mask" in given:
        x = torch.cat([x, given["in_mask"]], 1)
    unet = model(case["spec"]["model"])
    got = unet(x, given["in_t"], y=given.get("in_s"), context=given.get("in_context"))
    assert error(got, given["out_eps"]) < case["tolerance"]


@pytest.mark.parametrize("name", cases("block"))
@torch.no_grad()
def test_blocks_on_inputs_so_small_that_the_norms_epsilon_shows(name: str) -> None:
    case, given = CASES[name], tensors(name)
    residual, attention = model(case["spec"]["model"]).input_blocks[case["spec"]["block"]]
    assert error(residual(given["in_x_res"], given["in_emb"]), given["out_res"]) < case["tolerance"]
    context = [given["in_context"]] if "in_context" in given else []
    assert error(attention(given["in_x"], *context), given["out_attn"]) < case["tolerance"]


@pytest.mark.parametrize("name", cases("ae"))
@torch.no_grad()
def test_autoencoder_encodes_and_decodes_as_the_original(name: str) -> None:
    case, given = CASES[name], tensors(name)
    autoencoder = model(case["spec"]["model"])
    mean, logvar = autoencoder.encode(given["in_x"])
    for got, key in (
        (mean, "out_mean"),
        (logvar, "out_logvar"),
        (autoencoder.decode(given["in_z"]), "out_dec"),
    ):
        assert error(got, given[key]) < case["tolerance"]
    assert error(sample_latent(mean, logvar, given["in_noise"]), given["out_sample"]) < case["tolerance"]


def shapes(module: torch.nn.Module) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("name", ["sky", "sky_pred", "sky_interp", "text2video"])
def test_names_and_shapes_of_the_released_unets(name: str) -> None:
    with torch.device("meta"):
        assert shapes(UNet(**CONFIGURATIONS[name].unet)) == KEYS[name]


def test_names_and_shapes_of_the_released_autoencoders() -> None:
    with torch.device("meta"):
        assert shapes(Autoencoder3D(**CONFIGURATIONS["sky"].autoencoder)) == KEYS["ae3d"]
        assert shapes(AutoencoderKL(**CONFIGURATIONS["text2video"].autoencoder)) == KEYS["text2video_ae2d"]


def test_the_released_yaml_of_the_autoencoder_is_understood_as_it_stands() -> None:
    nested = {
        "monitor": "val/rec_loss",
        "embed_dim": 4,
        "lossconfig": "__is_first_stage__",
        "ddconfig": {
            "double_z": True,
            "z_channels": 4,
            "encoder": {
                "target": "lvdm.models.modules.aemodules3d.Encoder",
                "params": {"n_hiddens": 32, "downsample": [4, 8, 8], "image_channel": 3, "norm_type": "group",
                           "padding_type": "replicate", "double_z": True, "z_channels": 4},
            },
            "decoder": {
                "target": "lvdm.models.modules.aemodules3d.Decoder",
                "params": {"n_hiddens": 32, "upsample": [4, 8, 8], "z_channels": 4, "image_channel": 3,
                           "norm_type": "group"},
            },
        },
    }  # fmt: skip
    with torch.device("meta"):
        assert shapes(Autoencoder3D(**nested)) == KEYS["ae3d"]


@torch.no_grad()
def test_kl_f8_halves_three_times_and_comes_back() -> None:
    torch.manual_seed(0)
    autoencoder = AutoencoderKL(ch=32, ch_mult=[1, 2, 2, 2], num_res_blocks=1).eval()
    video = torch.randn(2, 3, 3, 16, 24)
    mean, logvar = autoencoder.encode(video)
    assert mean.shape == logvar.shape == (2, 4, 3, 2, 3)
    whole = autoencoder.decode(mean)
    assert whole.shape == video.shape
    torch.testing.assert_close(whole[:, :, 1], autoencoder.decode(mean[:, :, 1]), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_splitting_off_the_constants_changes_nothing() -> None:
    given = tensors("unet_t2v_base")
    unet = model("unet_t2v")
    projected, texts = unet.project(unet.embed(given["in_t"])), unet.text_keys(given["in_context"])
    assert error(unet.denoise(given["in_x"], projected, texts), given["out_eps"]) < 5e-5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resblock_updown": True}, "resblock_updown False but got True"),
        ({"colour": 3}, "keys of the released configurations but got colour"),
        ({"num_heads": -1}, "num_heads or num_head_channels but got neither"),
        ({"context_dim": 24}, "context_dim exactly when use_temporal_transformer"),
        ({"temporal_length": None}, "temporal_length with use_relative_position"),
    ],
)
def test_other_architectures_are_refused(changes: dict[str, Any], message: str) -> None:
    with torch.device("meta"), pytest.raises(ConfigError, match=message):
        UNet(**(CONFIGURATIONS["sky"].unet | changes))
