"""Samplers against the textbook update written out, in float64; guidance; noise by frame."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyengine.errors import ConfigError, ShapeError
from pyengine.schedule.progressive import noise_levels
from pyengine.schedule.samplers import cfg, ddim, euler, frame_noise, make_sampler, renoise

RNG = np.random.default_rng(0)
TABLE = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))  # DDPM's linear betas
LEVELS = noise_levels(50)
ALL = [euler, renoise, ddim(TABLE), ddim(TABLE, eta=1), ddim(TABLE, eta=0.5, predicts="velocity")]
step_of = st.one_of(
    st.tuples(st.integers(0, 50), st.integers(0, 50)), st.integers(0, 50).map(lambda at: (at, at))
)
pairs = st.lists(step_of, min_size=1, max_size=8)


def levels_of(pairs):
    return [LEVELS[max(pair)] for pair in pairs], [LEVELS[min(pair)] for pair in pairs]


@given(pairs)
def test_euler_is_the_float32_difference_exactly(pairs):
    level, level_next = levels_of(pairs)
    got = euler(level, level_next)
    assert np.array_equal(got.prediction, np.float32(level) - np.float32(level_next))
    assert np.array_equal(got.sample, np.ones(len(level), np.float32))
    assert not got.needs_noise


@given(pairs, st.sampled_from(ALL))
def test_frames_whose_level_stays_are_copied_and_all_is_float32(pairs, sampler):
    level, level_next = levels_of(pairs)
    got = sampler(level, level_next)
    for row in range(len(level)):
        assert np.isfinite([got.sample[row], got.prediction[row], got.noise[row]]).all()
        if level[row] == level_next[row]:
            assert (got.sample[row], got.prediction[row], got.noise[row]) == (1, 0, 0)
    assert all(part.dtype == np.float32 and part.shape == (len(level),) for part in got)


@given(pairs, st.sampled_from(ALL))
def test_frames_do_not_influence_each_other(pairs, sampler):
    level, level_next = levels_of(pairs)
    together = sampler(level, level_next)
    for row in range(len(level)):
        alone = sampler(level[row : row + 1], level_next[row : row + 1])
        assert [part[0] for part in alone] == [part[row] for part in together]


@pytest.mark.parametrize("sampler", [euler, renoise])
def test_flow_samplers_reach_x0_with_an_exact_network(sampler):
    """v = x0 - eps, so each step must land on (1 - t') x0 + t' eps', whatever the level."""
    x0, eps, fresh = RNG.standard_normal((3, 50))
    level, level_next = np.array(LEVELS[1:]), np.array(LEVELS[:-1])
    x = (1 - level) * x0 + level * eps
    got = sampler(level, level_next)
    out = got.sample * x + got.prediction * (x0 - eps) + got.noise * fresh
    noise = fresh if sampler is renoise else eps
    assert np.allclose(out, (1 - level_next) * x0 + level_next * noise, atol=1e-6)


@pytest.mark.parametrize("predicts", ["epsilon", "velocity"])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_is_the_papers_equation_12(predicts, eta):
    t, t_next = 801, 601  # timesteps
    abar, abar_next = TABLE[t], TABLE[t_next]
    x0, eps, fresh = RNG.standard_normal((3, 20))
    x = np.sqrt(abar) * x0 + np.sqrt(1 - abar) * eps
    predicted = eps if predicts == "epsilon" else np.sqrt(abar) * eps - np.sqrt(1 - abar) * x0
    sigma = eta * np.sqrt((1 - abar_next) / (1 - abar)) * np.sqrt(1 - abar / abar_next)
    expected = np.sqrt(abar_next) * x0 + np.sqrt(1 - abar_next - sigma**2) * eps + sigma * fresh
    got = ddim(TABLE, eta, predicts)([(t + 1) / 1000], [(t_next + 1) / 1000])
    assert np.allclose(got.sample * x + got.prediction * predicted + got.noise * fresh, expected, atol=1e-5)
    assert got.needs_noise == (eta > 0)


@pytest.mark.parametrize("predicts", ["epsilon", "velocity"])
def test_ddims_last_step_is_x0(predicts):
    x0, eps = RNG.standard_normal((2, 20))
    a, s = np.sqrt(TABLE[0]), np.sqrt(1 - TABLE[0])
    predicted = eps if predicts == "epsilon" else a * eps - s * x0
    got = ddim(TABLE, 1.0, predicts)([1 / 1000], [0.0])
    assert np.allclose(got.sample * (a * x0 + s * eps) + got.prediction * predicted, x0, atol=1e-5)
    assert not got.needs_noise


def test_ddim_takes_a_callable():
    got = ddim(lambda level: np.cos(level * 1.5) ** 2)([0.8], [0.4])
    assert np.allclose(got.sample, np.cos(0.4 * 1.5) / np.cos(0.8 * 1.5))


def test_bad_alpha_bar_is_refused():
    with pytest.raises(ConfigError, match="alpha_bar must"):
        ddim(lambda level: 0.5 + level / 3)([0.8], [0.4])  # rises with the level
    with pytest.raises(ConfigError, match="eta must not be negative but is -1"):
        ddim(TABLE, eta=-1)
    with pytest.raises(ConfigError, match="predicts must be"):
        ddim(TABLE, predicts="score")


@pytest.mark.parametrize("sampler", ALL)
def test_levels_must_fall_and_match(sampler):
    with pytest.raises(ConfigError, match="levels must fall"):
        sampler([0.5], [0.6])
    with pytest.raises(ConfigError, match="levels must fall"):
        sampler([1.5], [0.6])
    with pytest.raises(ShapeError, match=r"expected two arrays \[frames\] but got"):
        sampler([0.5, 0.5], [0.4])


def test_samplers_by_name():
    assert make_sampler("euler").update is euler
    assert make_sampler("renoise").update is renoise
    assert make_sampler("ddim", alpha_bar=TABLE, eta=1)([0.5], [0.4]).needs_noise
    with pytest.raises(ConfigError, match="must be euler, renoise or ddim but is 'heun'"):
        make_sampler("heun")
    with pytest.raises(ConfigError, match="needs alpha_bar"):
        make_sampler("ddim")


@given(st.sampled_from(LEVELS))
def test_a_clean_latent_is_noised_to_a_level(level):
    """(keep, share) of flow are those of x_t; of DDIM they are its alpha bar, and both give back what is clean at level 0."""
    for name in ("euler", "renoise"):
        keep, share = make_sampler(name).noised(level)
        assert (np.float32(keep), np.float32(share)) == (np.float32(1) - np.float32(level), np.float32(level))
    keep, share = make_sampler("ddim", alpha_bar=TABLE).noised(level)
    abar = 1 if level == 0 else TABLE[round(level * len(TABLE)) - 1]
    assert np.isclose(keep**2, abar, rtol=1e-12)
    assert np.isclose(keep**2 + share**2, 1, rtol=1e-12)
    if level == 0:
        assert (keep, share) == (1, 0)


@pytest.mark.parametrize("name", ["euler", "renoise", "ddim"])
def test_noising_to_a_level_and_one_step_with_an_exact_network_is_clean(name):
    sampler = make_sampler(name, alpha_bar=TABLE, predicts="velocity")
    x0, eps = RNG.standard_normal((2, 20))
    keep, share = sampler.noised(0.6)
    velocity = keep * eps - share * x0 if name == "ddim" else x0 - eps
    got = sampler([0.6], [0.0])
    assert np.allclose(got.sample * (keep * x0 + share * eps) + got.prediction * velocity, x0, atol=1e-6)


@given(st.floats(0, 20))
def test_guidance_weights(scale):
    a, b = 1.3, -0.7
    assert np.isclose(cfg(scale) @ [a, b], b + scale * (a - b), atol=1e-4)
    assert cfg(1).tolist() == [1, 0]
    assert cfg(scale).dtype == np.float32


def test_noise_depends_on_seed_frame_and_call_and_on_nothing_else():
    shape = (2, 3, 4)
    first = frame_noise(7, 5, shape)
    assert first.dtype == np.float32
    assert np.array_equal(first, frame_noise(7, 5, shape))
    others = [(8, 5, None), (7, 6, None), (7, 5, 0), (7, 5, 1), (5, 7, None), (-7, 5, None), (-8, 5, None)]
    draws = [first, *(frame_noise(seed, frame, shape, call) for seed, frame, call in others)]
    assert len({draw.tobytes() for draw in draws}) == len(draws)


def test_noise_is_written_in_place_and_is_normal():
    out = np.empty((64, 64), np.float32)
    assert frame_noise(1, 2, out.shape, out=out) is out
    assert np.array_equal(out, frame_noise(1, 2, (64, 64)))
    assert abs(out.mean()) < 0.05
    assert abs(out.std() - 1) < 0.05
