"""Schedules, DDIM, ancestral steps, guidance and both levels of the long loop, against numbers of the original code.

The driver runs the loops as in a stream; torch modules stand in for compiled ones, and the stored draws for the random ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from fake_network import FakeExecutor, FakeNetwork, fake_bundle, finish, open_stream, stream_settings
from lvdm_golden import CASES, MANIFEST, arrays, error, model

from pyengine.bundle.bundle import Latent
from pyengine.bundle.manifest import TensorSpec
from pyengine.errors import ConfigError
from pyengine.export.families.lvdm.components import Denoiser, Embedding
from pyengine.methods import method_settings
from pyengine.methods.hierarchical import CONDITION_DRAW
from pyengine.schedule.hierarchy import HierarchyConfig, ddim_timesteps
from pyengine.schedule.samplers import alphas_cumprod, cfg, ddim
from pyengine.streaming import driver as driver_module
from pyengine.streaming.driver import Driver
from pyengine.streaming.state import StreamState

TABLE = 1e-5  # of the schedule; the loops have 5e-5
STRIDE = 4  # latents from one key to the next
Draws = dict[tuple[int, int | None], np.ndarray]
Opened = tuple[Driver, StreamState]
A, B = ((MANIFEST["schedules"][k]["linear_start"], MANIFEST["schedules"][k]["linear_end"]) for k in "AB")


def networks(
    unets: dict[str, torch.nn.Module], frames: dict[str, int], scale: float = 1.0
) -> dict[str, FakeNetwork]:
    """Denoisers and embeddings on torch modules; predictions are multiplied by `scale`."""
    made = {}
    for name, unet in unets.items():
        made[name] = _denoiser(unet, frames[name], scale)
        made[f"{name}_embedding"] = _embedding(unet)
    return made


def _denoiser(unet: Any, frames: int, scale: float) -> FakeNetwork:
    network, rows = Denoiser(unet), ("streams", frames)
    width = sum(block.emb_layers[1].out_features for block in unet.residual_blocks())
    inputs = {
        "latents": TensorSpec((*rows, 4, 8, 8), "float32"),
        "embedding": TensorSpec(("branches", "streams", width), "float32"),
    }
    if unet.in_channels == 5:
        inputs["mask"] = TensorSpec(("branches", *rows), "float32")
    texts = unet.text_keys(torch.zeros(1, 7, 24)) if unet.context_dim else []
    for i, text in enumerate(texts):
        shape = ("branches", "streams", *text.shape[1:])
        inputs[f"text_{'value' if i % 2 else 'key'}.{i // 2}"] = TensorSpec(shape, "float32")

    @torch.no_grad()
    def run(arrays: dict[str, np.ndarray], rings: object) -> dict[str, np.ndarray]:
        given: dict[str, Any] = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
        for part in ("text_key", "text_value"):
            given[part] = [given.pop(f"{part}.{i}") for i in range(len(texts) // 2)]
        return {"prediction": scale * network(**given).numpy()}

    return FakeNetwork(inputs, {"prediction": TensorSpec(("branches", *rows, 4, 8, 8), "float32")}, run)


def _embedding(unet: Any) -> FakeNetwork:
    network, inputs = Embedding(unet), {"timesteps": TensorSpec(("steps",), "int64")}
    if unet.num_classes:
        inputs["level"] = inputs["timesteps"]
    width = sum(block.emb_layers[1].out_features for block in unet.residual_blocks())

    @torch.no_grad()
    def run(arrays: dict[str, np.ndarray], rings: object) -> dict[str, np.ndarray]:
        return {
            "projected": network(**{name: torch.from_numpy(array) for name, array in arrays.items()}).numpy()
        }

    return FakeNetwork(inputs, {"projected": TensorSpec((len(inputs), "steps", width), "float32")}, run)


def by_frame(draw: np.ndarray, frames: Iterable[int], number: int | None) -> Draws:
    """A stored draw of a clip [channels, frames, h, w] by latent frame."""
    return {(frame, number): draw[:, row] for row, frame in enumerate(frames)}


def use_draws(monkeypatch: pytest.MonkeyPatch, draws: Draws) -> None:
    """Let the driver take these draws by (latent frame, number of the draw); others are random but fixed."""

    def stored(seed: int, frame: int, shape: tuple[int, ...], draw: int | None, out: np.ndarray) -> None:
        assert out.shape == tuple(shape)
        if (frame, draw) in draws:
            assert draws[frame, draw].shape == out.shape
            out[...] = draws[frame, draw]
        else:
            out[...] = np.random.default_rng([frame, draw or 0]).standard_normal(shape)

    monkeypatch.setattr(driver_module, "frame_noise", stored)


def opened(made: dict[str, FakeNetwork], method: dict[str, Any], chunks: int, guidance: float) -> Opened:
    """A stream of these networks before its first call, whose decoder gives latents back."""
    latent = Latent(4, 8, 8)
    driver = Driver(FakeExecutor(made), fake_bundle(made, latent))  # type: ignore[arg-type]
    return driver, open_stream(driver, latent, stream_settings(method, chunks=chunks, guidance=guidance))


def clip(
    frames: int,
    eta: float,
    betas: tuple[float, float],
    guidance: float,
    unet: str,
    scale: float = 1.0,
    **changes: str,
) -> Opened:
    settings = {
        "name": "clip", "steps": 4, "timesteps": 1000, "clip_frames": frames, "chunk_frames": frames, "eta": eta, "betas": betas,
        "guidance": guidance, "guidance_form": "text",
    }  # fmt: skip
    made = networks({"prediction": model(unet)}, {"prediction": frames}, scale)
    return opened(made, settings | changes, 1, guidance)


def window(driver: Driver, state: StreamState) -> np.ndarray:
    """Run to the end; the one window of latents as [channels, frames, h, w]."""
    (latents,) = finish(driver, state)
    return latents.swapaxes(0, 1)


@pytest.mark.parametrize("schedule", ["A", "B"])
@pytest.mark.parametrize("steps", [4, 5, 6, 50, 200])
def test_ddim_visits_the_released_timesteps_with_the_released_coefficients(schedule: str, steps: int) -> None:
    stored = arrays("ddim_schedule")
    alpha_bar = alphas_cumprod(*(A if schedule == "A" else B))
    assert error(alpha_bar, stored[f"out_{schedule}_alphas_cumprod"]) < TABLE
    ladder = ddim_timesteps(steps)
    np.testing.assert_array_equal(ladder[::-1], stored[f"out_{schedule}_S{steps}_timesteps"])
    # The sampler's numbers give alpha, alpha_prev and sigma back.
    now, then = np.array(ladder), np.array([*ladder[1:], 0])
    for eta in (0.5, 1.0):
        sample, prediction, noise = ddim(alpha_bar, eta)((now + 1) / 1000, (then + 1) / 1000)
        a = stored[f"out_{schedule}_S{steps}_alphas"][::-1]
        a_prev = stored[f"out_{schedule}_S{steps}_alphas_prev"][::-1]
        sigma = stored[f"out_{schedule}_S{steps}_sigmas_eta{eta}"][::-1]
        assert error(noise, sigma) < TABLE
        assert error(sample, np.sqrt(a_prev / a)) < TABLE
        direction = np.sqrt(1 - a_prev - sigma**2) - np.sqrt(a_prev / a) * np.sqrt(1 - a)
        assert error(prediction, direction) < TABLE


def test_a_count_of_steps_that_the_released_code_cannot_run_is_refused() -> None:
    with pytest.raises(ConfigError, match="3 steps of 1000 would visit timestep 1000"):
        ddim_timesteps(3)
    with pytest.raises(ConfigError, match=r"steps must lie in 1\.\.1000 but is 0"):
        ddim_timesteps(0)


@torch.no_grad()
def test_ancestral_steps_are_ddim_with_eta_one_over_every_timestep() -> None:
    given = arrays("ddpm_steps")
    step = ddim(alphas_cumprod(*A), eta=1.0)
    assert ddim_timesteps(1000)[:2] == (999, 998)
    for t, expected in zip(given["in_t"], given["out_x_prev"], strict=True):
        x = torch.from_numpy(given["in_x"].copy())
        eps = model("unet_short")(x, torch.tensor([t])).numpy()
        sample, prediction, noise = (float(c[0]) for c in step([(t + 1) / 1000], [t / 1000]))
        got = sample * given["in_x"] + prediction * eps + noise * given["in_noise"]
        assert error(got, expected) < CASES["ddpm_steps"]["tolerance"]


@pytest.mark.parametrize("name", ["ddim_short_eta0", "ddim_short_eta1"])
def test_ddim_loop_of_a_short_clip(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given, spec = arrays(name), CASES[name]["spec"]
    for b in range(spec["B"]):
        draws = by_frame(given["in_x_T"][b], range(4), None)
        for i in range(4):
            draws |= by_frame(given["in_noise"][i, b], range(4), i)
        use_draws(monkeypatch, draws)
        made = window(*clip(4, spec["eta"], A, 1.0, "unet_short"))
        assert error(made, given["out_x0"][b]) < CASES[name]["tolerance"]


@pytest.mark.parametrize("predicts", ["epsilon", "velocity"])
def test_what_the_networks_predict_is_a_setting(predicts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    start = np.random.default_rng(0).standard_normal((4, 4, 8, 8)).astype(np.float32)
    use_draws(monkeypatch, by_frame(start, range(4), None))
    made = window(*clip(4, 0.0, A, 1.0, "unet_short", scale=0, predicts=predicts))
    # By hand, for a prediction of 0: no noise means x0 = x / a; velocity 0 means x0 = a x and eps = s x.
    scale, alpha_bar = 1.0, alphas_cumprod(*A)
    ladder = ddim_timesteps(4)
    for now, then in zip(alpha_bar[list(ladder)], alpha_bar[[*ladder[1:], 0]], strict=True):
        if predicts == "epsilon":
            scale *= (then / now) ** 0.5
        else:
            scale *= (then * now) ** 0.5 + ((1 - then) * (1 - now)) ** 0.5
    assert error(made, scale * start) < TABLE


def test_text_to_video_with_guidance(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "ddim_t2v_cfg"
    given, spec = arrays(name), CASES[name]["spec"]
    draws = by_frame(given["in_x_T"][0], range(4), None)
    for i in range(4):
        draws |= by_frame(given["in_noise"][i, 0], range(4), i)
    use_draws(monkeypatch, draws)
    driver, state = clip(4, 1.0, B, spec["guidance"], "unet_t2v")
    context = torch.from_numpy(np.concatenate([given["in_context"], given["in_context_uncond"]]))
    with torch.no_grad():
        texts = [text.numpy() for text in model("unet_t2v").text_keys(context)]
    state.text = {f"text_{'value' if i % 2 else 'key'}.{i // 2}": text for i, text in enumerate(texts)}
    assert error(window(driver, state), given["out_x0"][0]) < CASES[name]["tolerance"]


def long_stream(behaviour: str, clips_per_round: int = 1) -> Opened:
    settings = {
        "name": "hierarchical", "steps": 4, "timesteps": 1000, "clip_frames": 4, "chunk_frames": STRIDE, "eta": 1.0, "betas": A,
        "stride": STRIDE, "perturbation": 24, "behaviour": behaviour, "decode": "whole", "clips_per_round": clips_per_round,
        "guidance": 0.1,
    }  # fmt: skip
    unets = {"prediction": model("unet_pred"), "interpolation": model("unet_interp")}
    made = networks(unets, {"prediction": 4, "interpolation": STRIDE + 1})
    return opened(made, settings, 3 * clips_per_round, 0.1)


@pytest.mark.parametrize(
    ("name", "behaviour"), [("ddim_pred_step", "released"), ("ddim_pred_step_intended_mask", "intended")]
)
def test_prediction_continues_from_the_last_key(
    name: str, behaviour: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = arrays(name)
    # The last key of clip 0 is the condition of clip 1, whose own draws for it nobody reads: clip 0 comes last.
    draws: Draws = {}
    for number in (1, 0):
        keys = [key * STRIDE for key in range(3 * number, 3 * number + 4)]
        draws |= by_frame(given["in_x_T"][number, 0], keys, None)
        for i in range(4):
            draws |= by_frame(given["in_noise"][number, i, 0], keys, i)
    draws |= by_frame(given["in_cond_noise"][0, 0], [3 * STRIDE], CONDITION_DRAW)
    use_draws(monkeypatch, draws)
    driver, state = long_stream(behaviour, clips_per_round=2)
    executor: Any = driver.executor
    for call in range(8):
        driver.step([state])
        if call >= 4:
            # The original also updates its condition, and puts it back before the network sees it again.
            seen = executor.calls[-1][1]["latents"].swapaxes(1, 2)
            assert error(seen, given["out_x_seen_clip1"][call - 4]) < CASES[name]["tolerance"]
            sample = state.store.state()["latents"][1:4].swapaxes(0, 1)[None]
            expected = given["out_x_prev_clip1"][call - 4][:, :, 1:]
            assert error(sample, expected) < CASES[name]["tolerance"]
    keys = state.store.window([key * STRIDE for key in range(7)])
    assert error(keys.swapaxes(0, 1), given["out_latents"][0]) < CASES[name]["tolerance"]


def test_the_two_masks_give_different_videos() -> None:
    released, intended = (
        arrays(n)["out_latents"] for n in ("ddim_pred_step", "ddim_pred_step_intended_mask")
    )
    assert error(intended, released) > 0.01  # so the test above can tell them apart


@pytest.mark.slow
def test_interpolation_fills_the_first_interval_as_released(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "ddim_interp_step"
    given = arrays(name)
    frames = range(STRIDE + 1)
    draws = by_frame(given["in_x_T"][0, 0], frames, None)
    for i in range(4):
        draws |= by_frame(given["in_noise"][0, i, 0], frames, i)
    draws |= by_frame(given["in_cond_noise"][0, 0], [0, STRIDE], CONDITION_DRAW)
    use_draws(monkeypatch, draws)
    driver, state = long_stream("released")
    finish(driver, state, 4)
    for key in range(4):
        state.store.give(key * STRIDE, given["in_keys"][0][:, key])
    # 4 keys: the released loop fills one interval of three.
    latents = window(driver, state)[None]
    assert error(latents, given["out_latents"]) < CASES[name]["tolerance"]
    schedule = MANIFEST["schedules"]["A"]
    z = torch.from_numpy(latents.copy()) / schedule["scale_factor"] - schedule["shift_factor"]
    with torch.no_grad():
        assert error(model("ae_tiny").decode(z), given["out_video"]) < CASES[name]["tolerance"]


def test_guidance_conventions() -> None:
    conditional, null = 2.0, 1.0
    assert float(cfg(15.0) @ [conditional, null]) == pytest.approx(null + 15 * (conditional - null))
    _, state = long_stream("intended")
    assert state.weights @ np.array([conditional, null]) == pytest.approx(
        conditional + 0.1 * (conditional - null)
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"perturbation": 251, "levels": 251}, "expected a timestep from 0 to 250, or none, but got 251"),
        ({"perturbation": -1}, "expected a whole number from 0 .* or none but got -1"),
        ({"perturbation": 0.1}, r".* or none but got 0\.1"),
        ({"guidance_form": "cfg"}, "expected one of original, text but got 'cfg'"),
    ],
)
def test_settings_of_the_method_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    (name, *_) = changes
    settings = {
        "name": "hierarchical", "steps": 4, "timesteps": 1000, "clip_frames": 4, "chunk_frames": STRIDE, "eta": 1.0, "betas": A,
        "stride": STRIDE, "guidance": 0.1,
    }  # fmt: skip
    method_settings(settings)
    with pytest.raises(ConfigError, match=rf"\[method\.{name}\] {message}"):
        method_settings(settings | changes)


CONFIG = HierarchyConfig(steps=4, timesteps=1000, clip_frames=4, known=1, stride=4, intervals=None)


def test_every_interval_is_made_once_as_soon_as_both_ends_exist() -> None:
    for per_round in (1, 3):
        config = HierarchyConfig(**{**vars(CONFIG), "clips_per_round": per_round})
        made: list[int] = []
        keys = 0
        for call in range(5 * config.calls_per_round):
            step = config.step_at(call)
            if step.is_last and step.network == "prediction":
                keys += 4 if step.clip == 0 else 3
            elif step.is_last:
                assert step.intervals.stop == keys - 1  # all that can be made
                made += step.intervals
        assert made == list(range(len(made)))


def test_frame_arithmetic_of_the_released_script() -> None:
    """1,024 frames: 256 latents, 65 keys wanted, 21 prediction steps behind the first clip (specification, section 9)."""
    config = HierarchyConfig(**{**vars(CONFIG), "intervals": 64})
    assert config.clips == 22
    released = HierarchyConfig(**{**vars(CONFIG), "intervals": 64, "behaviour": "released"})
    assert released.made_intervals == 22  # n + 1 of 64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"behaviour": "wrong"}, "behaviour must be one of intended, released but is 'wrong'"),
        ({"decode": "half"}, "decode must be one of windowed, whole"),
        ({"known": 4}, r"known must lie in 1\.\.3"),
        ({"decode": "whole"}, "needs a length; give frames or seconds"),
        ({"stride": 1}, "this model makes one clip of 4 latents"),
        ({"stride": 1, "intervals": 1, "clips_per_round": 2}, "clips_per_round must be 1 but is 2"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        HierarchyConfig(**{**vars(CONFIG), **changes})
