"""A tiny two-level bundle: parity of every component in every runtime, and what a stream of it promises."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import lvdm_family as family
import numpy as np
import pytest

import pyengine
from pyengine.errors import ConfigError, PromptError, ShapeError
from pyengine.export.families.lvdm.export import components
from pyengine.export.parity import parity
from pyengine.methods import Hierarchical, make_method, method_settings

pytestmark = pytest.mark.slow

PER_LATENT, STRIDE = family.PER_LATENT, family.STRIDE


@pytest.fixture(scope="module")
def tiny(plan_cache: Path) -> Iterator[pyengine.Engine]:
    engine = pyengine.load(family.bundle().folder, cache_dir=plan_cache, choice="cut", precision="fp32")
    yield engine
    engine.close()


def test_parity_in_every_runtime() -> None:
    bundle = family.bundle()
    for name in ("prediction", "interpolation", "decoder"):
        assert (bundle.component(name).cut is not None) == (name != "decoder")
    report = parity(bundle, components(family.modules()))
    report.check()
    runners = {row.runner for row in report.rows if row.component == "prediction"}
    assert {name.split()[0] for name in runners} == {"onnxruntime", "openvino"}
    assert {name.split()[-1] for name in runners} >= {"cut", "inline"}, runners


def make(engine: pyengine.Engine, frames: int, **options: object) -> np.ndarray:
    with engine.stream(frames=frames, seed=5, **options) as stream:  # type: ignore[arg-type]
        return np.stack(list(stream))


def test_a_short_stream_is_the_head_of_a_longer_one(tiny: pyengine.Engine) -> None:
    round_frames = 3 * STRIDE * PER_LATENT
    long = make(tiny, 3 * round_frames)
    assert long.shape == (3 * round_frames, 8, 8, 3)
    assert long.std() > 1
    for frames in (1, round_frames - 1, round_frames + 3):
        np.testing.assert_array_equal(make(tiny, frames), long[:frames])


def test_a_snapshot_at_any_call_goes_on_bit_for_bit(tiny: pyengine.Engine) -> None:
    expected = make(tiny, 60)
    with tiny.stream(frames=60, seed=5) as stream:
        for count in (0, 1, 24, 5, 19):
            made = stream.frames_made
            got = [next(stream) for _ in range(count)]
            np.testing.assert_array_equal(np.stack([*got, expected[0]])[:-1], expected[made : made + count])
            state = stream.snapshot()
            with tiny.resume(state) as resumed:
                np.testing.assert_array_equal(np.stack(list(resumed)), expected[stream.frames_made :])


def test_state_stays_bounded_in_an_endless_stream(tiny: pyengine.Engine) -> None:
    with tiny.stream(seed=1) as stream:
        sizes = []
        for _ in range(6):
            for _ in range(3 * STRIDE * PER_LATENT):
                next(stream)
            sizes.append(sum(array.nbytes for array in stream._state.store.state().values()))
    assert max(sizes) == sizes[1] or max(sizes) == sizes[0]


def test_keys_are_in_the_video_and_rounds_do_not_change_them(tiny: pyengine.Engine) -> None:
    """More prediction clips per round, so larger batches of windows: the same latents, up to rounding of the larger batch."""
    one = make(tiny, 72, method={"decode": "whole"})
    three = make(tiny, 72, method={"decode": "whole", "clips_per_round": 3})
    assert np.abs(one.astype(int) - three.astype(int)).max() <= 1


def test_windowed_decoding_differs_from_whole_by_little_but_not_nothing(tiny: pyengine.Engine) -> None:
    whole = make(tiny, 96, method={"decode": "whole"}).astype(float)
    windowed = make(tiny, 96).astype(float)
    difference = np.abs(whole - windowed).mean()
    assert 0 < difference < 0.5 * np.abs(whole - whole.mean()).mean()


def test_the_released_loop_makes_less_than_asked(tiny: pyengine.Engine) -> None:
    # 96 frames are 12 intervals: 4 prediction steps behind the first clip, of which the released loop fills 4.
    released = make(tiny, 96, method={"preset": "released"})
    assert len(released) == (4 * STRIDE + 1) * PER_LATENT
    intended = make(tiny, len(released), method={"preset": "whole"})
    assert not np.array_equal(released, intended)


def test_the_ancestral_sampler_is_a_preset() -> None:
    settings = dict(family.bundle().method)
    ancestral = make_method(method_settings(settings, {"preset": "ddpm"}), 3, 0)
    assert isinstance(ancestral, Hierarchical)
    assert ancestral.config.ladder == tuple(range(999, -1, -1))
    assert ancestral.config.final_timestep == -1


def test_guidance_and_perturbation_matter(tiny: pyengine.Engine) -> None:
    usual = make(tiny, 30)
    assert not np.array_equal(usual, make(tiny, 30, method={"perturbation": None}))
    assert not np.array_equal(usual, make(tiny, 30, guidance=0.0))
    assert np.abs(usual.astype(int) - make(tiny, 30, guidance=0.1)).max() == 0


def test_what_this_model_cannot_do_is_said(tiny: pyengine.Engine) -> None:
    with pytest.raises(PromptError, match="takes no prompt"):
        tiny.stream("a red circle bounces over a blue background")
    with pytest.raises(ShapeError, match="expected no start frames"):
        tiny.stream(start=np.zeros((4, 8, 8, 3), np.uint8))
    with pytest.raises(ConfigError, match="needs a length"):
        tiny.stream(method={"decode": "whole"})
    with tiny.stream(frames=8) as stream, pytest.raises(PromptError, match="takes no prompt"):
        stream.prompt = "a red circle"
