"""Whole generations by the original loops of Self-Forcing and CausVid, through the real driver: latents, timesteps and what is visible.

out            final latents, given ones first
in_noise       start noise of every frame; of Self-Forcing's without the given ones
in_renoise_dd  fresh noise of draw dd, one for each call of a block but its last; row b * f + j is frame j of sample b
call_*         first frame, number of frames and timesteps of every call
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from wan_golden import TOLERANCE, case, tensor, transformer
from wan_streams import Streams, draw_as

from pyengine.export.families.wan import presets
from pyengine.schedule.progressive import warped
from pyengine.schedule.samplers import Coefficients, make_sampler

pytestmark = pytest.mark.usefixtures("one_thread")

# Blocks, given frames, window and sink of each file; None: the system's own.
LOOPS: dict[str, dict[str, Any]] = {
    "loop_sf": {"blocks": [3] * 4},
    "loop_sf_roll": {"blocks": [3] * 6, "visible": 9, "sink": 3},
    "loop_sf_first": {"blocks": [1, 3, 3]},
    "loop_sf_given": {"blocks": [3] * 4, "given": 2},
    "loop_sf_image": {"blocks": [1, 3, 3], "given": 1},
    "loop_sf_frame": {"blocks": [1] * 5, "visible": 4},
    "loop_causvid": {"blocks": [3] * 4, "system": "causvid"},
    "loop_causvid_given": {"blocks": [3] * 3, "given": 1, "system": "causvid"},
    "loop_causvid_warp": {"blocks": [3] * 2, "system": "causvid", "warp": 8.0},
}


def streams_of(name: str, **network: Any) -> Streams:
    """`network`: another than the module in torch, as of `Streams`."""
    loop, arrays = LOOPS[name], case(name)
    system = presets.system(loop.get("system", "self-forcing"))
    method, shown, blocks = system.method(), system.shown, loop["blocks"]
    if "warp" in loop:
        method |= {"warp": loop["warp"], "ladder": [0, 0.25, 0.5, 0.75, 1], "steps": 4, "cadence": 4}
        method["known_levels"] = None
        shown = None
    size = blocks[-1]
    method |= {
        "chunk_frames": size,
        "visible_frames": loop.get("visible", 21),
        "sink_frames": loop.get("sink", 0),
    }
    method["first_chunk"] = blocks[0] if blocks[0] < size else None
    given = loop.get("given", 0)
    if shown is None:
        shown = tuple(
            1000 * level for level in presets.noise_levels(4, loop["warp"], tuple(method["ladder"]))
        )
    batch, _, _, *latent = arrays["out"].shape
    made = Streams(
        transformer(),
        method,
        shown,
        (latent[0], latent[1]),
        chunks=len(blocks) - given,
        given_chunks=given,
        streams=batch,
        **network,
    )
    for number, state in enumerate(made.states):
        made.say(state, tensor(name, "in_context")[number])
        for frame in range(made.schedule.given_frames):
            state.store.give(frame, arrays["in_initial"][number, frame])
    return made


def noise_of(name: str, streams: Streams) -> Any:
    """Start noise by frame, and fresh noise by block and step, as the original drew it."""
    arrays, config = case(name), streams.schedule.config
    given = streams.schedule.given_frames
    skipped = 0 if LOOPS[name].get("system") == "causvid" else given

    def noise(stream: int, frame: int, call: int | None) -> np.ndarray:
        if call is None:
            return arrays["in_noise"][stream, frame - skipped]
        block, step = divmod(call, config.cadence)
        chunk = block + config.given_chunks
        draw = arrays[f"in_renoise_{block * (config.steps - 1) + step:02d}"]
        return draw[stream * config.size(chunk) + frame - config.start(chunk)]

    return noise


@pytest.mark.parametrize("name", LOOPS)
def test_latents_of_the_original_loop(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays, streams = case(name), streams_of(name)
    draw_as(monkeypatch, noise_of(name, streams))
    streams.run()
    want = arrays["out"][:, streams.schedule.given_frames :]
    got = streams.latents()
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= TOLERANCE


@pytest.mark.parametrize("name", LOOPS)
def test_calls_of_the_original_loop(name: str) -> None:
    """The same calls in the same order, but for the last one, whose keys nobody reads."""
    arrays, schedule = case(name), streams_of(name).schedule
    calls = [schedule.call(index) for index in range(schedule.first_call, schedule.calls or 0)]
    assert len(calls) == len(arrays["call_start"]) - 1
    timesteps = dict(zip(schedule.config.levels, shown_of(name), strict=True))
    for number, call in enumerate(calls):
        rows = [row for row in call.lanes[0].rows if row.frame >= 0]
        assert rows[0].frame == arrays["call_start"][number]
        assert len(rows) == arrays["call_frames"][number]
        want = arrays["call_timestep"][number][: len(rows)]
        assert np.allclose([timesteps[row.level] for row in rows], want, atol=1e-4)


def shown_of(name: str) -> tuple[float, ...]:
    steps = case(name)["denoising_steps"]
    return (0.0, *(float(step) for step in reversed(steps) if step > 0))


def test_levels_and_timesteps_of_the_scheduler() -> None:
    arrays = case("scheduler")
    forcing, causvid = presets.system("self-forcing"), presets.system("causvid")
    assert np.allclose(forcing.levels[:0:-1], arrays["denoising_sigmas_shift5"], atol=2e-7)
    assert np.allclose(forcing.shown[:0:-1], arrays["denoising_steps_shift5"], atol=1e-4)
    found = dict(zip(arrays["raw_timesteps"].tolist(), arrays["raw_sigmas_shift8"].tolist(), strict=True))
    for timestep, level in zip(causvid.shown[1:], causvid.levels[1:], strict=True):
        assert abs(found[timestep] - level) <= 2e-7


@pytest.mark.parametrize("shift", [5, 8])
def test_tables_of_the_scheduler(shift: int) -> None:
    """1000 entries, the noisiest first, of which a list of steps takes some."""
    arrays = case("scheduler")
    table = np.array([warped(1 - entry / 1000, float(shift)) for entry in range(1000)])
    assert np.abs(table - arrays[f"sigmas_shift{shift}"]).max() <= 2e-7
    assert np.abs(1000 * table - arrays[f"timesteps_shift{shift}"]).max() <= 2e-4
    entries = arrays[f"denoising_ids_shift{shift}"]
    assert np.abs(table[entries] - arrays[f"denoising_sigmas_shift{shift}"]).max() <= 2e-7


def test_noising_and_clean_latents_of_the_scheduler() -> None:
    """At timesteps between the table's entries, whose levels are those of the nearest."""
    arrays, sampler = case("scheduler"), make_sampler("renoise")
    assert np.array_equal(
        [np.abs(arrays["timesteps_shift8"] - timestep).argmin() for timestep in arrays["raw_timesteps"]],
        arrays["raw_ids_shift8"],
    )
    for row, level in enumerate(arrays["raw_sigmas_shift8"].tolist()):
        clean, noise = arrays["in_x0"][row], arrays["in_eps"][row]
        keep, share = sampler.noised(level)
        assert np.abs(keep * clean + share * noise - arrays["out_add_noise_shift8"][row]).max() <= TOLERANCE
        affine = sampler([level], [0.0])
        assert isinstance(affine, Coefficients)
        got = (
            affine.sample * clean - affine.prediction * noise
        )  # the engine's velocity is the flow's negative
        assert np.abs(got - arrays["out_x0_shift8"][row]).max() <= TOLERANCE
