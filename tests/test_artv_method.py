"""ART-V's schedule, and streams of it on networks that are Python functions."""

from __future__ import annotations

from itertools import islice
from typing import Any

import numpy as np
import pytest
from fake_methods import LATENT, decode, encode
from fake_network import (
    Arrays,
    FakeEngine,
    FakeExecutor,
    FakeNetwork,
    fake_bundle,
    open_stream,
    stream_settings,
)

from pyengine.bundle.manifest import TensorSpec
from pyengine.errors import ConfigError
from pyengine.methods import make_method, method_settings
from pyengine.methods.artv import Artv, timesteps_of
from pyengine.schedule.samplers import alphas_cumprod, frame_noise
from pyengine.streaming.driver import Driver
from pyengine.streaming.stream import Stream

SHAPE = (LATENT.channels, LATENT.height, LATENT.width)
STEPS = 3
METHOD = {
    "name": "artv", "steps": STEPS, "timesteps": 1000, "references": 2, "layers": 1, "features": 1,
    "betas": [0.00085, 0.012], "predicts": "velocity",
}  # fmt: skip


# ---- the schedule --------------------------------------------------------------------------------


def schedule(chunks: int | None = 4, given: int = 0, **changes: Any) -> Artv:
    made = make_method(METHOD | changes, chunks, given)
    assert isinstance(made, Artv)
    return made


@pytest.mark.parametrize("given", [0, 1, 2])
def test_every_frame_gets_all_its_steps_and_leaves_clean(given: int) -> None:
    made = schedule(5, given)
    assert made.calls == 5 * (STEPS + 2)
    levels: dict[int, list[tuple[float, float]]] = {}
    emitted = []
    for index in range(made.calls):
        call = made.call(index)
        for lane in call.lanes:
            reference, row = lane.rows
            assert reference.frame == (row.frame - 1 if row.frame else -1)
            assert reference.level == reference.level_next == 0
            levels.setdefault(row.frame, []).append((row.level, row.level_next))
        emitted += [frame for emit in call.emit for frame in emit.frames]
    assert emitted == list(range(given, given + 5))
    for steps in levels.values():
        assert [level for level, _ in steps] == [1.0, 0.667, 0.333]
        assert [then for _, then in steps] == [0.667, 0.333, 0.0]


def test_what_is_constant_is_computed_once() -> None:
    """The anchor twice, without a first frame and of it; references once per frame, the newest first; the first frame for missing ones."""
    made = schedule(6)
    calls = [made.call(index) for index in range(6 * (STEPS + 2))]
    anchors = [call.latents for call in calls if call.variant and call.variant.component == "anchor"]
    references = [call.latents for call in calls if call.variant and call.variant.component == "references"]
    assert anchors == [(), (0,)]
    assert references == [(), (0, 0), (1, 0), (2, 1), (3, 2), (4, 3)]
    later = schedule(None, 2)
    assert later.calls is None
    assert later.call(0).latents == (0,)
    assert later.call(1).latents == (1, 0)
    assert all(later.call(index * (STEPS + 2)).variant is None for index in range(1, 4))


def test_memory_is_that_of_the_references_and_the_anchor() -> None:
    pinned, oldest = schedule(None).call(1000 * (STEPS + 2) - 1).keeps or (None, None)
    assert (pinned, oldest) == (1, 998)


def test_the_steps_stand_where_diffusers_puts_them() -> None:
    diffusers = pytest.importorskip("diffusers")
    for spacing, offset in (("trailing", 0), ("leading", 1)):
        scheduler = diffusers.DDIMScheduler(timestep_spacing=spacing, steps_offset=offset)
        for steps in (1, 3, 8, 25, 50):
            scheduler.set_timesteps(steps)
            assert list(timesteps_of(steps, 1000, spacing)) == scheduler.timesteps.tolist()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"steps": 0}, "steps"),
        ({"steps": 2000}, "steps must lie in 1..1000 but is 2000"),
        ({"steps": 1000, "spacing": "leading"}, "would visit timestep 1000"),
        ({"chunk_frames": 2}, "expected 1, since frames are made one by one, but got 2"),
        ({"betas": [0.012, 0.00085]}, "two numbers that rise"),
        ({"augmentation": 1000}, "a timestep from 0 to 999 but got 1000"),
        ({"spacing": "even"}, "spacing"),
    ],
)
def test_bad_settings_are_said_in_a_sentence(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        method_settings(METHOD | changes)


# ---- streams -------------------------------------------------------------------------------------


def _denoise(given: Arrays, rings: Any) -> Arrays:
    """A frame sees its reference, the anchor, a feature and the text; where nothing is present it sees the text alone."""
    latents, text = given["latents"], given["text"]
    out = np.zeros((len(text), *latents.shape), np.float32)
    for lane, (reference, x) in enumerate(latents):
        seen = 0.4 * reference + (0.3 * given["anchor"][lane] + 0.2 * given["feature"][lane])[:, None, None]
        for branch in range(len(text)):
            words = (0.2 * given["level"][lane, 1] + 0.3 * text[branch, lane])[:, None, None]
            out[branch, lane, 1] = 0.2 * x - given["condition"][lane, 0] * seen - words
    return {"prediction": out}


def _features(given: Arrays, rings: Any) -> Arrays:
    mixed = np.tensordot(np.array([2.0, -1.0], np.float32), given["latents"].mean((2, 3)), 1)
    present = given["present"]
    return {
        "condition": np.concatenate([present * given["masked"], given["augmentation"]]),
        "feature": (mixed * present).astype(np.float32),
    }


def _anchor(given: Arrays, rings: Any) -> Arrays:
    return {"anchor": (given["latents"].mean((0, 2, 3)) * given["present"]).astype(np.float32)}


def networks() -> dict[str, FakeNetwork]:
    def spec(*shape: str | int) -> TensorSpec:
        return TensorSpec(shape, "float32")

    one = {"present": spec(1), "masked": spec(1), "augmentation": spec(1)}
    step = {
        "latents": spec("streams", 2, *SHAPE),
        "level": spec("streams", 2),
        "condition": spec("streams", 2),
        "text": spec("branches", "streams", 3),
        "anchor": spec("streams", 3),
        "feature": spec("streams", 3),
    }
    return {
        "denoiser": FakeNetwork(step, {"prediction": spec("branches", "streams", 2, *SHAPE)}, _denoise),
        "references": FakeNetwork(
            {"latents": spec(2, *SHAPE), **one},
            {"condition": spec(2), "feature": spec(3)},
            _features,
        ),
        "anchor": FakeNetwork({"latents": spec(1, *SHAPE), "present": spec(1)}, {"anchor": spec(3)}, _anchor),
    }


class OneEach(Artv):
    """The networks above have one anchor and one feature, which need no numbers."""

    @property
    def _anchor_names(self) -> tuple[str, ...]:
        return ("anchor",)

    @property
    def _feature_names(self) -> tuple[str, ...]:
        return ("feature",)


@pytest.fixture(autouse=True)
def unnumbered(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_anchor_names", "_feature_names"):
        monkeypatch.setattr(Artv, name, getattr(OneEach, name))


def engine(seconds: float | None = None) -> Any:
    made = networks()
    return FakeEngine(
        fake_bundle(made, LATENT), lambda: FakeExecutor(made, decode=decode, seconds=seconds), encode
    )


def stream(given: np.ndarray | None = None, **options: Any) -> Stream:
    changes = options.pop("method", {})
    count = 0 if given is None else len(given)
    settings = stream_settings(METHOD | changes, prompt="one", given_chunks=count, **options)
    return Stream(engine(), settings, given)


def frames(made: Stream, count: int) -> np.ndarray:
    return np.stack(list(islice(made, count)))


def test_a_stream_is_the_loop_written_out() -> None:
    """Frame by frame with numpy alone: DDIM on v, references and anchor of the clean latents of before."""
    with stream(seed=3) as made:
        frames(made, 4)
        got = made._state.store.window([0, 2, 3])
    abar = np.concatenate([[1.0], alphas_cumprod(0.00085, 0.012)])
    text = encode("one")["text"][:1]
    latents: list[np.ndarray] = []
    for frame in range(4):
        x = frame_noise(3, frame, SHAPE)
        present = np.array([float(frame > 0)], np.float32)
        newest = [latents[max(0, frame - back)] if frame else np.zeros_like(x) for back in (1, 2)]
        feature = _features(
            {"latents": np.stack(newest), "present": present, "masked": present, "augmentation": 0 * present},
            None,
        )["feature"]
        first = latents[0] if frame else np.zeros_like(x)
        anchor = _anchor({"latents": first[None], "present": present}, None)["anchor"]
        for level, then in ((1000, 667), (667, 333), (333, 0)):
            inputs = {
                "latents": np.stack([newest[0], x])[None],
                "level": np.array([[0, level / 1000]], np.float32),
                "condition": np.concatenate([present, 0 * present])[None],
                "text": text[:, None],
                "anchor": anchor[None],
                "feature": feature[None],
            }
            v = _denoise(inputs, None)["prediction"][0, 0, 1]
            a, s = abar[level] ** 0.5, (1 - abar[level]) ** 0.5
            clean, noise = a * x - s * v, s * x + a * v
            x = (abar[then] ** 0.5 * clean + (1 - abar[then]) ** 0.5 * noise).astype(np.float32)
        latents.append(x)
    assert np.allclose(got, np.stack([latents[0], latents[2], latents[3]]), rtol=0, atol=1e-5)


def test_a_short_video_is_the_head_of_a_longer_one() -> None:
    with stream(seed=1, frames=5, chunks=5) as short, stream(seed=1) as long:
        assert np.array_equal(frames(short, 5), frames(long, 9)[:5])


@pytest.mark.parametrize("taken", [0, 1, 2, 5])
@pytest.mark.parametrize("augmentation", [0, 60])
def test_a_resumed_stream_goes_on_to_the_bit(taken: int, augmentation: int) -> None:
    with stream(seed=2, guidance=2.0, method={"augmentation": augmentation}) as made:
        frames(made, taken) if taken else None
        saved = made.snapshot()
        with Stream.restore(engine(), saved) as resumed:
            for each in (made, resumed):
                frames(each, 2)
                each.prompt = "two"
            assert np.array_equal(frames(made, 6), frames(resumed, 6))


@pytest.mark.parametrize("count", [1, 2])
def test_a_video_goes_on_from_given_frames(count: int) -> None:
    """Those stay as they are, the first of them is the anchor, and callers get what comes behind them."""
    given = np.random.default_rng(0).standard_normal((count, *SHAPE)).astype(np.float32)
    with stream(given, seed=1) as made:
        first = frames(made, 3)
        assert np.array_equal(made._state.store.window([0]), given[:1])
        anchor = made._state.kept["anchor"]
    assert np.allclose(anchor, given[0].mean((1, 2)))
    with stream(2 * given, seed=1) as other:
        assert not np.array_equal(frames(other, 3), first)


def test_noise_on_references_is_the_frames_own() -> None:
    """The adapter sees them noised, the mask copies them clean, and two streams of one seed see the same noise."""
    with stream(seed=1, method={"augmentation": 60}) as one, stream(seed=1) as clean:
        noised = frames(one, 5)
        assert not np.array_equal(noised, frames(clean, 5))
    with stream(seed=1, method={"augmentation": 60}) as again:
        assert np.array_equal(frames(again, 5), noised)


def test_mask_and_anchor_can_be_left_out() -> None:
    """Without its mask the network sees a condition of 0, without its anchor one of zeros, of all frames."""
    with stream(seed=1) as whole:
        first = frames(whole, 4)
    for changes in ({"mask": False}, {"anchor": False}):
        with stream(seed=1, method=changes) as made:
            other = frames(made, 4)
            assert np.array_equal(other[0], first[0])
            assert not np.array_equal(other[2:], first[2:])
            kept = made._state.kept
            assert bool(kept["condition"][0]) == ("mask" not in changes)
            assert bool(kept["anchor"].any()) == ("anchor" not in changes)


def test_memory_is_flat() -> None:
    with stream(seed=1) as made:
        sizes = set()
        for _ in range(30):
            frames(made, 1)
            state = made._state
            kept = sum(value.nbytes for value in state.kept.values())
            sizes.add((len(state.store.clean), kept, len(state.scales), len(state._calls)))
    assert len(sizes) <= 3  # of the first frames, and from then on
    with stream(seed=1) as longer:
        frames(longer, 60)
        state = longer._state
        kept = sum(value.nbytes for value in state.kept.values())
        assert (len(state.store.clean), kept, len(state.scales), len(state._calls)) in sizes


def test_streams_that_share_calls_are_what_they_are_alone() -> None:
    made = networks()
    executor: Any = FakeExecutor(made, decode=decode)
    driver = Driver(executor, fake_bundle(made, LATENT), (1, 2, 4))
    states = []
    for seed in range(3):
        state = open_stream(driver, LATENT, stream_settings(METHOD, seed=seed, chunks=4, frames=4))
        state.text = encode(str(seed))
        states.append(state)
    for _ in range(4 * (STEPS + 2)):
        driver.step(states)
    shared = [np.stack([np.asarray(clip.result()) for clip in state.clips]) for state in states]
    assert max(variant.symbols.get("streams", 1) for variant, _ in executor.calls) == 4
    for seed, got in enumerate(shared):
        alone_driver = Driver(FakeExecutor(made, decode=decode), fake_bundle(made, LATENT))  # type: ignore[arg-type]
        state = open_stream(alone_driver, LATENT, stream_settings(METHOD, seed=seed, chunks=4, frames=4))
        state.text = encode(str(seed))
        for _ in range(4 * (STEPS + 2)):
            alone_driver.step([state])
        assert np.array_equal(got, np.stack([np.asarray(clip.result()) for clip in state.clips]))
