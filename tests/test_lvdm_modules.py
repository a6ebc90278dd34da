"""The LVDM modules against numbers of the original code, and their parameter names against the released configurations."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from lvdm_golden import CASES, FOLDER, cases, error, model, rule_weight, tensors
from torch.nn import functional as F

from pyengine.errors import ConfigError, ShapeError
from pyengine.export.families.lvdm import Autoencoder3D, AutoencoderKL, UNet
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


def halves(encoder: dict[str, Any], decoder: dict[str, Any], **ddconfig: Any) -> dict[str, Any]:
    """A yaml of the autoencoder whose halves say different things."""
    both = {"n_hiddens": 16, "z_channels": 4}
    encoder = both | {"downsample": [2, 2, 2]} | encoder
    decoder = both | {"upsample": [2, 2, 2]} | decoder
    return {"ddconfig": {"encoder": {"params": encoder}, "decoder": {"params": decoder}, **ddconfig}}


@torch.no_grad()
def test_the_halves_of_the_autoencoder_have_their_own_sizes() -> None:
    autoencoder = Autoencoder3D(**halves({"n_hiddens": 32}, {"image_channel": 1}))
    mean, _ = autoencoder.encode(torch.zeros(1, 3, 2, 4, 4))
    assert mean.shape == (1, 4, 1, 2, 2)
    assert autoencoder.decode(mean).shape == (1, 1, 2, 4, 4)
    assert autoencoder.encoder.conv_first.conv.out_channels == 32
    with pytest.raises(ConfigError, match="z_channels of the decoder 4 but got 6"):
        Autoencoder3D(**halves({}, {"z_channels": 6}))
    with pytest.raises(ConfigError, match="keys of the released configurations but got attention"):
        Autoencoder3D(**halves({"attention": True}, {}))


def test_keys_that_the_release_does_not_read_are_ignored() -> None:
    with torch.device("meta"):
        plain = shapes(Autoencoder3D(**halves({}, {})))
        assert shapes(Autoencoder3D(**halves({}, {}, resolution=256, dropout=0.0))) == plain
        neutral = {
            "attn_type": "vanilla",
            "use_linear_attn": False,
            "resamp_with_conv": True,
            "tanh_out": False,
        }
        assert shapes(AutoencoderKL(ch=32, ddconfig=neutral, test=True)) == shapes(AutoencoderKL(ch=32))
        with pytest.raises(ConfigError, match="attn_type 'vanilla' but got 'linear'"):
            AutoencoderKL(ddconfig={"attn_type": "linear"})


@torch.no_grad()
def test_factors_that_are_no_power_of_two_halve_as_often_as_they_can() -> None:
    autoencoder = Autoencoder3D(n_hiddens=16, downsample=[3, 2, 2])
    assert autoencoder.factors == (2, 2, 2)
    assert autoencoder.encode(torch.zeros(1, 3, 2, 4, 4))[0].shape == (1, 4, 1, 2, 2)


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


TINY = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "channel_mult": [1, 2],
    "num_res_blocks": 1, "attention_resolutions": [2], "num_heads": 4, "kernel_size_t": 1, "padding_t": 0,
    "temporal_length": 3, "use_relative_position": True, "use_checkpoint": True, "legacy": False,
}  # fmt: skip


def filled(module: torch.nn.Module) -> torch.nn.Module:
    """With the weights of the golden files' rule, so that no layer is zero."""
    module.load_state_dict({k: rule_weight(k, tuple(v.shape)) for k, v in module.state_dict().items()})
    return module.eval()


@torch.no_grad()
def test_pooling_instead_of_strided_convolutions_has_no_weights() -> None:
    unet = filled(UNet(**TINY, conv_resample=False))
    assert not [name for name in unet.state_dict() if ".op." in name or name.endswith("1.2.conv.weight")]
    down, up = unet.input_blocks[2][0], unet.output_blocks[1][2]
    x = torch.randn(1, 3, 2, 4, 6)
    torch.testing.assert_close(down(x), F.avg_pool2d(x[0].transpose(0, 1), 2).transpose(0, 1)[None])
    assert torch.equal(up(x), x.repeat_interleave(2, 3).repeat_interleave(2, 4))
    assert unet(torch.randn(1, 4, 3, 4, 6), torch.tensor([5])).shape == (1, 4, 3, 4, 6)


@torch.no_grad()
def test_residual_blocks_that_resize_do_so_before_their_first_convolution() -> None:
    unet = filled(UNet(**TINY, resblock_updown=True))
    block = unet.input_blocks[2][0]
    x, emb = torch.randn(1, 32, 2, 4, 4), torch.randn(1, 128)

    def half(h: torch.Tensor) -> torch.Tensor:
        return F.avg_pool3d(h, (1, 2, 2))

    h = block.in_layers[2](half(block.in_layers[:2](x))) + block.emb_layers(emb)[:, :, None, None, None]
    torch.testing.assert_close(block(x, emb), half(x) + block.out_layers(h))
    assert unet(torch.randn(1, 4, 3, 4, 6), torch.tensor([5])).shape == (1, 4, 3, 4, 6)


def test_heads_that_do_not_divide_the_channels_follow_the_released_constructor() -> None:
    text = TINY | {"use_temporal_transformer": True, "context_dim": 8, "num_heads": 3}
    with torch.device("meta"):
        inner = {
            legacy: UNet(**(text | {"legacy": legacy, **given})).middle_block[1].proj_in.out_channels
            for legacy, given in ((True, {}), (False, {"num_head_channels": 24, "num_heads": -1}))
        }
    assert inner == {True: 63, False: 48}  # 3 heads of 64 // 3; 64 // 24 heads of 24
    plain = TINY | {"channel_mult": [1], "attention_resolutions": [1], "num_heads": 11}
    unet = filled(UNet(**plain, cond_aug_mode="learned_embed"))  # 32 // 11 = 2 channels in each of 16 heads
    assert unet(torch.randn(1, 4, 3, 4, 4), torch.tensor([5])).shape == (1, 4, 3, 4, 4)
    assert unet.middle_block[1].heads == 16


@torch.no_grad()
def test_padding_of_the_encoder_leaves_its_residual_blocks_and_the_decoder_alone() -> None:
    plain, reflected = (
        filled(Autoencoder3D(n_hiddens=16, downsample=[2, 2, 2], padding_type=kind))
        for kind in ("replicate", "reflect")
    )
    x, z = torch.randn(1, 3, 4, 8, 8), torch.randn(1, 4, 2, 3, 3)
    assert torch.equal(plain.decode(z), reflected.decode(z))
    h = torch.randn(1, 32, 2, 4, 4)
    assert torch.equal(*(module.encoder.conv_blocks[0]["res"](h) for module in (plain, reflected)))
    assert error(plain.encode(x)[0], reflected.encode(x)[0]) > 1e-2


@pytest.mark.parametrize(
    ("x", "given", "message"),
    [
        ([1, 4, 3, 4, 5], {}, r"multiples of 2 but got \[1, 4, 3, 4, 5\]"),
        ([1, 5, 3, 4, 4], {}, r"x \[batch, 4, frames"),
        ([1, 4, 3, 4, 4], {"y": torch.tensor([3])}, "expected no y but got one"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(x: list[int], given: dict[str, Any], message: str) -> None:
    with pytest.raises((ShapeError, ConfigError), match=message):
        UNet(**TINY)(torch.zeros(x), torch.tensor([5]), **given)


def test_a_text_unet_asks_for_its_text() -> None:
    unet = UNet(**TINY, use_temporal_transformer=True, context_dim=8)
    with pytest.raises(ShapeError, match=r"expected context \[batch, tokens, 8\] but got none"):
        unet(torch.zeros(1, 4, 3, 4, 4), torch.tensor([5]))


def test_videos_that_the_autoencoder_cannot_take_are_refused() -> None:
    autoencoder = Autoencoder3D(n_hiddens=16, downsample=[2, 4, 4])
    with pytest.raises(ShapeError, match=r"of \[3, 2, 4, 4\] or more but got \[1, 3, 1, 8, 8\]"):
        autoencoder.encode(torch.zeros(1, 3, 1, 8, 8))
    with pytest.raises(ShapeError, match=r"expected z \[batch, 4, frames"):
        autoencoder.decode(torch.zeros(1, 3, 1, 8, 8))
    with pytest.raises(ConfigError, match="padding_type out of replicate, reflect"):
        Autoencoder3D(n_hiddens=16, downsample=[2, 4, 4], padding_type="zeros")
    with pytest.raises(ConfigError, match="expected downsample but got none"):
        Autoencoder3D(n_hiddens=16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dims": 2}, "dims 3 but got 2"),
        ({"cond_aug_mode": "time_embed"}, "cond_aug_mode None but got 'time_embed'"),
        ({"nonlinearity_type": "relu"}, "nonlinearity_type out of silu, leaky_relu but got 'relu'"),
        ({"num_heads": 3}, "heads that divide 512 channels but got 3 of 170"),
        ({"colour": 3}, "keys of the released configurations but got colour"),
        ({"num_heads": -1}, "num_heads or num_head_channels but got neither"),
        ({"context_dim": 24}, "context_dim exactly when use_temporal_transformer"),
        ({"temporal_length": None}, "temporal_length with use_relative_position"),
    ],
)
def test_other_architectures_are_refused(changes: dict[str, Any], message: str) -> None:
    with torch.device("meta"), pytest.raises(ConfigError, match=message):
        UNet(**(CONFIGURATIONS["sky"].unet | changes))
