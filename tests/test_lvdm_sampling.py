"""Schedules, DDIM, ancestral steps, guidance and both levels of the long loop, against numbers of the original code.

The loops run in `Clips` as in a stream; torch modules stand in for compiled ones, and the stored draws for the random ones.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from lvdm_golden import CASES, MANIFEST, arrays, error, model

from pyengine.bundle.bundle import Latent
from pyengine.bundle.variant import Variant
from pyengine.errors import ConfigError
from pyengine.export.families.lvdm.components import Denoiser, Embedding
from pyengine.methods.hierarchical import Hierarchical
from pyengine.runtime.host.clip_latents import HostClipLatents
from pyengine.schedule.hierarchy import HierarchyConfig, ddim_timesteps
from pyengine.schedule.samplers import alphas_cumprod, cfg, cfg_original, ddim
from pyengine.streaming import clips as clips_module
from pyengine.streaming.clips import CONDITION_CALL, INTERPOLATION_STREAM, Clips

TABLE = 1e-5  # of the schedule; the loops have 5e-5
A, B = ((MANIFEST["schedules"][k]["linear_start"], MANIFEST["schedules"][k]["linear_end"]) for k in "AB")


class TorchExecutor:
    """The part of an Executor that Clips uses, on torch modules."""

    def __init__(self, unets: dict[str, torch.nn.Module], frames: dict[str, int]) -> None:
        self.unets, self.frames = unets, frames
        self._inputs: dict[Variant, dict[str, np.ndarray]] = {}
        self._outputs: dict[Variant, np.ndarray] = {}

    def inputs(self, variant: Variant) -> dict[str, np.ndarray]:
        if variant not in self._inputs:
            name = variant.component.removesuffix("_embedding")
            unet, sizes = self.unets[name], variant.symbols
            if "steps" in sizes:
                made = {"timesteps": np.zeros(sizes["steps"], np.int64)}
                made |= {"level": np.zeros(sizes["steps"], np.int64)} if unet.num_classes else {}
            else:
                width = sum(block.emb_layers[1].out_features for block in unet.residual_blocks())
                shape = (sizes["rows"], 4, self.frames[name], 8, 8)
                made = {
                    "latents": np.zeros(shape, np.float32),
                    "embedding": np.zeros((shape[0], width), np.float32),
                }
                made |= {"mask": np.zeros(shape[:3:2], np.float32)} if unet.in_channels == 5 else {}
                for i in range(len(unet.text_keys(torch.zeros(1, 7, 24))) // 2 if unet.context_dim else 0):
                    heads = unet.text_keys(torch.zeros(2, 7, 24))[2 * i].shape
                    made |= {f"text_{part}.{i}": np.zeros(heads, np.float32) for part in ("key", "value")}
            self._inputs[variant] = made
        return self._inputs[variant]

    def input(self, variant: Variant, name: str) -> np.ndarray:
        return self.inputs(variant)[name]

    @torch.no_grad()
    def run(self, variant: Variant) -> None:
        given = {name: torch.from_numpy(array.copy()) for name, array in self.inputs(variant).items()}
        unet = self.unets[variant.component.removesuffix("_embedding")]
        if "steps" in variant.symbols:
            self._outputs[variant] = Embedding(unet)(**given).numpy()
            return
        layers = sum(name.startswith("text_key") for name in given)
        texts = {
            part: [given.pop(f"{part}.{i}") for i in range(layers)] for part in ("text_key", "text_value")
        }
        self._outputs[variant] = Denoiser(unet)(**given, **texts).numpy()

    def output(self, variant: Variant, name: str) -> np.ndarray:
        return self._outputs[variant]

    def clip_latents(self, shape: Any, batches: Any, tables: Any, branches: int) -> HostClipLatents:
        return HostClipLatents(self, shape, tables)  # type: ignore[arg-type]


def use_draws(monkeypatch: pytest.MonkeyPatch, draws: dict[tuple[int, int | None], np.ndarray]) -> None:
    """Let Clips take these draws by (number of the clip, call); others are random but fixed."""

    def stored(seed: int, number: int, shape: tuple[int, ...], call: int | None, out: np.ndarray) -> None:
        assert out.shape == tuple(shape)
        if (number, call) in draws:
            assert draws[number, call].shape == out.shape
            out[...] = draws[number, call]
        else:
            out[...] = np.random.default_rng([number, call or 0]).standard_normal(shape)

    monkeypatch.setattr(clips_module, "frame_noise", stored)


class SilentExecutor(TorchExecutor):
    """Networks that predict 0."""

    def run(self, variant: Variant) -> None:
        super().run(variant)
        self._outputs[variant] = 0 * self._outputs[variant]


def clip(
    name: str,
    frames: int,
    eta: float,
    betas: tuple[float, float],
    guidance: float,
    unet: str,
    executor: type[TorchExecutor] = TorchExecutor,
    **changes: str,
) -> Clips:
    settings = {
        "name": "clip",
        "steps": 4,
        "timesteps": 1000,
        "clip_frames": frames,
        "eta": eta,
        "betas": betas,
    }
    method = Hierarchical.from_settings(settings | {"guidance_form": "text"} | changes, 1, 0)
    networks = executor({"prediction": model(unet)}, {"prediction": frames})
    return Clips(networks, Latent(4, 8, 8), method, guidance=guidance, seed=0)


def finish(made: Clips) -> np.ndarray:
    """Run to the end; the one window of latents as [channels, frames, h, w]."""
    windows: list[tuple[int, np.ndarray]] = []
    while not windows:
        windows = made.advance()
    return windows[0][1].swapaxes(0, 1)


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
        draws = {(0, None): given["in_x_T"][b]} | {(0, i): given["in_noise"][i, b] for i in range(4)}
        use_draws(monkeypatch, draws)
        made = finish(clip(name, 4, spec["eta"], A, 1.0, "unet_short"))
        assert error(made, given["out_x0"][b]) < CASES[name]["tolerance"]


@pytest.mark.parametrize("predicts", ["epsilon", "velocity"])
def test_what_the_networks_predict_is_a_setting(predicts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    start = np.random.default_rng(0).standard_normal((4, 4, 8, 8)).astype(np.float32)
    use_draws(monkeypatch, {(0, None): start})
    made = finish(clip("", 4, 0.0, A, 1.0, "unet_short", SilentExecutor, predicts=predicts))
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
    use_draws(
        monkeypatch, {(0, None): given["in_x_T"][0]} | {(0, i): given["in_noise"][i, 0] for i in range(4)}
    )
    made = clip(name, 4, 1.0, B, spec["guidance"], "unet_t2v")
    context = torch.from_numpy(np.concatenate([given["in_context"], given["in_context_uncond"]]))
    with torch.no_grad():
        texts = [text.numpy() for text in model("unet_t2v").text_keys(context)]
    made.set_text({f"text_{'value' if i % 2 else 'key'}.{i // 2}": text for i, text in enumerate(texts)})
    assert error(finish(made), given["out_x0"][0]) < CASES[name]["tolerance"]


def long_clips(behaviour: str, clips_per_round: int = 1) -> Clips:
    settings = {
        "name": "hierarchical", "steps": 4, "timesteps": 1000, "clip_frames": 4, "eta": 1.0, "betas": A, "stride": 4,
        "perturbation": 24, "behaviour": behaviour, "decode": "whole", "clips_per_round": clips_per_round,
    }  # fmt: skip
    method = Hierarchical.from_settings(settings, 3 * clips_per_round, 0)
    unets = {"prediction": model("unet_pred"), "interpolation": model("unet_interp")}
    executor = TorchExecutor(unets, {"prediction": 4, "interpolation": 5})
    return Clips(executor, Latent(4, 8, 8), method, guidance=0.1, seed=0)


@pytest.mark.parametrize(
    ("name", "behaviour"), [("ddim_pred_step", "released"), ("ddim_pred_step_intended_mask", "intended")]
)
def test_prediction_continues_from_the_last_key(
    name: str, behaviour: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = arrays(name)
    draws: dict[Any, np.ndarray] = {(c, None): given["in_x_T"][c, 0] for c in (0, 1)}
    draws |= {(c, i): given["in_noise"][c, i, 0] for c in (0, 1) for i in range(4)}
    draws[1, CONDITION_CALL] = given["in_cond_noise"][0, 0]
    use_draws(monkeypatch, draws)
    made = long_clips(behaviour, clips_per_round=2)
    for call in range(8):
        made.advance()
        if call >= 4:
            assert (
                error(made.state()["sample"], given["out_x_prev_clip1"][call - 4]) < CASES[name]["tolerance"]
            )
    assert error(made.state()["keys"].swapaxes(0, 1), given["out_latents"][0]) < CASES[name]["tolerance"]


def test_the_two_masks_give_different_videos() -> None:
    released, intended = (
        arrays(n)["out_latents"] for n in ("ddim_pred_step", "ddim_pred_step_intended_mask")
    )
    assert error(intended, released) > 0.01  # so the test above can tell them apart


def test_interpolation_fills_the_first_interval_as_released(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "ddim_interp_step"
    given = arrays(name)
    number = INTERPOLATION_STREAM
    draws: dict[Any, np.ndarray] = {(number, None): given["in_x_T"][0, 0]}
    draws |= {(number, i): given["in_noise"][0, i, 0] for i in range(4)}
    draws[number, CONDITION_CALL] = given["in_cond_noise"][0, 0]
    use_draws(monkeypatch, draws)
    made = long_clips("released")
    for _ in range(4):
        made.advance()
    state = made.state() | {"keys": given["in_keys"][0].swapaxes(0, 1)}
    made.load_state(state)
    windows: list[tuple[int, np.ndarray]] = []
    while not windows:
        windows = made.advance()
    latents = windows[0][1].swapaxes(0, 1)[None]  # 4 keys: the released loop fills one interval of three
    assert error(latents, given["out_latents"]) < CASES[name]["tolerance"]
    schedule = MANIFEST["schedules"]["A"]
    z = torch.from_numpy(latents.copy()) / schedule["scale_factor"] - schedule["shift_factor"]
    with torch.no_grad():
        assert error(model("ae_tiny").decode(z), given["out_video"]) < CASES[name]["tolerance"]


def test_guidance_conventions() -> None:
    conditional, null = 2.0, 1.0
    assert float(cfg(15.0) @ [conditional, null]) == pytest.approx(null + 15 * (conditional - null))
    assert float(cfg_original(0.1) @ [conditional, null]) == pytest.approx(
        conditional + 0.1 * (conditional - null)
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"perturbation": 251, "levels": 251},
            r"perturbation must be a timestep in 0\.\.250, or none, but is 251",
        ),
        ({"perturbation": -1}, r"in 0\.\.999, or none, but is -1"),
        ({"perturbation": 0.1}, r"or none, but is 0\.1"),
        ({"guidance_form": "cfg"}, "guidance_form must be one of original, text but is 'cfg'"),
    ],
)
def test_settings_of_the_method_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    settings = {
        "name": "hierarchical", "steps": 4, "timesteps": 1000, "clip_frames": 4, "eta": 1.0, "betas": A, "stride": 4,
    }  # fmt: skip
    with pytest.raises(ConfigError, match=message):
        Hierarchical.from_settings(settings | changes, None, 0)


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
        ({"stride": 1}, "this model makes one clip"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        HierarchyConfig(**{**vars(CONFIG), **changes})
