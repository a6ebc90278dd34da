"""The sampler against numbers of the original code: per-call timesteps, window lengths, latents. A dummy network, or the tiny STDiT3."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import opensora_golden as golden
import pytest
import torch

from pyengine.bundle.bundle import Latent
from pyengine.bundle.variant import Variant
from pyengine.errors import ConfigError
from pyengine.methods import make_method
from pyengine.methods.progressive import Progressive
from pyengine.runtime.host.latents import HostLatents
from pyengine.schedule.samplers import euler
from pyengine.schedule.warp import WarpRule, resolve_warp, rflow_warp
from pyengine.streaming import window as window_module
from pyengine.streaming.window import Window

Network = Callable[[np.ndarray, np.ndarray], np.ndarray]


class TorchlessExecutor:
    """What a Window needs of an executor, around a function of the present frames: network(latents, levels) -> [2, frames, c, h, w]."""

    def __init__(self, network: Network, frame_shape: tuple[int, ...]) -> None:
        self.network, self.frame_shape = network, frame_shape
        self.buffers: dict[Variant, dict[str, np.ndarray]] = {}
        self.calls: list[dict[str, np.ndarray]] = []

    def inputs(self, variant: Variant) -> dict[str, np.ndarray]:
        rows = variant.symbols["frames"]
        if variant not in self.buffers:
            self.buffers[variant] = {
                "latents": np.zeros((rows, *self.frame_shape), np.float32),
                "level": np.zeros(rows, np.float32),
                "frame_index": np.zeros(rows, np.int64),
                "velocity": np.zeros((2, rows, *self.frame_shape), np.float32),
            }
        return {name: array for name, array in self.buffers[variant].items() if name != "velocity"}

    def input(self, variant: Variant, name: str) -> np.ndarray:
        return self.inputs(variant)[name]

    def latents(self, frame_shape: tuple[int, ...], rows: int) -> HostLatents:
        return HostLatents(self, frame_shape, rows)  # type: ignore[arg-type]

    def run(self, variant: Variant) -> None:
        arrays = self.buffers[variant]
        seen = arrays["frame_index"] >= 0
        # Positions are local to the window.
        assert list(arrays["frame_index"][seen]) == list(range(seen.sum()))
        self.calls.append({name: array[seen].copy() for name, array in arrays.items() if name != "velocity"})
        arrays["velocity"][:, seen] = self.network(arrays["latents"][seen], arrays["level"][seen])
        arrays["velocity"][:, ~seen] = np.nan  # nobody may read them

    def output(self, variant: Variant, name: str) -> np.ndarray:
        return self.buffers[variant][name]


def dummy(case: dict[str, np.ndarray], sample: int) -> Network:
    """The network of section 4 of the README, for one sample."""
    texts = [float(case[name][sample].mean()) for name in ("in_y", "in_y_null")]

    def network(latents: np.ndarray, level: np.ndarray) -> np.ndarray:
        mean, column = latents.mean(0), (-1, 1, 1, 1)
        order, now = np.arange(len(latents)).reshape(column), level.reshape(column)
        plain = 0.3 * latents + 0.1 * now + 0.01 * mean + 0.001 * order
        return np.stack([plain + 0.02 * text * latents for text in texts])

    return network


def run(
    case: dict[str, np.ndarray],
    method: Any,
    network: Network,
    given: np.ndarray | None,
    noise: np.ndarray,
    calls: int | None = None,
) -> tuple[np.ndarray, TorchlessExecutor]:
    """The latents of one sample [c, frames, h, w], given ones first, and what the network was asked."""
    channels, _, height, width = noise.shape
    executor = TorchlessExecutor(network, (channels, height, width))
    window = Window(
        executor,  # type: ignore[arg-type]
        Latent(channels, height, width),
        method,
        euler,
        guidance=float(case["cfg_scale"]),
        seed=0,
    )
    first = 0 if given is None else method.config.given_chunks * method.chunk_frames

    def frame_noise(
        seed: int, frame: int, shape: Any, call: int | None = None, out: np.ndarray | None = None
    ) -> np.ndarray:
        values = noise[:, frame - first]
        if out is None:
            return values.copy()
        out[...] = values
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(window_module, "frame_noise", frame_noise)
        done = [] if given is None else [np.moveaxis(given[:, :first], 1, 0)]
        if given is not None:
            window.give(np.moveaxis(given, 1, 0))
        total = method.calls - method.first_call if calls is None else calls
        for _ in range(total):
            done += [latents for _, latents in window.advance()]
    return np.moveaxis(np.concatenate(done), 0, 1), executor


def pa_method(case: dict[str, np.ndarray], warm: bool = False) -> Progressive:
    chunk, steps, frames = (int(case[name]) for name in ("C", "S", "F"))
    warp = float(case["warp_r"]) if bool(case["warp"]) else 1.0
    settings = {
        "name": "progressive",
        "steps": steps,
        "chunk_frames": chunk,
        "cadence": steps * chunk // frames,
        "warp": warp,
        "context": {"kind": "recompute", "sink_frames": 0, "recent_frames": chunk},
    }
    generated = None if warm else int(case["target_latents"]) // chunk - 1
    method = make_method(settings, generated, 1)
    assert isinstance(method, Progressive)
    return Progressive(method.config, warm=warm)


def check_calls(case: dict[str, np.ndarray], executor: TorchlessExecutor) -> None:
    assert [len(call["level"]) for call in executor.calls] == list(case["window_len"])
    for call, wanted in zip(executor.calls, case["frame_t"], strict=True):
        np.testing.assert_allclose(call["level"] * 1000, wanted[: len(call["level"])], rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", ["o12", "o12_nowarp_b2", "o12gen_bf16r", "o7_noregular", "o_fixedwindow"])
def test_progressive_sampling_equals_the_original(name: str) -> None:
    case = golden.case(f"pa_sampler_{name}")
    warm = not bool(case["variable_length"])
    method = pa_method(case, warm)
    for sample in range(len(case["in_z_given"])):
        out, executor = run(
            case,
            method,
            dummy(case, sample),
            case["in_z_given"][sample],
            case["in_noise"][sample],
            len(case["window_len"]) if warm else None,
        )
        check_calls(case, executor)
        np.testing.assert_allclose(out, case["out"][sample], rtol=0, atol=1e-5)


def test_progressive_sampling_of_the_real_network_equals_the_original() -> None:
    case = golden.case("pa_e2e")
    text = torch.from_numpy(np.concatenate([case["in_y"], case["in_y_null"]]))
    keep = torch.from_numpy(case["in_text_mask"])
    sizes = {name: torch.tensor([float(case[name])]) for name in ("fps", "height", "width")}

    def network(latents: np.ndarray, level: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(latents).transpose(0, 1).expand(2, -1, -1, -1, -1)
        out = golden.stdit3()(x, torch.from_numpy(level * 1000).expand(2, -1), text, mask=keep, **sizes)
        return out[:, : x.shape[1]].transpose(1, 2).numpy()

    out, executor = run(case, pa_method(case), network, case["in_z_given"][0], case["in_noise"][0])
    check_calls(case, executor)
    np.testing.assert_allclose(out, case["out"][0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["rflow_plain", "rflow_image", "rflow_nowarp", "rflow_mask"])
def test_ordinary_sampling_equals_the_original(name: str) -> None:
    case = golden.case(name)
    for sample, z in enumerate(case["in_z"]):
        frames = z.shape[1]
        given = int((case["in_mask"][sample] == 0).sum()) if "in_mask" in case else 0
        size = 5 if frames % 5 == 0 else 1
        height, width, raw = (float(case[key][sample]) for key in ("height", "width", "num_frames"))
        settings = {
            "name": "rflow",
            "steps": int(case["S"]),
            "chunk_frames": size,
            "frames_per_latent": 3.4,
            "warp": {"rule": "rflow", "height": height, "width": width, "frames": int(raw)}
            if case["warp"]
            else 1.0,
        }
        method = make_method(settings, (frames - given) // size, given // size)
        out, executor = run(case, method, dummy(case, sample), z[:, :given] if given else None, z[:, given:])
        assert len(executor.calls) == int(case["S"])
        for call, wanted in zip(executor.calls, case["timesteps"][:, sample], strict=True):
            np.testing.assert_allclose(call["level"][given:] * 1000, wanted, rtol=0, atol=1e-3)
            assert not call["level"][:given].any()
        np.testing.assert_allclose(out, case["out"][sample], rtol=0, atol=1e-5)


def test_warp_in_both_arithmetics() -> None:
    assert rflow_warp(240, 426, 119, "released") == 3.6875
    assert rflow_warp(240, 426, 119) == pytest.approx(3.69466, abs=1e-5)
    assert rflow_warp(512, 512, 1) == 1
    assert resolve_warp(WarpRule(rule="rflow", height=240, width=426), 51) == rflow_warp(240, 426, 51)
    assert resolve_warp(2.5, 0) == 2.5
    with pytest.raises(ConfigError, match="exact or released but is 'bf16'"):
        rflow_warp(240, 426, 119, "bf16")  # type: ignore[arg-type]


def test_an_opening_makes_the_first_chunk_with_the_ordinary_sampler() -> None:
    """30 calls at its own warp, then what a given chunk would have given."""
    case = golden.case("pa_sampler_o12")
    settings = {
        "name": "progressive",
        "steps": 30,
        "chunk_frames": 5,
        "cadence": 5,
        "warp": float(case["warp_r"]),
        "opening": "rflow",
        "opening_warp": 1.5,
        "context": {"kind": "recompute", "sink_frames": 0, "recent_frames": 5},
    }
    rng = np.random.default_rng(0)
    opening, noise = rng.standard_normal((4, 5, 3, 4)).astype(np.float32), case["in_noise"][0]
    network = dummy(case, 0)
    method = make_method(settings, 12, 0)
    assert (method.first_call, method.calls, method.row_counts) == (-30, 80, (5, 35))
    assert make_method(settings, 12, 1).row_counts == (5, 35)
    out, executor = run(case, method, network, None, np.concatenate([opening, noise], 1))
    first = executor.calls[:30]
    assert all(len(set(call["level"])) == 1 and len(call["level"]) == 5 for call in first)
    given, _ = run(case, make_method(settings, 11, 1), network, out[:, :5], noise)
    assert np.array_equal(out, given)
    alone, executor = run(case, make_method(settings, 1, 0), network, None, opening)
    assert len(executor.calls) == 30
    assert np.array_equal(alone, out[:, :5])
