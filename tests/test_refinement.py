"""The second stage's noise levels, solver and randomized blending against numbers of the original code."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from streamingt2v_golden import CONFIG, array, difference, own_error

from pyengine.errors import ConfigError, ShapeError
from pyengine.schedule.refinement import (
    blend,
    chunk_starts,
    clean_of,
    guided,
    solver_step,
    split_at,
    time_grid,
    vid2vid_sigmas,
    whole_frames,
)
from pyengine.schedule.samplers import alphas_cumprod
from pyengine.schedule.timesteps import leading_timesteps, levels_of, with_first_alpha

SETTING = CONFIG["blending"]


def test_noise_levels_are_those_of_the_original() -> None:
    s = vid2vid_sigmas()
    np.testing.assert_allclose(s, array("blending_schedule/vp_sigmas"), rtol=1e-5)
    np.testing.assert_allclose(
        np.sqrt(1 - s[:600] ** 2), array("blending_schedule/vp_alphas")[:600], rtol=0, atol=1e-5
    )
    assert s[999] == 1
    assert (np.diff(s) > 0).all()


def test_the_time_grid_is_that_of_the_original() -> None:
    for steps, name in {30: "blending_schedule", 5: "blending_loop"}.items():
        grid = time_grid(vid2vid_sigmas(), steps, 600)
        np.testing.assert_allclose(grid.sigmas, array(f"{name}/sigmas_k"), rtol=1e-5)
        assert grid.timesteps.tolist() == array(f"{name}/t_int").tolist()


def test_some_numbers_of_steps_become_one_more_as_in_the_original() -> None:
    longer = {n for n in range(1, 101) if len(time_grid(vid2vid_sigmas(), n, 600).timesteps) != n}
    assert longer == {6, 13, 27, 54, 55}


def model(x: np.ndarray, t: int, p: np.ndarray) -> np.ndarray:
    """The stand-in for a network of the golden case."""
    c, f, h, w = np.indices(x.shape)
    wave = np.sin(0.01 * t + 0.7 * f + 1.3 * c + 0.11 * h + 0.05 * w)
    return p[2] * x - 0.3 * x.mean(1, keepdims=True) + p[0] * wave + p[1] * np.tanh(x)


@pytest.mark.parametrize(
    ("dtype", "table"), [(np.float32, "theirs"), (np.float64, "theirs"), (np.float64, "ours")]
)
def test_the_loop_with_randomized_blending_is_that_of_the_original(dtype: type, table: str) -> None:
    s = vid2vid_sigmas() if table == "ours" else array("blending_schedule/vp_sigmas").astype(np.float64)
    chunk, overlap = SETTING["chunk"], SETTING["overlap"]
    grid = time_grid(s, SETTING["steps"], SETTING["total_noise_levels"])
    starts = chunk_starts(SETTING["frames"], chunk, overlap)
    x0, noise = (array(f"blending_loop/{name}")[0].astype(dtype) for name in ("x0", "noise"))
    y, u = (array(f"blending_loop/{name}")[0].astype(np.float64) for name in ("y", "u"))
    share = s[SETTING["total_noise_levels"] - 1]
    noised = dtype((1 - share**2) ** 0.5) * x0 + dtype(share) * noise
    x, before = dtype(grid.sigmas[0]) * noised, None
    splits, draws = array("blending_loop/split"), array("blending_loop/sde_noise").astype(dtype)
    seen: dict[str, list[np.ndarray]] = {"xt_in": [], "D": []}
    for step, t in enumerate(grid.timesteps):
        xt = x / dtype((1 + grid.sigmas[step] ** 2) ** 0.5)
        parts = []
        for start in starts:
            shown = xt[:, start : start + chunk]
            cond, uncond = (model(shown, int(t), p).astype(dtype) for p in (y, u))
            v = guided(cond, uncond, SETTING["guide"], SETTING["rescale"])
            parts.append(clean_of(shown, v, s[t]))
        clean = blend(parts, splits[step].tolist(), overlap)
        last = step == len(grid.timesteps) - 1
        x = solver_step(grid.sigmas, step).apply(x, clean, before, None if last else draws[step])
        before = clean
        seen["xt_in"].append(xt)
        seen["D"].append(clean)
    assert x.dtype == dtype
    found = {name: np.stack(values) for name, values in seen.items()}
    found |= {"x_noised": noised[None], "x_final": x[None]}
    for name, got in found.items():
        # Their error is that of the loop on one table. Ours is off by its own rounding as well.
        allowed = 2 * own_error(f"blend:{name}")[1] + (2e-6 if table == "ours" else 0)
        assert difference(got, f"blending_loop/{name}")[1] <= allowed, name
    assert np.array_equal(x, found["D"][-1])


def test_ddim_has_the_timesteps_and_alphas_of_the_original() -> None:
    timesteps = leading_timesteps(50)
    assert timesteps.tolist() == array("ddim_schedule/timesteps_50").tolist()
    alphas = alphas_cumprod(0.00085, 0.012)
    np.testing.assert_allclose(alphas, array("ddim_schedule/alphas_cumprod"), rtol=2e-6)
    ladder = levels_of(timesteps)
    assert len(ladder) == 51
    assert ladder[0] == 0
    assert ladder[-1] == pytest.approx(0.982)
    at = with_first_alpha(alphas)
    assert at(np.array([0.0, 0.002, 1.0])).tolist() == [alphas[0], alphas[1], alphas[999]]


@given(
    chunk=st.integers(2, 12),
    overlap=st.integers(1, 11),
    count=st.integers(1, 5),
    seed=st.integers(0, 2**64 - 1),
)
def test_every_frame_of_a_blend_is_of_a_chunk_that_has_it(
    chunk: int, overlap: int, count: int, seed: int
) -> None:
    overlap = min(overlap, chunk - 1)
    starts = chunk_starts(overlap + count * (chunk - overlap), chunk, overlap)
    assert len(starts) == count
    parts = [
        np.arange(start, start + chunk, dtype=float)[None, :, None, None] + 1000 * index
        for index, start in enumerate(starts)
    ]
    splits = [split_at(seed, 3, index, overlap) for index in range(1, count)]
    out = blend(parts, splits, overlap)[0, :, 0, 0]
    assert (out % 1000).tolist() == list(range(len(out)))
    owner = (out // 1000).astype(int)
    # A narrow step lets more than two chunks have a frame; the last of them that has taken over counts.
    want = [max(i for i, s in enumerate(starts) if i == 0 or f >= s + splits[i - 1]) for f in range(len(out))]
    assert owner.tolist() == want


def test_a_chunk_takes_over_a_frame_of_the_overlap_as_often_as_in_the_original() -> None:
    draws = np.array([split_at(7, step, chunk, 8) for step in range(40) for chunk in range(1, 51)])
    assert set(draws.tolist()) == set(range(8))
    kept = [(draws >= f).mean() for f in range(1, 9)]
    np.testing.assert_allclose(kept, [1 - f / 8 for f in range(1, 9)], atol=0.04)
    assert split_at(7, 3, 5, 8) == split_at(7, 3, 5, 8)
    assert len({tuple(split_at(seed, s, 1, 8) for s in range(20)) for seed in range(4)}) == 4


def test_lengths_are_cut_to_whole_chunks() -> None:
    assert [whole_frames(n, 24, 8) for n in (80, 240, 1200)] == [72, 232, 1192]
    with pytest.raises(ConfigError, match="232 would do"):
        chunk_starts(240, 24, 8)
    with pytest.raises(ConfigError, match="but are 10; 24 would do"):
        chunk_starts(10, 24, 8)


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected steps from 1"):
        time_grid(vid2vid_sigmas(), 0, 600)
    with pytest.raises(ConfigError, match="step must be from 0 to 4"):
        solver_step(time_grid(vid2vid_sigmas(), 5, 600).sigmas, 5)
    with pytest.raises(ShapeError, match="expected 1 splits from 0 to 2"):
        blend([np.zeros((1, 4, 1, 1))] * 2, [3], 2)
    with pytest.raises(ConfigError, match="steps must be from 1"):
        leading_timesteps(0)
    with pytest.raises(ConfigError, match="room for the offset"):
        leading_timesteps(1000)
    with pytest.raises(ConfigError, match="overlap"):
        split_at(1, 0, 1, 0)
