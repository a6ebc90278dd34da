"""The networks of StreamingT2V against numbers of the original code, and their parameter names against the released files."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
import torch
from streamingt2v_golden import CONFIG, FOLDER, difference, modules, own_error, tensor
from torch import Tensor, nn

from pyengine.errors import ConfigError
from pyengine.export.families.streamingt2v import build
from pyengine.export.families.streamingt2v.appearance import AppearanceAttention
from pyengine.export.families.streamingt2v.extractor import Extractor
from pyengine.export.families.streamingt2v.modelscope import ModelScopeUNet, Widths
from pyengine.export.families.streamingt2v.networks import SCALE
from pyengine.schedule.samplers import alphas_cumprod, ddim
from pyengine.schedule.timesteps import leading_timesteps, levels_of, with_first_alpha

KEYS = json.loads((FOLDER / "full_keys.json").read_text())
# The remains of OpenCLIP's text tower that the checkpoint carries and nothing uses.
LEFTOVERS = {
    f"image_encoder.model.{name}"
    for name in (
        "token_embedding.weight",
        "positional_embedding",
        "text_projection",
        "ln_final.weight",
        "ln_final.bias",
        "logit_scale",
    )
}
FEATURES = [*(f"cam_down_{index}" for index in range(12)), "cam_mid"]


def check(got: Any, name: str, own: str) -> None:
    """Within twice the error that the original makes in fp32: the largest difference and the root of the mean square."""
    largest, relative = difference(got, name)
    allowed = own_error(own)
    said = f"{name}: {largest:.2e} {relative:.2e}, own {allowed}"
    assert largest <= 2 * allowed[0], said
    assert relative <= 2 * allowed[1], said


@cache
@torch.no_grad()
def forward() -> dict[str, Tensor]:
    """One step of extractor and denoiser, with what is in between."""
    parts = modules()
    base, extractor = parts["base_model"], parts["unet"]
    assert isinstance(base, ModelScopeUNet)
    found: dict[str, Tensor] = {}

    def keep(name: str, place: nn.Module) -> Any:
        def hook(_: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
            found[f"{name}_in"], found[f"{name}_out"] = given[0], out

        return place.register_forward_hook(hook)

    mergers = base.mergers()
    places = {"merger_4": mergers[4], "merger_8": mergers[8], "merger_mid": mergers[12]}
    places |= {"base_stem": base.transformer_in, "cam_stem": extractor.get_submodule("transformer_in")}
    places["cond_embedding"] = extractor.get_submodule("controlnet_cond_embedding")
    hooks = [keep(name, place) for name, place in places.items()]
    x, t = tensor("denoiser_inputs/x_t").expand(2, -1, -1, -1, -1), tensor("denoiser_inputs/t").expand(2)
    context, condition = tensor("denoiser_inputs/context"), tensor("denoiser_inputs/cond_rgb")
    features = extractor(x[:, :, :8], t, context[:, :77], condition)
    found |= dict(zip(FEATURES, features, strict=True))
    found["eps"] = base(x, t, context, features)
    for hook in hooks:
        hook.remove()
    found["eps_no_cam"] = base(x, t, context)
    return found


@pytest.mark.parametrize("name", FEATURES)
def test_the_extractor_gives_the_features_of_the_original(name: str) -> None:
    part = "a" if name in FEATURES[:3] else "b"
    check(forward()[name], f"denoiser_cam_{part}/{name}", f"denoiser:{name}")


def test_the_condition_is_encoded_and_added_behind_the_stem_as_in_the_original() -> None:
    found = forward()
    check(found["cond_embedding_out"], "denoiser_cam_a/cond_embedding", "denoiser:cond_embedding")
    for half in found["cam_stem_out"].chunk(2):
        check(half, "denoiser_cam_a/cam_stem", "denoiser:cam_stem")


@pytest.mark.parametrize("name", ["merger_4", "merger_8", "merger_mid"])
def test_mergers_add_what_those_of_the_original_add(name: str) -> None:
    for end in ("in", "out"):
        got = forward()[f"{name}_{end}"].unflatten(0, (2, 16))
        check(got, f"denoiser_base/{name}_{end}", f"denoiser:{name}_{end}")


def test_the_denoiser_predicts_what_the_original_predicts() -> None:
    found = forward()
    for half in found["base_stem_out"].chunk(2):
        check(half, "denoiser_base/base_stem", "denoiser:base_stem")
    for name in ("eps", "eps_no_cam"):
        check(found[name], f"denoiser_base/{name}", f"denoiser:{name}")


@pytest.mark.parametrize(
    "place", ["down_blocks.2.attentions.1", "mid_block.attentions.0", "up_blocks.2.attentions.2"]
)
@torch.no_grad()
def test_appearance_is_mixed_into_the_text_as_in_the_original(place: str) -> None:
    attention = modules()["base_model"].get_submodule(f"{place}.transformer_blocks.0.attn2")
    assert isinstance(attention, AppearanceAttention)
    got = attention.mix(tensor("denoiser_inputs/context"))
    check(got, f"denoiser_apm/E.{place}", f"denoiser:apm.{place}")


@torch.no_grad()
def test_the_anchor_becomes_the_tokens_of_the_original() -> None:
    encoder, resampler = modules()["image_encoder"], modules()["resampler"]
    anchor = tensor("apm_image/anchor_rgb")
    check(encoder.prepare(anchor), "apm_image/anchor_preprocessed", "apm_image:anchor_preprocessed")  # type: ignore[operator]
    for name, rgb in {"anchor": anchor, "null": torch.zeros_like(anchor)}.items():
        embedding = encoder(rgb)
        check(embedding, f"apm_image/{name}_clip_embed", f"apm_image:{name}_clip_embed")
        check(resampler(embedding), f"apm_image/{name}_tokens", f"apm_image:{name}_tokens")


@pytest.mark.slow
@torch.no_grad()
def test_a_chunk_of_four_steps_is_that_of_the_original() -> None:
    parts, setting = modules(), CONFIG["ddim"]
    anchor = tensor("ddim_inputs/anchor_rgb")
    tokens = parts["resampler"](parts["image_encoder"](torch.cat([torch.zeros_like(anchor), anchor])))
    check(tokens, "ddim_outputs/img_tokens", "ddim:ddim_img_tokens")
    texts = torch.cat([tensor("ddim_inputs/negative_text"), tensor("ddim_inputs/text")])
    context, condition = torch.cat([texts, tokens], 1), tensor("ddim_inputs/cond_rgb")

    timesteps = leading_timesteps(setting["steps"])
    assert timesteps.tolist() == tensor("ddim_outputs/t").tolist()
    levels = levels_of(timesteps)
    betas = (setting["beta_start"], setting["beta_end"])
    sampler = ddim(with_first_alpha(alphas_cumprod(*betas)), setting["eta"])

    x, predictions, latents = tensor("ddim_inputs/x_T"), [], []
    for step, t in enumerate(timesteps):
        both, at = x.expand(2, -1, -1, -1, -1), torch.tensor([t, t])
        features = parts["unet"](both[:, :, :8], at, context[:, :77], condition)
        uncond, cond = parts["base_model"](both, at, context, features)
        eps = uncond + setting["guidance"] * (cond - uncond)
        now, then = levels[len(timesteps) - step], levels[len(timesteps) - step - 1]
        scale = [float(each[0]) for each in sampler([now], [then])]
        noise = tensor("ddim_inputs/noise")[step].transpose(0, 1)
        x = scale[0] * x + scale[1] * eps + scale[2] * noise
        predictions.append(eps)
        latents.append(x[0])
    check(torch.stack(predictions), "ddim_outputs/eps_cfg", "ddim:ddim_eps")
    check(torch.stack(latents), "ddim_outputs/latents", "ddim:ddim_latents")
    tail = parts["vae"].decode(x[0, :, 8:].transpose(0, 1) / SCALE)  # type: ignore[operator]
    check((tail * 0.5 + 0.5).clamp(0, 1), "ddim_outputs/video_tail", "ddim:ddim_video_tail")


@torch.no_grad()
def test_the_enhancer_predicts_what_the_original_predicts() -> None:
    enhancer, found = modules()["enhancer"], {}
    hooks = [
        enhancer.get_submodule(place).register_forward_hook(
            lambda _, given, out, name=name: found.__setitem__(name, out)
        )
        for name, place in {
            "after_input_block_3": "input_blocks.3",
            "after_middle": "middle_block.3.temopral_conv",
        }.items()
    ]
    t = tensor("enhancer_unet/t")
    found["v"] = enhancer(tensor("enhancer_unet/x"), t, tensor("enhancer_unet/y"))
    for hook in hooks:
        hook.remove()
    for name, got in found.items():
        check(got, f"enhancer_unet/{name}", f"enh:{name}")


def released(prefix: str, keys: dict[str, list[int]]) -> dict[str, list[int]]:
    return {name.removeprefix(prefix): shape for name, shape in keys.items() if name.startswith(prefix)}


def shapes(module: nn.Module) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in module.state_dict().items()}


@cache
def released_modules() -> dict[str, nn.Module]:
    with torch.device("meta"):
        return build()


@pytest.mark.parametrize("name", ["base_model", "unet", "resampler", "image_encoder", "vae"])
def test_names_and_shapes_are_those_of_the_released_checkpoint(name: str) -> None:
    wanted = {key: shape for key, shape in KEYS["stage2_checkpoint"].items() if key not in LEFTOVERS}
    assert shapes(released_modules()[name]) == released(f"{name}.", wanted)


def test_names_and_shapes_of_the_first_and_of_the_second_stage_are_those_of_the_release() -> None:
    assert shapes(released_modules()["enhancer"]) == KEYS["enhancer_unet"]
    with torch.device("meta"):
        assert shapes(ModelScopeUNet()) == KEYS["modelscope_unet"]


def test_parameter_counts_are_the_published_ones() -> None:
    parts = released_modules()
    counts = {name: sum(p.numel() for p in module.parameters()) for name, module in parts.items()}
    assert counts == {
        "base_model": 1_480_478_804,
        "unet": 621_981_664,
        "resampler": 22_299_904,
        "image_encoder": 632_076_800,
        "vae": 83_653_863,
        "enhancer": 1_411_233_860,
    }
    base = parts["base_model"]
    assert isinstance(base, ModelScopeUNet)
    assert sum(p.numel() for merger in base.mergers() for p in merger.parameters()) == 68_867_200
    mixing = [n for n, _ in base.named_parameters() if ".attn2.conv" in n or n.endswith(".alpha")]
    assert len(mixing) == 80
    assert sum(base.get_parameter(n).numel() for n in mixing) == 377_744
    assert base.skip_channels() == [*[320] * 4, *[640] * 3, *[1280] * 5, 1280]
    attentions = base.cross_attentions()
    assert len(attentions) == 16
    assert all(isinstance(each, AppearanceAttention) for each in attentions)
    assert sum(each.to_q.in_features for each in attentions) == 12_480
    extractor = parts["unet"]
    assert sum(each.to_q.in_features for each in extractor.cross_attentions()) == 5_760  # type: ignore[operator]
    widths = [[r.parts().embedding.out_features for r in u.residuals()] for u in (base, extractor)]  # type: ignore[operator]
    assert [sum(each) for each in widths] == [20_160, 9_600]


SMALL = Widths((64, 64, 64, 64), head_size=32)


@cache
def small() -> tuple[ModelScopeUNet, nn.Module]:
    """Denoiser and extractor with random weights, every path filled."""
    torch.manual_seed(4)
    base = ModelScopeUNet(SMALL, appearance=True, merges=True)
    for attention in base.cross_attentions():
        nn.init.constant_(attention.get_parameter("alpha"), 0.7)
    return base.eval(), Extractor(SMALL, (8, 8, 8, 8)).eval()


def given(rows: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    sizes = {"x": (1, 4, 4, 8, 8), "context": (rows, 93, 1024), "condition": (2, 3, 64, 64)}
    drawn = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
    return drawn | {"x": drawn["x"].expand(rows, -1, -1, -1, -1), "t": torch.full((rows,), 500)}


@pytest.mark.slow
@torch.no_grad()
def test_without_mergers_and_appearance_it_is_the_published_model() -> None:
    base, extractor = small()
    plain = ModelScopeUNet(base.widths).eval()
    plain.load_state_dict({name: v for name, v in base.state_dict().items() if name in plain.state_dict()})
    values = given()
    untrained = ModelScopeUNet(base.widths, appearance=True, merges=True).eval()
    untrained.load_state_dict(base.state_dict())
    for attention in untrained.cross_attentions():
        nn.init.zeros_(attention.get_parameter("alpha"))
    for merger in untrained.mergers():
        nn.init.zeros_(merger.temporal_transformer.proj_out.weight)
        nn.init.zeros_(merger.temporal_transformer.proj_out.bias)
    features = extractor(values["x"][:, :, :2], values["t"], values["context"], values["condition"])
    got = untrained(values["x"], values["t"], values["context"], features)
    want = plain(values["x"], values["t"], values["context"][:, :77])
    assert torch.equal(got, want)
    whole = base(values["x"], values["t"], values["context"], features)
    assert (whole - want).abs().max() > 0.01


@torch.no_grad()
def test_the_anchor_reaches_the_spatial_cross_attentions_of_the_denoiser_alone() -> None:
    base, extractor = small()
    values = given()
    other = values["context"].clone()
    other[:, 77:] += 1
    features, changed = (
        extractor(values["x"][:, :, :2], values["t"], context, values["condition"])
        for context in (values["context"], other)
    )
    assert all(torch.equal(a, b) for a, b in zip(features, changed, strict=True))
    seen: list[tuple[str, bool]] = []
    outputs: dict[str, Tensor] = {}
    for name, layer in base.named_modules():
        if name.endswith(("to_k", "to_v")):
            layer.register_forward_hook(lambda _, i, o, name=name: outputs.__setitem__(name, i[0]))
    with_one = _inputs(base, outputs, values, values["context"])
    with_other = _inputs(base, outputs, values, other)
    for layer in base.modules():
        layer._forward_hooks.clear()
    seen = [(name, torch.equal(with_one[name], with_other[name])) for name in with_one if ".attn2." in name]
    spatial = [name for name, _ in seen if ".attentions." in name]
    assert len(spatial) == 32  # 16 layers, keys and values
    assert all(not same for name, same in seen if name in spatial)


def _inputs(
    base: nn.Module, outputs: dict[str, Tensor], values: dict[str, Tensor], context: Tensor
) -> dict[str, Tensor]:
    outputs.clear()
    base(values["x"], values["t"], context)
    return dict(outputs)


@torch.no_grad()
def test_the_branches_of_guidance_part_at_the_first_cross_attention() -> None:
    """Both see the same latents, level and condition: up to there their tensors are the same, so they need computing once."""
    base, extractor = small()
    values = given()
    same: dict[str, bool] = {}
    hooks = []
    for top, network in {"base": base, "cam": extractor}.items():
        for name, layer in network.named_modules():

            def note(_: nn.Module, given: Any, out: Any, name: str = f"{top}.{name}") -> None:
                if isinstance(out, Tensor) and out.shape[0] % 2 == 0 and ".to_" not in name:
                    first, second = out.chunk(2)
                    same[name] = bool(torch.equal(first, second))

            hooks.append(layer.register_forward_hook(note))
    features = extractor(values["x"][:, :, :2], values["t"], values["context"], values["condition"])
    base(values["x"], values["t"], values["context"], features)
    for hook in hooks:
        hook.remove()
    for top in ("base", "cam"):
        before = ["transformer_in", "down_blocks.0.resnets.0", "down_blocks.0.temp_convs.0"]
        assert all(same[f"{top}.{name}"] for name in before)
        assert not same[f"{top}.down_blocks.0.temp_attentions.0"]
    first, second = features[0].chunk(2)
    assert torch.equal(first, second)
    first, second = features[1].chunk(2)
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [("base_unet", "norm_num_groups", 16), ("apm", "image_tokens", 4), ("cam", "merger_head_dim", 32)],
)
def test_a_network_that_is_not_built_is_refused(section: str, key: str, value: int) -> None:
    with pytest.raises(ConfigError, match=f"expected {key} .* in {section} but got {value}"):
        build({section: {key: value}})


def test_channels_that_no_group_divides_are_refused() -> None:
    with pytest.raises(ConfigError, match="but got 96"):
        build({"base_unet": {"block_out_channels": [96, 128, 192, 192], "attention_head_dim": 32}})
