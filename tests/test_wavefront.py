"""The order of a wavefront: every frame is updated once per step from what it should be, and the video is that of the whole-video order."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from streamingt2v_golden import CONFIG, array, difference, own_error

from pyengine.errors import ConfigError
from pyengine.schedule.refinement import (
    blend,
    chunk_starts,
    clean_of,
    guided,
    solver_step,
    split_at,
    time_grid,
)
from pyengine.schedule.wavefront import Wavefront

SETTING = CONFIG["blending"]


@st.composite
def wavefronts(draw: st.DrawFn, blending: str = "randomized") -> Wavefront:
    chunk = draw(st.integers(1, 9))
    return Wavefront(
        steps=draw(st.integers(1, 6)),
        chunk=chunk,
        overlap=draw(st.integers(0, chunk - 1)),
        chunks=draw(st.integers(1, 12)),
        blending=blending,  # type: ignore[arg-type]
        seed=draw(st.integers(0, 2**64 - 1)),
    )


@given(wavefronts())
def test_every_frame_is_updated_once_per_step_from_the_step_before(wave: Wavefront) -> None:
    """In places that hold nothing but what was written there."""
    held: dict[int, tuple[int, int]] = {}  # place -> frame and how often it was updated
    kept: dict[int, tuple[int, int]] = {}  # the same of what the solver keeps
    assert wave.frames is not None
    updates = dict.fromkeys(range(wave.frames), 0)
    for at in wave:
        for frame in at.fresh:
            held[wave.place(frame, at)[0]] = (frame, 0)
        assert all(held[wave.place(frame, at)[0]] == (frame, at.step) for frame in at.frames)
        for frame in at.updated:
            assert frame in at.frames
            _, to, memory = wave.place(frame, at)
            assert at.step == 0 or kept[memory] == (frame, at.step - 1)
            held[to], kept[memory] = (frame, at.step + 1), (frame, at.step)
            updates[frame] += 1
            assert max(to, memory) < wave.places
    assert set(updates.values()) == {wave.steps}


@given(wavefronts())
def test_a_frame_is_updated_by_the_chunk_that_the_whole_video_order_takes_it_from(wave: Wavefront) -> None:
    assert wave.chunks is not None
    if wave.overlap == 0:
        return
    owners: dict[tuple[int, int], int] = {}
    for at in wave:
        owners |= {(at.step, frame): at.chunk for frame in at.updated}
    for step in range(wave.steps):
        parts = [np.full((1, wave.chunk, 1, 1), chunk) for chunk in range(wave.chunks)]
        splits = [split_at(wave.seed, step, chunk, wave.overlap) for chunk in range(1, wave.chunks)]
        want = blend(parts, splits, wave.overlap).ravel().tolist()
        assert [owners[step, frame] for frame in range(len(want))] == want


@given(st.sampled_from(["randomized", "shared", "independent"]).flatmap(wavefronts))
def test_frames_leave_in_order_when_they_are_done_and_are_not_read_again(wave: Wavefront) -> None:
    finished: set[int] = set()
    gone: list[int] = []
    begun = 0
    for call in range(wave.calls or 0):
        open_frame, needs = wave.first_open(call), wave.needs(call)
        assert finished == set(range(open_frame))
        at = wave.step_at(call)
        if at is None:
            continue
        begun = max(begun, at.frames.stop)
        assert begun <= needs
        assert not gone or at.frames.start > gone[-1]
        finished |= set(at.done)
        gone += at.leaving
        assert set(at.leaving) <= finished
    assert gone == list(range(wave.frames or 0))


@given(wavefronts(), st.integers(0, 12))
def test_a_video_goes_on_as_an_endless_one_begins(wave: Wavefront, more: int) -> None:
    """Up to the end, what is done in a call does not depend on whether there is one."""
    endless = Wavefront(wave.steps, wave.chunk, wave.overlap, None, wave.blending, wave.seed)
    assert endless.calls is None
    assert endless.frames is None
    assert wave.chunks is not None
    longer = Wavefront(
        wave.steps, wave.chunk, wave.overlap, wave.chunks + wave.reach + more, wave.blending, wave.seed
    )
    for call in range(wave.chunks * wave.steps):
        at = endless.step_at(call)
        if at is not None and at.chunk < wave.chunks:
            assert at == longer.step_at(call)
            assert longer.needs(call) == endless.needs(call)


@given(wavefronts())
def test_what_is_in_flight_is_bounded(wave: Wavefront) -> None:
    most = 0
    begun: set[int] = set()
    ended: set[int] = set()
    for at in wave:
        begun.add(at.chunk)
        most = max(most, len(begun - ended))
        if at.step == wave.steps - 1:
            ended.add(at.chunk)
    assert most <= wave.chunks_in_flight
    if wave.chunks is not None and wave.chunks >= wave.chunks_in_flight:
        assert most == wave.chunks_in_flight


def test_the_released_sizes() -> None:
    wave = Wavefront(30, 24, 8, None)
    assert (wave.reach, wave.chunks_in_flight, wave.frames_in_flight) == (1, 30, 488)
    first = next(call for call in itertools.count() if (at := wave.step_at(call)) and at.leaving)
    assert first == 30 * 30 - 1
    assert wave.needs(first) == 488
    assert Wavefront(30, 24, 8, None, "shared").frames_in_flight == 24
    assert Wavefront(30, 56, 32, None).reach == 2  # those of the first release


@pytest.mark.parametrize("blending", ["shared", "independent"])
def test_chunks_without_blending_are_finished_one_after_the_other(blending: Any) -> None:
    wave = Wavefront(3, 5, 2, 3, blending)
    steps = list(wave)
    assert [(at.chunk, at.step) for at in steps] == [(chunk, step) for chunk in range(3) for step in range(3)]
    assert all(at.updated == at.frames for at in steps)
    assert [list(at.leaving) for at in steps if at.leaving] == [[0, 1, 2], [3, 4, 5], [6, 7, 8, 9, 10]]
    assert wave.frames == 11


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"steps": 0}, "from 1 but are 0 and 2"),
        ({"overlap": 4}, "from 0 to below the chunk of 4 frames but is 4"),
        ({"blending": "none"}, "blending must be one of randomized, shared, independent but is 'none'"),
    ],
)
def test_what_makes_no_sense_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Wavefront(**({"steps": 2, "chunk": 4, "overlap": 1, "chunks": 2} | change))


# ---- the numbers --------------------------------------------------------------------------------


Array = np.ndarray[Any, Any]


class Video:
    """The golden case: a stand-in for a network, its guidance, and the solver, on one chunk or on all of them."""

    def __init__(self, dtype: type, chunks: int, steps: int, seed: int | None = None) -> None:
        """`seed` None: noise and inputs of the golden case."""
        self.dtype, self.steps = dtype, steps
        self.chunk, self.overlap = SETTING["chunk"], SETTING["overlap"]
        self.table = array("blending_schedule/vp_sigmas").astype(np.float64)
        self.grid = time_grid(self.table, steps, SETTING["total_noise_levels"])
        self.y, self.u = (array(f"blending_loop/{name}")[0].astype(np.float64) for name in ("y", "u"))
        frames = self.overlap + chunks * (self.chunk - self.overlap)
        if seed is None:
            x0, noise = (array(f"blending_loop/{name}")[0].astype(dtype) for name in ("x0", "noise"))
            self.draws: Array = array("blending_loop/sde_noise").astype(dtype)
        else:
            rng = np.random.default_rng(seed)
            x0, noise = rng.standard_normal((2, 4, frames, 5, 7)).astype(dtype)
            self.draws = rng.standard_normal((steps, 4, frames, 5, 7)).astype(dtype)
        assert x0.shape[1] == frames
        share = self.table[SETTING["total_noise_levels"] - 1]
        noised = dtype((1 - share**2) ** 0.5) * x0 + dtype(share) * noise
        self.start = dtype(self.grid.sigmas[0]) * noised

    def clean(self, x: np.ndarray, step: int) -> np.ndarray:
        """What the network predicts of one chunk. x [4, chunk, h, w]"""
        dtype, t = self.dtype, int(self.grid.timesteps[step])
        xt = np.ascontiguousarray(x) / dtype((1 + self.grid.sigmas[step] ** 2) ** 0.5)
        c, f, h, w = np.indices(xt.shape)
        wave = np.sin(0.01 * t + 0.7 * f + 1.3 * c + 0.11 * h + 0.05 * w)
        cond, uncond = (
            (p[2] * xt - 0.3 * xt.mean(1, keepdims=True) + p[0] * wave + p[1] * np.tanh(xt)).astype(dtype)
            for p in (self.y, self.u)
        )
        return clean_of(xt, guided(cond, uncond, SETTING["guide"], SETTING["rescale"]), self.table[t])

    def whole(self, splits: Any) -> np.ndarray:
        """All chunks make each step together. `splits` [step][chunk - 1]"""
        x, before = self.start.copy(), None
        starts = chunk_starts(x.shape[1], self.chunk, self.overlap)
        for step in range(self.steps):
            parts = [self.clean(x[:, start : start + self.chunk], step) for start in starts]
            clean = blend(parts, splits[step], self.overlap)
            draw = None if step == self.steps - 1 else self.draws[step]
            x = solver_step(self.grid.sigmas, step).apply(x, clean, before, draw)
            before = clean
        return x

    def in_a_wavefront(self, wave: Wavefront) -> np.ndarray:
        """Chunk by chunk, with as many latents as the wavefront has places for."""
        held: Array = np.full((4, wave.places, 5, 7), np.nan, self.dtype)
        out = np.full_like(self.start, np.nan)
        for at in wave:
            places = {frame: wave.place(frame, at) for frame in at.frames}
            for frame in at.fresh:
                held[:, places[frame][0]] = self.start[:, frame]
            x = held[:, [places[frame][0] for frame in at.frames]]
            clean = self.clean(x, at.step)
            solver = solver_step(self.grid.sigmas, at.step)
            for frame in at.updated:
                row, (_, to, memory) = (
                    slice(frame - at.frames.start, frame - at.frames.start + 1),
                    places[frame],
                )
                draw = None if at.step == self.steps - 1 else self.draws[at.step][:, frame : frame + 1]
                before = held[:, memory : memory + 1]
                new = solver.apply(x[:, row], clean[:, row], before if at.step else None, draw)
                held[:, to], held[:, memory] = new[:, 0], clean[:, row][:, 0]
            for frame in at.done:
                out[:, frame] = held[:, places[frame][1]]
        return out


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("chunks", "steps"), [(1, 3), (4, 3), (7, 4)])
def test_a_wavefront_is_the_whole_video_order_to_the_bit(dtype: type, chunks: int, steps: int) -> None:
    video = Video(dtype, chunks, steps, seed=2)
    wave = Wavefront(steps, video.chunk, video.overlap, chunks, seed=9)
    splits = [[split_at(9, step, chunk, wave.overlap) for chunk in range(1, chunks)] for step in range(steps)]
    got = video.in_a_wavefront(wave)
    assert np.isfinite(got).all()
    assert np.array_equal(got, video.whole(splits))
    other = Wavefront(steps, video.chunk, video.overlap, chunks, seed=10)
    assert chunks == 1 or not np.array_equal(got, video.in_a_wavefront(other))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_golden_loop_in_a_wavefront(monkeypatch: pytest.MonkeyPatch, dtype: type) -> None:
    splits = array("blending_loop/split").astype(int).reshape(SETTING["steps"], -1)
    monkeypatch.setattr(
        "pyengine.schedule.wavefront.split_at",
        lambda seed, step, chunk, overlap: int(splits[step, chunk - 1]),
    )
    video = Video(dtype, 3, SETTING["steps"])
    got = video.in_a_wavefront(Wavefront(SETTING["steps"], video.chunk, video.overlap, 3))
    assert np.array_equal(got, video.whole(splits.tolist()))
    allowed = 2 * own_error("blend:x_final")[1]
    assert difference(got[None], "blending_loop/x_final")[1] <= allowed
