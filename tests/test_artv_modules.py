"""ART-V's networks: parity with diffusers on random weights under its names, and the identities of masked diffusion."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pyengine.export.families.artv.adapter import Adapter
from pyengine.export.families.artv.config import AdapterConfig, ArtvConfig, UNetConfig
from pyengine.export.families.artv.denoiser import Denoiser
from pyengine.export.families.artv.layers import Context
from pyengine.export.families.artv.masked import NoiseTable, mixed, static
from pyengine.export.families.artv.unet import UNet
from pyengine.export.layers.frame_autoencoder import FrameAutoencoder
from pyengine.schedule.samplers import alphas_cumprod, cfg, make_sampler

diffusers = pytest.importorskip("diffusers")
torch.set_num_threads(1)

TINY = UNetConfig(widths=(32, 64), layers=2, heads=(2, 4), text_width=24, anchor_width=16)
TINY_ADAPTER = AdapterConfig(widths=TINY.widths)
FULL, FULL_ADAPTER = UNetConfig(), AdapterConfig()
TOLERANCE = 2e-6  # of the largest value: both compute in float32, in another order


def peer_unet(config: UNetConfig, device: str = "cpu") -> Any:
    down = ["CrossAttnDownBlock2D"] * (len(config.widths) - 1) + ["DownBlock2D"]
    up = ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * (len(config.widths) - 1)
    with torch.device(device):
        return diffusers.UNet2DConditionModel(
            in_channels=config.channels,
            out_channels=config.channels,
            down_block_types=down,
            up_block_types=up,
            block_out_channels=config.widths,
            layers_per_block=config.layers,
            attention_head_dim=config.heads,
            cross_attention_dim=config.text_width,
            norm_num_groups=config.groups,
            use_linear_projection=True,
        ).eval()


def peer_adapter(config: AdapterConfig, device: str = "cpu") -> Any:
    with torch.device(device):
        return diffusers.T2IAdapter(
            in_channels=config.references * config.channels,
            channels=list(config.widths),
            num_res_blocks=config.blocks,
            downscale_factor=config.unshuffle,
            adapter_type="full_adapter",
        ).eval()


def ours_alone(unet: UNet) -> set[str]:
    """Names of what diffusers has not."""
    return {
        name for name in unet.state_dict() if "_anchor" in name or name.startswith("augmentation_embedding")
    }


def assert_close(got: Tensor, wanted: Tensor) -> None:
    assert got.shape == wanted.shape
    error = float((got - wanted).abs().max() / wanted.abs().max())
    assert error < TOLERANCE, error


def compare_unets(config: UNetConfig, adapter: AdapterConfig, side: int) -> None:
    torch.manual_seed(0)
    peer, peer_features = peer_unet(config), peer_adapter(adapter)
    unet, features = UNet(config), Adapter(adapter)
    missing, unexpected = unet.load_state_dict(peer.state_dict(), strict=False)
    assert set(missing) == ours_alone(unet)
    assert not unexpected
    peer_weights = {
        name.removeprefix("adapter."): value for name, value in peer_features.state_dict().items()
    }
    features.load_state_dict(peer_weights)
    unshuffle = adapter.unshuffle
    x = torch.randn(2, config.channels, side, side)
    pictures = torch.randn(2, adapter.references * adapter.channels, unshuffle * side, unshuffle * side)
    text, timesteps = torch.randn(2, 5, config.text_width), torch.tensor([981, 3])
    no_anchor = [torch.zeros(2, 2, *keys.shape[2:]) for keys in unet.of_text(text)]
    contexts = [Context(keys, none) for keys, none in zip(unet.of_text(text), no_anchor, strict=True)]
    with torch.no_grad():
        wanted_features = peer_features(pictures)
        got_features = features(pictures)
        for got, wanted in zip(got_features, wanted_features, strict=True):
            assert_close(got, wanted)
        for given in (wanted_features, [torch.zeros_like(each) for each in wanted_features]):
            wanted = peer(
                x, timesteps, text, down_intrablock_additional_residuals=[each.clone() for each in given]
            ).sample
            got, _ = unet(x, timesteps, torch.zeros(2), given, contexts)
            assert_close(got, wanted)


def test_unet_and_adapter_are_those_of_diffusers() -> None:
    compare_unets(TINY, TINY_ADAPTER, 8)


def test_sizes_that_do_not_halve_round_up_in_the_adapter() -> None:
    adapter = Adapter(TINY_ADAPTER)
    peer = peer_adapter(TINY_ADAPTER)
    adapter.load_state_dict({k.removeprefix("adapter."): v for k, v in peer.state_dict().items()})
    pictures = torch.randn(1, 6, 40, 56)
    with torch.no_grad():
        for got, wanted in zip(adapter(pictures), peer(pictures), strict=True):
            assert_close(got, wanted)


@pytest.mark.slow
def test_full_size_unet_and_adapter_are_those_of_diffusers() -> None:
    """866 M and 78 M parameters on an 8 x 8 latent; needs 8 GB."""
    compare_unets(FULL, FULL_ADAPTER, 8)


def test_full_size_has_the_names_and_shapes_of_diffusers() -> None:
    """Without memory for the weights."""
    with torch.device("meta"):
        unet, adapter = UNet(FULL), Adapter(FULL_ADAPTER)
    ours = {name: value.shape for name, value in unet.state_dict().items() if name not in ours_alone(unet)}
    peers = peer_unet(FULL, "meta").state_dict()
    assert ours == {name: value.shape for name, value in peers.items()}
    assert sum(shape.numel() for shape in ours.values()) == 865_910_724
    peers = peer_adapter(FULL_ADAPTER, "meta").state_dict()
    assert {f"adapter.{name}": value.shape for name, value in adapter.state_dict().items()} == {
        name: value.shape for name, value in peers.items()
    }


def test_the_autoencoder_is_that_of_diffusers() -> None:
    torch.manual_seed(0)
    widths = (32, 32, 64, 64)
    peer = diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=widths,
        layers_per_block=1,
        norm_num_groups=16,
    ).eval()
    ours = FrameAutoencoder(block_out_channels=widths, layers_per_block=1, norm_num_groups=16).eval()
    ours.load_state_dict(peer.state_dict())
    with torch.no_grad():
        pixels, latents = torch.randn(1, 3, 32, 32), torch.randn(1, 4, 4, 4)
        assert_close(ours.moments(pixels), peer.encode(pixels).latent_dist.parameters)
        assert_close(ours.decode(latents), peer.decode(latents).sample)


# ---- masked diffusion ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def latents() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    names = ("noisy", "reference", "one", "other")
    return {name: torch.randn(3, 4, 4, 4, generator=generator, dtype=torch.float64) for name in names} | {
        "mask": torch.rand(3, 1, 4, 4, generator=generator, dtype=torch.float64)
    }


def levels(predicts: Any) -> tuple[Tensor, Tensor, Tensor]:
    timesteps = torch.tensor([999, 500, 1])
    alpha_bar = torch.from_numpy(alphas_cumprod(0.00085, 0.012))[timesteps]
    return timesteps, *(part.sqrt().reshape(-1, 1, 1, 1) for part in (alpha_bar, 1 - alpha_bar))


def clean_of(x: Tensor, predicted: Tensor, signal: Tensor, noise: Tensor, predicts: str) -> Tensor:
    """x0 of a prediction."""
    if predicts == "epsilon":
        return (x - noise * predicted) / signal
    return signal * x - noise * predicted


@pytest.mark.parametrize("predicts", ["epsilon", "velocity"])
def test_mixing_predictions_is_mixing_clean_latents(latents: dict[str, Tensor], predicts: Any) -> None:
    """x0 = m * reference + (1 - m) * x0 of the network, whichever way it is named."""
    _, signal, noise = levels(predicts)
    still = static(latents["noisy"], latents["reference"], signal, noise, predicts)
    got = clean_of(latents["noisy"], mixed(latents["mask"], still, latents["one"]), signal, noise, predicts)
    own = clean_of(latents["noisy"], latents["one"], signal, noise, predicts)
    wanted = latents["mask"] * latents["reference"] + (1 - latents["mask"]) * own
    assert torch.allclose(got, wanted, rtol=0, atol=1e-10)


def test_noise_and_velocity_are_the_same_mix(latents: dict[str, Tensor]) -> None:
    """The velocity of the mixed noise is the mix of the velocities."""
    _, signal, noise = levels("epsilon")
    x, epsilon, mask = latents["noisy"], latents["one"], latents["mask"]
    velocity = signal * epsilon - noise * clean_of(x, epsilon, signal, noise, "epsilon")
    of_noise = mixed(mask, static(x, latents["reference"], signal, noise, "epsilon"), epsilon)
    of_velocity = mixed(mask, static(x, latents["reference"], signal, noise, "velocity"), velocity)
    clean = clean_of(x, of_noise, signal, noise, "epsilon")
    assert torch.allclose(of_velocity, signal * of_noise - noise * clean, rtol=0, atol=1e-9)


@pytest.mark.parametrize("predicts", ["epsilon", "velocity"])
def test_a_mask_of_one_copies_the_reference_and_of_zero_nothing(
    latents: dict[str, Tensor], predicts: Any
) -> None:
    """Through the sampler to the end: the frame is the reference, whatever noise it began with."""
    sampler = make_sampler("ddim", alpha_bar=alphas_cumprod(0.00085, 0.012), predicts=predicts)
    table = NoiseTable(ArtvConfig(predicts=predicts))
    x, reference, network = (latents[name][:1].float() for name in ("noisy", "reference", "one"))
    ladder = [999, 700, 400, 100, -1]
    plain = x
    copied, alone = x, x
    for timestep, then in pairwise(ladder):
        now, later = (np.array([(t + 1) / 1000], np.float32) for t in (timestep, then))
        scale = sampler(now, later)
        signal, noise = table.at(torch.tensor([timestep]))

        def step(x: Tensor, mask: float, scale: Any = scale, s: Tensor = signal, n: Tensor = noise) -> Tensor:
            still = static(x, reference, s, n, predicts)
            predicted = mixed(torch.full((1, 1, 1, 1), mask), still, network)
            return float(scale.sample[0]) * x + float(scale.prediction[0]) * predicted

        copied, alone = step(copied, 1.0), step(alone, 0.0)
        plain = float(scale.sample[0]) * plain + float(scale.prediction[0]) * network
    assert torch.allclose(copied, reference, rtol=0, atol=1e-5)
    assert torch.equal(alone, plain)


def test_guidance_commutes_when_branches_share_the_mask(latents: dict[str, Tensor]) -> None:
    _, signal, noise = levels("velocity")
    still = static(latents["noisy"], latents["reference"], signal, noise, "velocity")
    weights = torch.from_numpy(cfg(3.0)).double()
    both = torch.stack([latents["one"], latents["other"]])
    after = torch.tensordot(weights, mixed(latents["mask"], still, both), 1)
    before = mixed(latents["mask"], still, torch.tensordot(weights, both, 1))
    assert torch.allclose(after, before, rtol=0, atol=1e-10)


# ---- all together --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def denoiser() -> Denoiser:
    """A tiny one over latents, every path filled."""
    torch.manual_seed(0)
    adapter = AdapterConfig(channels=4, unshuffle=1, widths=TINY.widths, blocks=1)
    made = Denoiser(ArtvConfig(TINY, adapter), anchor_hidden=16, anchor_halvings=1).eval()
    for parameter in made.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    return made.requires_grad_(False)


def given(denoiser: Denoiser, present: float = 1.0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    here = torch.full((2,), present)
    texts = denoiser.unet.of_text(normal(4, 5, TINY.text_width))
    anchors = denoiser.anchors(normal(2, 4, 8, 8), here)
    references = normal(2, 2, 4, 8, 8)
    return {
        "latents": normal(2, 4, 8, 8),
        "timesteps": torch.tensor([900, 20]),
        "augmentation": torch.tensor([0, 100]),
        "reference": references[:, 0],
        "masked": here,
        "features": denoiser.references(references.flatten(1, 2), here),
        "contexts": [Context(*pair) for pair in zip(texts, anchors, strict=True)],
    }


def test_branches_are_computed_once_until_they_part(denoiser: Denoiser) -> None:
    """Two branches in one run are two runs, but for the mask, which is that of the first."""
    inputs = given(denoiser)
    both = denoiser.predict(**inputs, branches=2)
    for branch in range(2):
        rows = slice(2 * branch, 2 * branch + 2)
        contexts = [Context(each.text[rows], each.anchor) for each in inputs["contexts"]]
        alone = denoiser.predict(**{**inputs, "contexts": contexts})
        assert torch.allclose(both.alone[branch], alone.alone, rtol=0, atol=1e-5)
        if branch == 0:
            assert torch.allclose(both.mask, alone.mask, rtol=0, atol=1e-6)


def test_what_is_absent_adds_nothing(denoiser: Denoiser) -> None:
    """Without references and anchor the mask is 0, and the prediction is that of the UNet without either."""
    inputs = given(denoiser, present=0.0)
    got = denoiser.predict(**inputs, branches=2)
    assert not got.mask.any()
    assert torch.equal(got.mixed, got.alone)
    assert all(not each.any() for each in inputs["features"])
    assert all(not each.anchor.any() for each in inputs["contexts"])


@pytest.mark.parametrize("part", ["reference", "features", "contexts", "augmentation", "timesteps"])
def test_every_condition_counts(denoiser: Denoiser, part: str) -> None:
    inputs, changed = given(denoiser), given(denoiser)
    if part == "features":
        changed[part] = [2 * each for each in changed[part]]
    elif part == "contexts":
        changed[part] = [Context(each.text, 2 * each.anchor) for each in changed[part]]
    else:
        changed[part] = changed[part] + 3
    before, after = (denoiser.predict(**each, branches=2).mixed for each in (inputs, changed))
    assert float((before - after).abs().max()) > 1e-5
