"""The components of a bundle, which compute once what is constant, against the plain networks."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from streamingt2v_family import SIZES, networks
from torch import Tensor, nn

from pyengine.errors import ConfigError
from pyengine.export.families.streamingt2v.assembly import Networks, Part, Sizes, assemble
from pyengine.export.families.streamingt2v.cached import derivations, fill
from pyengine.schedule.refinement import guided

BOUND = {torch.float64: 1e-11, torch.float32: 2e-5}
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
TIMESTEP, STREAMS = 741, 2


@cache
def assembled(dtype: torch.dtype) -> tuple[Networks, dict[str, Part]]:
    parts = copy.deepcopy(networks())
    root, components = assemble(parts, SIZES)
    root.to(dtype).requires_grad_(False)
    fill(root)
    return parts, components


def apart(got: Tensor, want: Tensor) -> float:
    """Largest difference over the largest value."""
    assert got.shape == want.shape
    return float((got - want).abs().max() / want.abs().max())


def normal(seed: int, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def by_streams(values: list[tuple[Tensor, ...]], first: int, count: int, kind: int) -> list[Tensor]:
    """Keys (kind 0) or values (1) of each prompt, put on an axis of streams behind the branches."""
    each = [prompt[first + 2 * index + kind] for prompt in values for index in range(count)]
    return [torch.stack(each[index::count], 1) for index in range(count)]


def texts(
    module: nn.Module, given: list[dict[str, Tensor]], counts: dict[str, int]
) -> dict[str, list[Tensor]]:
    found, first = {}, 0
    values = [module(**each) for each in given]
    for name, count in counts.items():
        for kind, what in enumerate(("key", "value")):
            found[f"{name}_{what}"] = by_streams(values, first, count, kind)
        first += 2 * count
    return found


@DTYPES
@torch.no_grad()
def test_the_cached_denoiser_is_the_plain_one(dtype: torch.dtype) -> None:
    """Two streams with their own text, anchor and condition, both branches of guidance of each."""
    parts, components = assembled(dtype)
    high, wide = SIZES.latent
    x = normal(1, dtype, STREAMS, SIZES.frames, 4, high, wide)
    context = normal(2, dtype, STREAMS, 2, 93, 32)
    pixels = normal(3, dtype, STREAMS, SIZES.condition_frames, 3, 8 * high, 8 * wide)
    given = [{"text": each[:, :77], "anchor": each[:, 77:]} for each in context]
    got = components["denoiser"].module(
        latents=x,
        level=torch.full((STREAMS, SIZES.frames), (TIMESTEP + 1) / 1000),
        condition=components["condition"].module(pixels),
        **texts(components["appearance"].module, given, {"text": 16, "cam_text": 7}),
    )
    t = torch.tensor([TIMESTEP, TIMESTEP])
    for stream in range(STREAMS):
        both = x[stream].transpose(0, 1).expand(2, -1, -1, -1, -1)
        features = parts.unet(
            both[:, :, : SIZES.condition_frames], t, context[stream, :, :77], pixels[stream]
        )
        want = parts.base_model(both, t, context[stream], features).transpose(1, 2)
        assert apart(got[:, stream], want) < BOUND[dtype]


@DTYPES
@pytest.mark.parametrize("name", ["first", "enhancer"])
@torch.no_grad()
def test_a_cached_network_of_text_alone_is_the_plain_one(name: str, dtype: torch.dtype) -> None:
    parts, components = assembled(dtype)
    plain, enhances = parts.parts()[name], name == "enhancer"
    high, wide = SIZES.enhancer_latent if enhances else SIZES.latent
    frames = SIZES.enhancer_frames if enhances else SIZES.frames
    x, text = normal(4, dtype, STREAMS, frames, 4, high, wide), normal(5, dtype, STREAMS, 2, 77, 32)
    module = components["enhancer" if enhances else "first_denoiser"].module
    keys = texts(components[f"{name}_text"].module, [{"text": each} for each in text], {"text": 16})
    scale, share = torch.tensor([7.5, 3.0], dtype=dtype), torch.tensor([0.2, 0.7], dtype=dtype)
    guides = {"guidance": torch.stack([scale, 1 - scale]), "rescale": share} if enhances else {}
    got = module(latents=x, level=torch.full((STREAMS, frames), (TIMESTEP + 1) / 1000), **guides, **keys)
    t = torch.tensor([TIMESTEP, TIMESTEP])
    for stream in range(STREAMS):
        want = plain(x[stream].transpose(0, 1).expand(2, -1, -1, -1, -1), t, text[stream]).transpose(1, 2)
        if enhances:
            cond, uncond = (each.numpy() for each in want)
            made = guided(cond, uncond, float(scale[stream]), float(share[stream]))
            want = torch.from_numpy(made)[None]
        assert apart(got[:, stream], want) < BOUND[dtype] * (10 if enhances else 1)


@torch.no_grad()
def test_every_level_reads_its_own_row_of_the_table() -> None:
    parts, components = assembled(torch.float64)
    module: Any = components["denoiser"].module
    timesteps = torch.tensor([0, 1, 500, 981, 999])
    rows = module.table((timesteps + 1) / 1000)
    for got, want in zip(rows, parts.base_model.embed(timesteps), strict=True):
        assert apart(got, want) < 1e-11
    assert sum(row.shape[1] for row in rows) == module.table.rows.shape[1]
    clean, lowest = (module.table(torch.tensor([level])) for level in (0.0, 0.001))
    assert all(torch.equal(a, b) for a, b in zip(clean, lowest, strict=True))


@torch.no_grad()
def test_frames_may_stand_at_levels_of_their_own() -> None:
    _, components = assembled(torch.float32)
    part = components["denoiser"]
    same: dict[str, Any] = dict(part.inputs)
    same["level"] = same["level"][:, :1].expand(-1, SIZES.frames).contiguous()
    mixed, equal = part.module(**part.inputs), part.module(**same)
    assert (mixed - equal).abs().max() > 1e-3


@torch.no_grad()
def test_one_branch_gives_what_it_gives_beside_another() -> None:
    _, components = assembled(torch.float32)
    part = components["denoiser"]
    both = part.module(**part.inputs)
    one: dict[str, Any] = dict(part.inputs)
    for name in ("text_key", "text_value", "cam_text_key", "cam_text_value"):
        one[name] = [each[:1] for each in one[name]]
    assert apart(part.module(**one), both[:1]) < 2e-5
    assert apart(both[1], both[0]) > 1e-3


@torch.no_grad()
def test_the_stem_and_the_condition_run_once_for_both_branches() -> None:
    parts, components = assembled(torch.float32)
    part = components["denoiser"]
    rows: dict[str, list[int]] = {}
    hooks = []
    for top, network in {"base": parts.base_model, "cam": parts.unet}.items():
        for name, layer in network.named_modules():

            def note(_: nn.Module, given: Any, out: Any, name: str = f"{top}.{name}") -> None:
                rows.setdefault(name, []).append(given[0].shape[0])

            hooks.append(layer.register_forward_hook(note))
    part.module(**part.inputs)
    for hook in hooks:
        hook.remove()
    streams = part.inputs["latents"].shape[0]  # type: ignore[union-attr]
    for top, frames in (("base", SIZES.frames), ("cam", SIZES.condition_frames)):
        shared, apart_ = [streams * frames], [2 * streams * frames]
        for name in ("conv_in", "transformer_in", "down_blocks.0.resnets.0", "down_blocks.0.temp_convs.0"):
            assert rows[f"{top}.{name}"] == shared
        assert rows[f"{top}.down_blocks.0.temp_attentions.0"] == apart_
        assert f"{top}.time_embedding.linear_1" not in rows
        assert not any(
            name.endswith(("time_emb_proj", "attn2.conv")) and name.startswith(top) for name in rows
        )
    assert not any("attentions.0.transformer_blocks.0.attn2.to_k" in n and "temp" not in n for n in rows)
    assert not any(name.startswith("cam.controlnet_cond_embedding") for name in rows)


@torch.no_grad()
def test_the_anchor_and_a_grey_picture_become_tokens() -> None:
    parts, components = assembled(torch.float64)
    pixels = normal(6, torch.float64, 3, 64, 64).clamp(-1, 1)
    got = components["image_encoder"].module(pixels)
    for row, rgb in zip(got, (pixels, torch.zeros_like(pixels)), strict=True):
        assert apart(row, parts.resampler(parts.image_encoder(rgb[None]))[0]) < 1e-11
    assert not torch.equal(got[0], got[1])


@torch.no_grad()
def test_decoded_pixels_are_what_the_frames_show_and_can_be_encoded_again() -> None:
    _, components = assembled(torch.float32)
    frames, pixels = components["decoder"].module(normal(7, torch.float32, 3, 4, 8, 8))
    assert frames.shape == (3, 1, 64, 64, 3)
    assert frames.dtype == torch.uint8
    assert pixels.abs().max() <= 1
    shown = frames[:, 0].permute(0, 3, 1, 2).float() / 127.5 - 1
    assert ((pixels - shown) * 127.5).min() >= 0
    assert ((pixels - shown) * 127.5).max() < 1.001
    latents, back = components["encoder"].module(frames)
    assert latents.shape == (3, 4, 8, 8)
    torch.testing.assert_close(back, shown)


def test_every_parameter_of_a_component_is_of_the_checkpoint_or_derived() -> None:
    root, _ = assemble(networks(), SIZES)
    own = {name for name, _ in root.named_parameters() if name.startswith("component_")}
    assert own == set(derivations(root))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"latent": (12, 8)}, "multiples of 8 but got 12 and 8"),
        ({"enhancer_latent": (16, 8)}, "2 more than a multiple of 8 .* but got 16 and 8"),
        ({"condition_frames": 16}, "condition frames from 1 to 15 but got 16"),
    ],
)
def test_sizes_that_the_networks_cannot_have_are_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Sizes(**change)
