"""Long video by the original pipelines of Rolling Forcing and LongLive 1.0, through the real driver.

`*_trace_*` say of every call which keys at which positions it sees; `*_tiny*` are whole generations. LongLive's streams change their
prompt at the first block that starts at frame 7, 16 and 27 or later.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from wan_golden import FOLDER, case, draw, fill
from wan_streams import Streams, draw_as

from pyengine.errors import ConfigError
from pyengine.export.families.wan import CausalWan, presets
from pyengine.methods import make_method, method_settings
from pyengine.methods.causal import Causal
from pyengine.schedule.call import Call
from pyengine.schedule.positions import positions
from pyengine.schedule.samplers import Multistep
from pyengine.schedule.unipc import unipc

pytestmark = pytest.mark.usefixtures("one_thread")

LONG, SEED = FOLDER.parent / "wan_long", 6
TOLERANCE = 1e-4
CONFIG: dict[str, Any] = {
    "patch_size": [1, 2, 2], "text_len": 8, "in_dim": 4, "out_dim": 4, "dim": 64, "ffn_dim": 96, "freq_dim": 32, "text_dim": 24,
    "num_heads": 4, "num_layers": 2,
}  # fmt: skip
SWITCHES = (7, 16, 27)
LONGLIVE = [
    f"{positions}{switch}"
    for positions in ("absolute", "relative")
    for switch in ("", "_switch_keepsink", "_switch_newsink")
]


def long_case(name: str) -> dict[str, np.ndarray]:
    return case(name, LONG, SEED)


@functools.cache
def model() -> CausalWan:
    return fill(CausalWan(**CONFIG), SEED)


def longlive(name: str) -> dict[str, Any]:
    """The manifest's method, with positions and sink policy of a file."""
    method = presets.system("longlive").method()
    if name.startswith("relative"):
        method["positions"] = "slot"
    return method | ({"recache": "replaced"} if name.endswith("newsink") else {})


def switch_frames(name: str) -> list[int]:
    """First frames of the blocks before which the prompt changes."""
    return [-(-frame // 3) * 3 for frame in SWITCHES] if "switch" in name else []


def made(method: dict[str, Any], chunks: int) -> Causal:
    schedule = make_method(method_settings(method), chunks, 0)
    assert isinstance(schedule, Causal)
    return schedule


def seen_of(
    call: Call, schedule: Causal, method: dict[str, Any]
) -> tuple[dict[int, int], dict[int, int], float]:
    """Position of every row, and of every key, by frame; and the first row's level."""
    (lane,) = call.lanes
    policy, pinned = method_settings(method).numbering
    rows, ring = positions(policy, [row.frame for row in lane.rows], lane.ring, pinned)
    own = {row.frame: int(place) for row, place in zip(lane.rows, rows, strict=True) if row.frame >= 0}
    kept = {frame: int(place) for frame, place in zip(lane.ring, ring, strict=True) if frame >= 0}
    assert not own.keys() & kept.keys()
    return own, own | kept, next(row.level for row in lane.rows if row.frame >= 0)


def assert_sees(
    call: Call, schedule: Causal, method: dict[str, Any], arrays: dict[str, np.ndarray], number: int
) -> None:
    """A call against one of a trace: rows, keys, and all distances of their positions."""
    rows, keys, level = seen_of(call, schedule, method)
    want = {
        kind: dict(
            zip(arrays[f"{kind}_frame"][number].tolist(), arrays[f"{kind}_pos"][number].tolist(), strict=True)
        )
        for kind in ("query", "key")
    }
    for frames in want.values():
        frames.pop(-1, None)
    assert keys.keys() == want["key"].keys()
    base = min(want["key"].values()) - min(keys.values())
    assert {frame: place + base for frame, place in keys.items()} == want["key"]
    assert {frame: place + base for frame, place in rows.items()} == want["query"]
    assert abs(1000 * level - arrays["call_timestep"][number][0]) < 1e-3


@pytest.mark.parametrize("name", LONGLIVE)
def test_what_longlive_sees(name: str) -> None:
    arrays, method = long_case(f"ll_trace_{name}"), longlive(name)
    blocks = int(arrays["call_start"].max()) // 3 + 1
    schedule, switches, index = made(method, blocks), switch_frames(name), 0
    for number, kind in enumerate(arrays["call_kind"]):
        if kind == 2:
            assert schedule.config.written(index) == switches.pop(0)
            (call,) = schedule.recache(index)
            assert_recache(call, schedule, method, arrays, number)
            schedule = schedule.switched(index)
            continue
        if index == schedule.calls:
            break  # the last block's keys, which nobody reads
        assert_sees(schedule.call(index), schedule, method, arrays, number)
        index += 1
    assert index == schedule.calls
    assert not switches


def assert_recache(
    call: Call, schedule: Causal, method: dict[str, Any], arrays: dict[str, np.ndarray], number: int
) -> None:
    """The original also asks for frames whose answers nobody reads: our rows are among its, and see the same."""
    rows, keys, level = seen_of(call, schedule, method)
    frames = [frame for frame in arrays["key_frame"][number].tolist() if frame >= 0]
    asked = {frame for frame in arrays["query_frame"][number].tolist() if frame >= 0}
    assert rows.keys() <= asked
    assert keys.keys() == set(frames)
    assert level == 0


def test_what_rolling_forcing_sees() -> None:
    """The original also makes a clean pass in every window before the first block is finished, and overwrites it."""
    arrays, method = long_case("rf_trace"), presets.system("rolling-forcing").method()
    schedule = made(method, int(arrays["call_start"].max()) // 3 + 1)
    steps = schedule.config.steps
    windows = np.cumsum(arrays["call_kind"] == 0) - 1
    numbers = [
        number for number, kind in enumerate(arrays["call_kind"]) if kind == 0 or windows[number] >= steps - 1
    ]
    assert len(numbers) == (schedule.calls or 0) + 1
    for index, number in enumerate(numbers[:-1]):
        call = schedule.call(index)
        assert_sees(call, schedule, method, arrays, number)
        levels = [1000 * row.level for row in call.lanes[0].rows if row.frame >= 0]
        assert np.allclose(levels, arrays["call_timestep"][number][: len(levels)], atol=1e-3)


def run(
    name: str, method: dict[str, Any], mask: str, monkeypatch: pytest.MonkeyPatch, **network: Any
) -> Streams:
    """All calls of a file's streams, the prompt changed where the file says."""
    arrays = long_case(name)
    batch, frames, _, *latent = arrays["out"].shape
    schedule = made(method, frames // 3)
    shown = [1000 * level for level in schedule.config.levels]
    streams = Streams(
        model(),
        method,
        shown,
        (latent[0], latent[1]),
        chunks=frames // 3,
        streams=batch,
        mask=mask,
        **network,
    )
    texts = torch.from_numpy(arrays["in_y"])
    texts = texts[None] if texts.ndim == 3 else texts  # [prompts, B, words, channels]
    for number, state in enumerate(streams.states):
        streams.say(state, texts[0, number])
    draw_as(monkeypatch, noise_of(name, streams))
    switches, prompt = switch_frames(name), 0
    while not streams.states[0].ended:
        at = streams.states[0].schedule.config.written(streams.states[0].call)  # type: ignore[attr-defined]
        if switches and at == switches[0]:
            switches.pop(0)
            prompt += 1
            for number, state in enumerate(streams.states):
                streams.say(state, texts[prompt, number])
                streams.driver.recache(state)
        streams.run(1)
    assert not switches
    return streams


def noise_of(name: str, streams: Streams) -> Any:
    arrays, config = long_case(name), streams.schedule.config
    batch, _, *shape = arrays["in_noise"].shape

    @functools.cache
    def drawn(number: int, frames: int) -> np.ndarray:
        value = draw(f"{name}/renoise_{number}", (batch * frames, *shape), SEED)
        return value.astype(np.float32).reshape(batch, frames, *shape)

    def noise(stream: int, frame: int, call: int | None) -> np.ndarray:
        if call is None:
            return arrays["in_noise"][stream, frame]
        block, place = divmod(frame, 3)
        step = call - config.cadence * block
        if "renoise_draw" not in arrays:
            return drawn(block * (config.steps - 1) + step, 3)[stream, place]
        number, frames = int(arrays["renoise_draw"][block, step]), int(arrays["frames_of_draw"][block, step])
        return drawn(number, frames)[stream, arrays["renoise_offset"][block, step] + place]

    return noise


@pytest.mark.parametrize("name", LONGLIVE)
def test_latents_of_longlive(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = f"ll_tiny_{name}"
    got = run(file, longlive(name), "noise_causal", monkeypatch).latents()
    assert np.abs(got - long_case(file)["out"]).max() <= TOLERANCE


LONGLIVE2: dict[str, Any] = {
    "name": "causal", "steps": 4, "chunk_frames": 2, "cadence": 4, "visible_frames": 8, "sink_frames": 2, "recache": "none",
    "sampler": "unipc", "positions": "absolute",
}  # fmt: skip


def test_solver_and_levels_of_longlive2(monkeypatch: pytest.MonkeyPatch) -> None:
    """A text per chunk, and timesteps that are whole numbers beside levels that are none; without second sinks."""
    arrays = long_case("ll2_tiny_plainsink")
    levels = [0.0, *(float(sigma) for sigma in arrays["sigmas"][-2::-1])]
    batch, frames, _, *latent = arrays["out"].shape
    shown = (0.0, *(float(timestep) for timestep in arrays["timesteps"][::-1]))
    streams = Streams(
        model(),
        LONGLIVE2 | {"ladder": levels},
        shown,
        (latent[0], latent[1]),
        chunks=frames // 2,
        streams=batch,
    )
    draw_as(monkeypatch, lambda stream, frame, call: arrays["in_noise"][stream, frame])
    (state,) = streams.states
    for prompt in arrays["prompt_of_chunk"]:
        streams.say(state, torch.from_numpy(arrays["in_y"][prompt, 0]))
        streams.run(5)
    assert state.ended
    assert np.abs(streams.latents() - arrays["out"]).max() <= TOLERANCE


@pytest.mark.parametrize("steps", [2, 4])
def test_every_step_of_unipc(steps: int) -> None:
    """From the original's x and velocity of every step: the next x, predictor and corrector in one."""
    arrays = long_case(f"ll2_sampler_{steps}")
    levels = (0.0, *(float(np.float32(sigma)) for sigma in arrays["sigmas"][-2::-1]))
    sampler = unipc(levels)
    for start in range(0, len(arrays["x"]), steps + 1):
        kept = np.zeros_like(arrays["x"][0])
        for step in range(steps):
            x, velocity = arrays["x"][start + step], -arrays["velocity"][start + step]
            affine = sampler([levels[steps - step]], [levels[steps - step - 1]])
            assert isinstance(affine, Multistep)
            made = affine.update.sample * x + affine.update.prediction * velocity + affine.history * kept
            kept = affine.kept_sample * x + affine.kept_prediction * velocity + affine.kept_history * kept
            assert np.abs(made - arrays["x"][start + step + 1]).max() <= 2e-6


def test_unipc_refuses_what_it_cannot() -> None:
    with pytest.raises(ConfigError, match="at most 4 steps that ends below 1 but it has 5"):
        unipc((0, 0.1, 0.2, 0.3, 0.4, 0.5))
    with pytest.raises(ConfigError, match="ends below 1 but it has 2 up to 1"):
        unipc((0, 0.5, 1.0))
    with pytest.raises(ConfigError, match="two neighbours"):
        unipc((0, 0.5, 0.9))([0.9], [0.0])


@pytest.mark.parametrize("name", ["rf_tiny", "rf_tiny_b2"])
def test_latents_of_rolling_forcing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    got = run(name, presets.system("rolling-forcing").method(), "bidirectional", monkeypatch).latents()
    assert np.abs(got - long_case(name)["out"]).max() <= TOLERANCE
