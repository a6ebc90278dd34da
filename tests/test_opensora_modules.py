"""STDiT3 and the video autoencoder against numbers of the original code."""

from __future__ import annotations

import json

import numpy as np
import opensora_golden as golden
import pytest
import torch

from pyengine.errors import ConfigError, ShapeError
from pyengine.export.families.opensora import STDiT3, VideoAutoencoder
from pyengine.export.families.opensora.layers import place_embedding

STDIT3_CASES = ["stdit3_perframe_even", "stdit3_perframe_odd", "stdit3_scalar", "stdit3_xmask"]


def tensors(case: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name[3:]: torch.from_numpy(value) for name, value in case.items() if name.startswith("in_")}


@pytest.mark.parametrize("name", STDIT3_CASES)
def test_stdit3_equals_the_original(name: str) -> None:
    case = golden.case(name)
    inputs = tensors(case)
    out = golden.stdit3()(inputs.pop("x"), inputs.pop("timestep"), inputs.pop("y"), **inputs)
    assert out.dtype == torch.float32
    np.testing.assert_allclose(out.numpy(), case["out"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["stdit3", "vae"])
def test_parameter_names_and_shapes_are_the_checkpoints(kind: str) -> None:
    part = golden.manifest()[kind]
    module = golden.stdit3() if kind == "stdit3" else golden.autoencoder()
    assert {key: list(value.shape) for key, value in module.state_dict().items()} == part["keys"]
    for key, (first, last, total) in part["weight_probe"].items():
        values = module.state_dict()[key].double().flatten()
        np.testing.assert_allclose(
            [values[0], values[-1], values.sum()], [first, last, total], rtol=1e-5, atol=1e-4
        )


@pytest.mark.parametrize(("kind", "module"), [("stdit3", STDiT3), ("vae", VideoAutoencoder)])
def test_full_size_names_and_shapes(kind: str, module: type[torch.nn.Module]) -> None:
    with torch.device("meta"):
        full = module()
    expected = json.loads((golden.FOLDER / "full_keys.json").read_text())[kind]
    assert {key: list(value.shape) for key, value in full.state_dict().items()} == expected
    assert (
        sum(value.numel() for value in full.state_dict().values())
        == {"stdit3": 1208872772, "vae": 393341015}[kind]
    )


def test_equal_levels_give_the_scalar_result() -> None:
    inputs = tensors(golden.case("stdit3_scalar"))
    x, timestep, y = inputs.pop("x"), inputs.pop("timestep"), inputs.pop("y")
    one = golden.stdit3()(x, timestep, y, **inputs)
    each = golden.stdit3()(x, timestep[:, None].expand(-1, x.shape[2]), y, **inputs)
    assert (one - each).abs().max() < 1e-5


def test_other_configurations_run_and_change_the_result() -> None:
    base = golden.manifest()["stdit3"]["config"]
    x, y = torch.randn(1, 3, 5, 7, 6), torch.randn(1, 1, 12, 32)
    sizes = {"fps": [24.0], "height": [240.0], "width": [426.0]}
    config = base | {
        "in_channels": 3,
        "patch_size": [2, 3, 2],
        "qk_norm": False,
        "pred_sigma": False,
        "depth": 1,
    }
    module = golden.fill(STDiT3(**config))
    out = module(x, torch.tensor([500.0]), y, **sizes)
    assert out.shape == x.shape
    assert not any("q_norm" in key for key in module.state_dict())
    levels = torch.linspace(0, 1000, 3)[None]  # five frames in patches of two: three levels
    assert module(x, levels, y, **sizes).shape == x.shape
    with pytest.raises(ShapeError, match=r"expected timestep \[1\] or \[1, 3\] but got \[1, 5\]"):
        module(x, torch.zeros(1, 5), y, **sizes)
    with pytest.raises(ConfigError, match="fps, height and width"):
        module(x, torch.tensor([500.0]), y)
    with pytest.raises(ConfigError, match="model_type STDiT3 but got 'PixArt'"):
        STDiT3(model_type="PixArt")


def test_text_embedded_before_gives_the_same() -> None:
    inputs = tensors(golden.case("stdit3_perframe_even"))
    x, timestep, y, mask = (inputs.pop(name) for name in ("x", "timestep", "y", "mask"))
    expected = golden.stdit3()(x, timestep, y, mask=mask, **inputs)
    skipping = golden.fill(STDiT3(**golden.manifest()["stdit3"]["config"] | {"skip_y_embedder": True}))
    text = golden.stdit3().y_embedder(y).squeeze(1)
    packed = text[mask != 0][None]
    out = skipping(x, timestep, packed, mask=mask.sum(1), **inputs)
    assert (out - expected).abs().max() < 1e-5
    # Without lengths every sample reads the whole of it.
    shared = skipping(x, timestep, packed, **inputs)
    for row in range(len(x)):
        alone = {name: value[row : row + 1] for name, value in inputs.items()}
        one = skipping(x[row : row + 1], timestep[row : row + 1], packed, mask=[packed.shape[1]], **alone)
        assert (shared[row] - one[0]).abs().max() < 1e-5


def test_a_mask_of_frames_may_be_shared() -> None:
    inputs = tensors(golden.case("stdit3_xmask"))
    call = {name: value for name, value in inputs.items() if name != "x_mask"}
    for shared in (
        torch.tensor([[True, False] * 8])[:, : inputs["x_mask"].shape[1]],
        torch.tensor([[True], [False]]),
    ):
        whole = shared.expand(inputs["x_mask"].shape)
        assert torch.equal(golden.stdit3()(**call, x_mask=shared), golden.stdit3()(**call, x_mask=whole))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_table_of_places_rounds_where_the_original_does(dtype: torch.dtype) -> None:
    rows, columns, width = 3, 5, 16
    rate = (1.0 / 10000 ** (torch.arange(0, width // 2, 2).float() / (width // 2))).to(dtype)
    table = place_embedding(rows, columns, width, 0.75, dtype).reshape(rows, columns, 4, width // 4)
    for row in range(rows):
        for column in range(columns):
            across, down = (
                torch.outer(torch.tensor([index / 0.75]) * (4 / count), rate)[0]
                for index, count in ((column, columns), (row, rows))
            )
            expected = torch.stack([across.sin(), across.cos(), down.sin(), down.cos()]).to(dtype)
            torch.testing.assert_close(table[row, column], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["vae_decode_17f", "vae_decode_21f", "vae_decode_34f"])
def test_decoding_equals_the_original(name: str) -> None:
    case = golden.case(name)
    out = golden.autoencoder().decode(torch.from_numpy(case["in_z"]), int(case["in_num_frames"]))
    np.testing.assert_allclose(out.numpy(), case["out"], rtol=0, atol=5e-5)


@pytest.mark.parametrize("name", ["vae_encode_17f", "vae_encode_19f_odd", "vae_encode_34f"])
def test_encoding_equals_the_original(name: str) -> None:
    case = golden.case(name)
    out = golden.autoencoder().encode(torch.from_numpy(case["in_x"]))
    np.testing.assert_allclose(out.numpy(), case["out_mean"], rtol=0, atol=5e-5)


def test_other_autoencoders_have_the_shapes_of_their_config() -> None:
    spatial = {"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4, "act_fn": "silu"}
    spatial |= {"shift_factor": None, "force_upcast": True}  # keys that change nothing
    temporal = {"type": "VAE_Temporal", "filters": 8, "num_res_blocks": 1, "num_groups": 4}
    vae = VideoAutoencoder(
        spatial=spatial,
        temporal={**temporal, "channel_multipliers": [2, 2, 4], "temporal_downsample": [True, False]},
        micro_frame_size=None,
        shift=0.0,
        scale=1.0,
    )
    golden.fill(vae)
    assert vae.temporal_vae.decoder.conv_out.conv.weight.shape[:2] == (4, 16)
    z = vae.encode(torch.rand(1, 3, 7, 16, 12))
    assert z.shape == (1, 4, 4, 8, 6)
    assert vae.decode(z, 7).shape == (1, 3, 7, 16, 12)
    assert VideoAutoencoder(spatial=spatial, temporal=temporal).latents(17) == 5
    for stage, key, value in (
        ("spatial", "act_fn", "gelu"),
        ("temporal", "activation_fn", "relu"),
        ("spatial", "up_block_types", ["AttnUpDecoderBlock2D"]),
    ):
        with pytest.raises(ConfigError, match=f"autoencoder with {key} .* but got"):
            VideoAutoencoder(**{"spatial": spatial, "temporal": temporal, stage: {key: value}})


def test_latents_of_any_number_of_frames() -> None:
    vae = golden.autoencoder()
    assert [vae.latents(frames) for frames in (1, 4, 16, 17, 18, 34, 51, 119, 1445)] == [
        1,
        1,
        4,
        5,
        6,
        10,
        15,
        35,
        425,
    ]


def given(**changes: object) -> dict[str, object]:
    """Inputs of a batch of two, with some of them changed."""
    inputs = {
        "x": torch.zeros(2, 4, 3, 4, 6), "timestep": torch.zeros(2), "y": torch.zeros(2, 1, 12, 32),
        "fps": [24.0], "height": [240.0], "width": [426.0],
    }  # fmt: skip
    return inputs | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(2, 3, 3, 4, 6)}, r"x \[batch, 4, T, H, W\] but got \[2, 3, 3, 4, 6\]"),
        ({"timestep": torch.zeros(1)}, r"timestep \[2\] or \[2, 3\] but got \[1\]"),
        ({"y": torch.zeros(2, 1, 12, 31)}, r"y \[2, 1, words, 32\] but got \[2, 1, 12, 31\]"),
        ({"mask": torch.ones(3, 12)}, r"mask \[2 or 1, 12\] but got \[3, 12\]"),
        ({"mask": torch.ones(2, 11)}, r"mask \[2 or 1, 12\] but got \[2, 11\]"),
        ({"x_mask": torch.ones(2, 4).bool()}, r"x_mask \[2 or 1, 3 or 1\] but got \[2, 4\]"),
        ({"fps": [24.0, 24.0, 24.0]}, r"fps \[2\] or \[1\] but got \[3\]"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        golden.stdit3()(**given(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 0}, "hidden_size 64 with num_heads 0"),
        ({"hidden_size": 30}, "hidden_size 30 with num_heads 4"),
        ({"patch_size": 2}, r"patch_size of time, height and width, such as \[1, 2, 2\], but got 2"),
        ({"patch_size": [1, 0, 2]}, r"but got \[1, 0, 2\]"),
    ],
)
def test_configurations_that_cannot_be_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        STDiT3(**golden.manifest()["stdit3"]["config"] | changes)


def test_a_prompt_without_words_adds_nothing_but_the_bias() -> None:
    none = torch.zeros(2, 12, dtype=torch.long)
    out = [golden.stdit3()(**given(mask=none, y=torch.randn(2, 1, 12, 32))) for _ in range(2)]
    assert torch.equal(*out)
    assert out[0].isfinite().all()


def test_autoencoders_and_videos_that_do_not_fit_are_refused() -> None:
    sizes = golden.manifest()["vae"]["config"]
    for changes, message in (
        ({"temporal": sizes["temporal"] | {"temporal_downsample": [True]}}, "between 4 levels but got"),
        ({"spatial": sizes["spatial"] | {"colour": 1}}, r"sizes of an autoencoder .*'colour'"),
        ({"spatial": sizes["spatial"] | {"norm_num_groups": 5}}, r"sizes of an autoencoder .*divisible"),
        ({"micro_frame_size": 0}, "micro_frame_size of at least 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            VideoAutoencoder(**sizes | changes)
    with pytest.raises(ShapeError, match=r"frames \[batch, 3, T, H, W\] but got \[3, 2, 8, 8\]"):
        golden.autoencoder().encode(torch.zeros(3, 2, 8, 8))
    with pytest.raises(ShapeError, match=r"latents \[batch, 4, T, H, W\] but got \[1, 3, 5, 2, 2\]"):
        golden.autoencoder().decode(torch.zeros(1, 3, 5, 2, 2), 17)
