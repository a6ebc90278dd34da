"""DPM-Solver++(2M) as a sampler, against that of diffusers."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from pyengine.errors import ConfigError
from pyengine.schedule.dpm_solver import dpm_solver, even_timesteps
from pyengine.schedule.samplers import Multistep, Prediction

BETAS = (0.00085, 0.012)


@pytest.mark.parametrize("predicts", ["epsilon", "velocity"])
@pytest.mark.parametrize("steps", [1, 2, 3, 20, 50])
def test_a_clip_is_that_of_diffusers(steps: int, predicts: Prediction) -> None:
    """With the released settings, and a predictor of this test. Theirs computes its factors in fp32."""
    theirs = DPMSolverMultistepScheduler(
        beta_start=BETAS[0],
        beta_end=BETAS[1],
        beta_schedule="scaled_linear",
        steps_offset=1,
        prediction_type={"epsilon": "epsilon", "velocity": "v_prediction"}[predicts],
    )
    theirs.set_timesteps(steps)
    timesteps = even_timesteps(steps)
    assert theirs.timesteps.tolist() == timesteps.tolist()
    x = torch.randn(64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours, before = x.numpy().copy(), np.zeros(64)
    levels = [*((int(t) + 1) / 1000 for t in timesteps), 0.0]
    sampler = dpm_solver(BETAS, steps, predicts=predicts)
    for t, (now, then) in zip(theirs.timesteps, pairwise(levels), strict=True):
        p = np.tanh(1.3 * ours + int(t) / 1000)
        x = theirs.step(torch.tanh(1.3 * x + int(t) / 1000), t, x).prev_sample
        found = sampler([now], [then])
        assert isinstance(found, Multistep)
        update, history, kept_sample, kept_prediction, _ = found
        assert not update.needs_noise
        ours, before = (
            update.sample[0] * ours + update.prediction[0] * p + history[0] * before,
            kept_sample[0] * ours + kept_prediction[0] * p,
        )
    assert np.abs(x.numpy() - ours).max() < 2e-5 * np.abs(ours).max()


def test_timesteps_are_the_released_ones() -> None:
    found = even_timesteps(50)
    assert (found[:2].tolist(), int(found[-1])) == ([999, 979], 20)
    assert len(set(even_timesteps(999).tolist())) == 999
    with pytest.raises(ConfigError, match="steps must be from 1 to 999 but is 1000"):
        even_timesteps(1000)


def test_levels_that_are_no_steps_are_refused_and_equal_ones_are_held() -> None:
    sampler = dpm_solver(BETAS, 2)
    assert dpm_solver(BETAS, 2) is sampler
    found = sampler([0.3, 1.0], [0.3, 0.501])
    assert isinstance(found, Multistep)
    assert [each[0] for each in (*found.update, *found[1:4])] == [1, 0, 0, 0, 0, 0]
    with pytest.raises(ConfigError, match="two neighbours of"):
        sampler([1.0], [0.0])
    keep, share = sampler.noised(1.0)
    assert keep**2 + share**2 == pytest.approx(1)
    assert keep < 0.1
    assert sampler.noised(0.0) == (1.0, 0.0)
