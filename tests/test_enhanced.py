"""A stream of two stages, as callers hold it: fake networks of StreamingT2V, and a fake enhancer behind them."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from types import SimpleNamespace
from typing import Any

import fake_streamingt2v
import numpy as np
import pytest
from fake_enhancer import enhancer
from fake_methods import LATENT, encode
from fake_network import (
    Arrays,
    FakeEngine,
    FakeExecutor,
    FakeNetwork,
    fake_bundle,
    finish,
    open_state,
    stream_settings,
)

from pyengine.errors import ConfigError, InputError, PromptError
from pyengine.methods import StreamingT2VSettings, method_settings
from pyengine.methods.enhancement import Enhancement
from pyengine.schedule.wavefront import Wavefront
from pyengine.streaming import snapshot
from pyengine.streaming.driver import Driver
from pyengine.streaming.enhanced import EnhancedStream
from pyengine.streaming.stream import Stream

STEPS, CHUNK, OVERLAP = 3, 5, 2
SECOND: dict[str, Any] = {
    "suffix": "!",
    "steps": STEPS, "levels": 600, "guidance": 7.5, "rescale": 0.2, "clip_frames": CHUNK, "overlap": OVERLAP, "latent": [2, 2],
}  # fmt: skip
METHOD = fake_streamingt2v.METHOD | {"enhancer": SECOND, "enhance": True}
AHEAD = (STEPS - 1) * (CHUNK - OVERLAP) + CHUNK  # frames of the first stage when the first chunk leaves


class Stage:
    """What a stream needs of a SecondStage. Frames of 2x2 pixels are latents of 2x2."""

    def __init__(self, networks: Mapping[str, FakeNetwork]) -> None:
        self.networks = networks
        self.bundle = fake_bundle(networks, LATENT)
        self.executors: list[FakeExecutor] = []
        self.read: dict[str, Arrays] = {}

    def features(self, prompt: str) -> Arrays:
        assert prompt.endswith("!")
        if prompt == "bad!":
            raise PromptError("the prompt 'bad' is bad")
        if prompt not in self.read:
            self.read[prompt] = {"text": 0.1 * encode(prompt)["text"]}
        return dict(self.read[prompt])

    def program(self, schedule: Enhancement) -> Any:
        def executor() -> FakeExecutor:
            self.executors.append(FakeExecutor(self.networks, decode=fake_streamingt2v.plain))
            return self.executors[-1]

        return SimpleNamespace(executor=executor)

    def latents(self, executor: Any, frames: np.ndarray) -> np.ndarray:
        return np.moveaxis(frames, -1, 1).astype(np.float32) / 64 - 2


class Engine(FakeEngine):
    def __init__(self) -> None:
        networks = fake_streamingt2v.networks()
        bundle = fake_bundle(networks, LATENT)
        super().__init__(bundle, lambda: FakeExecutor(networks, decode=fake_streamingt2v.plain), encode)
        self.stage = Stage({"enhancer": enhancer(CHUNK, (LATENT.channels, LATENT.height, LATENT.width))})

    def second_stage(self) -> Stage:
        return self.stage

    def check_prompt(self, prompt: str) -> None:
        self.stage.features(f"{prompt}!")

    def restored_settings(self, saved: Mapping[str, Any]) -> dict[str, Any]:
        """As the real one, of lists as JSON has them."""
        return {**saved, "method": {**saved["method"]}}


def options(frames: int | None = None, seed: int = 3, **changes: Any) -> dict[str, Any]:
    chunks = None if frames is None else -(-frames // 2)
    return stream_settings(
        METHOD | changes,
        prompt="one",
        frames=frames,
        chunks=chunks,
        guidance=7.5,
        seed=seed,
        device_frames=False,
    )


def opened(engine: Any, frames: int | None = None, **changes: Any) -> EnhancedStream:
    return EnhancedStream(engine, options(frames, **changes))


def whole(frames: int, **changes: Any) -> np.ndarray:
    with opened(Engine(), frames, **changes) as stream:
        return np.stack(list(stream))


def test_frames_are_those_of_the_second_stage_on_the_frames_of_the_first() -> None:
    engine: Any = Engine()
    plain = {**options(14), "method": METHOD | {"enhance": False}}
    with Stream(engine, plain) as first:
        source = np.stack(list(first))
    # 5 + 3 n frames are whole chunks: 14 are, so nothing is cut.
    with opened(engine, 14) as stream:
        made = np.stack(list(stream))
        assert stream.ended
    assert made.shape == source.shape
    settings = method_settings(METHOD)
    assert isinstance(settings, StreamingT2VSettings)
    assert settings.enhancer is not None
    schedule = Enhancement(settings.enhancer, 4, 3)
    stage = engine.stage
    executor: Any = FakeExecutor(stage.networks, decode=fake_streamingt2v.plain)
    driver = Driver(executor, stage.bundle)
    given = stream_settings({}, seed=3, guidance=7.5)
    state = open_state(driver, schedule, schedule.sampler, given, {}, executor.codec(), LATENT)
    state.text = stage.features("one!")
    for frame, latent in enumerate(stage.latents(None, source)):
        state.store.give(frame, latent)
    assert np.array_equal(np.concatenate(finish(driver, state)), made)


@pytest.mark.parametrize("frames", [1, 5, 6, 13, 14])
def test_a_video_is_completed_and_cut(frames: int) -> None:
    made = whole(frames)
    assert len(made) == frames
    covered = 5 + 3 * -(-max(0, frames - 5) // 3)
    assert np.array_equal(made, whole(covered)[:frames])


def test_enhanced_frames_leave_while_later_ones_do_not_exist() -> None:
    with opened(Engine()) as stream:
        ahead = []
        for _ in range(60):
            next(stream)
            ahead.append(stream._source.frames_made - stream.frames_made)
    # When the first of the three frames of a chunk leaves: those in flight, one call more (LOOKAHEAD), and what made a clip of two whole.
    assert max(ahead) <= AHEAD + (CHUNK - OVERLAP) + 1
    assert max(ahead[30:]) == max(ahead[3:30])


def test_memory_does_not_grow() -> None:
    with opened(Engine()) as stream:
        sizes = []
        for _ in range(30):
            list(islice(stream, 3))
            store: Any = stream._state.store
            sizes.append((len(store.clean), len(stream._prompts), len(stream._state._calls)))
        assert store.flight.shape[0] == stream._wave.places == 3 * AHEAD
    assert np.array_equal(np.max(sizes[5:15], 0), np.max(sizes[15:], 0))


@pytest.mark.parametrize("calls", range(0, 24, 2))
def test_a_snapshot_in_the_middle_of_a_wavefront_continues_to_the_bit(calls: int) -> None:
    expected = whole(14)
    engine: Any = Engine()
    with opened(engine, 14) as stream:
        stream._advance(calls)
        with EnhancedStream.restore(engine, stream.snapshot()) as resumed:
            assert np.array_equal(np.stack(list(resumed)), expected)
            assert resumed.calls_made == 18


@pytest.mark.parametrize("taken", [1, 4, 6])
def test_a_resumed_stream_answers_a_new_prompt_as_the_first_would_have(taken: int) -> None:
    engine: Any = Engine()
    with opened(engine) as stream:
        list(islice(stream, taken))
        stream.prompt = "two"
        list(islice(stream, 2))
        with EnhancedStream.restore(engine, stream.snapshot()) as resumed:
            assert resumed.prompt == "two"
            for each in (stream, resumed):
                list(islice(each, 3))
                each.prompt = "three"
            frames = [np.stack(list(islice(each, 30))) for each in (stream, resumed)]
    assert np.array_equal(frames[0], frames[1])
    with opened(engine) as stream:
        assert not np.array_equal(np.stack(list(islice(stream, taken + 35)))[-30:], frames[0])


def test_a_new_prompt_holds_for_the_chunks_of_the_frames_that_it_made() -> None:
    engine: Any = Engine()
    with opened(engine) as stream:
        next(stream)
        since = stream._given
        stream.prompt = "two"
        list(islice(stream, 20))
    runs = [given for _, given in engine.stage.executors[-1].calls]
    ones, twos = (engine.stage.read[prompt]["text"] for prompt in ("one!", "two!"))
    said = [0 if np.array_equal(run["text"][:, 0], ones) else 1 for run in runs]
    assert all(
        np.array_equal(run["text"][:, 0], (ones, twos)[word]) for run, word in zip(runs, said, strict=True)
    )
    steps = list(islice(Wavefront(STEPS, CHUNK, OVERLAP, None, seed=3), len(runs)))
    assert said == [int(at.frames[CHUNK // 2] >= since) for at in steps]
    assert 0 < sum(said) < len(said)


def test_a_bad_prompt_changes_nothing() -> None:
    engine: Any = Engine()
    with opened(engine, 14) as stream:
        first = np.stack(list(islice(stream, 3)))
        with pytest.raises(PromptError):
            stream.prompt = "bad"
        assert stream.prompt == stream._source.prompt == "one"
        assert np.array_equal(np.concatenate([first, np.stack(list(stream))]), whole(14))
    with pytest.raises(PromptError):
        EnhancedStream(engine, options(14) | {"prompt": "bad"})


def test_the_three_ways_give_three_videos() -> None:
    made = [
        whole(14, enhancer=SECOND | {"blending": name}) for name in ("randomized", "shared", "independent")
    ]
    assert not any(np.array_equal(made[a], made[b]) for a, b in ((0, 1), (0, 2), (1, 2)))


@pytest.mark.parametrize("change", [{"clip_frames": 4}, {"latent": [2, 3]}])
def test_sizes_that_were_not_exported_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"\[method.enhancer.\w+\] expected \[.*\], as exported, but got"):
        opened(Engine(), 14, enhancer=SECOND | change)


def test_closing_closes_both_stages() -> None:
    stream = opened(Engine(), 14)
    next(stream)
    source = stream._source
    stream.close()
    stream.close()
    assert source._executor is None
    assert stream._executor is None


def damaged(data: bytes, **changes: Any) -> bytes:
    """A snapshot whose header says something else, and whose digest fits that."""
    header = snapshot.read_header(data)
    arrays = snapshot.read_archive(data, max_bytes=2**30)
    arrays.pop("header")
    header.pop("digest")
    return snapshot.pack(header | changes, arrays)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"given": 3}, r"expected 'given' of the snapshot's header to be \d+"),
        ({"prompts": []}, "expected 'prompts' of the snapshot's header as a list but got"),
        ({"prompts": [[0, 3]]}, "expected frames and prompts in the snapshot's header"),
        ({"prompts": [[0, "bad"]]}, "prompts in the snapshot cannot be used"),
        ({"prompts": [[40, "one"]]}, "expected the prompt of every frame in flight"),
        ({"prompts": [[4, "one"], [2, "two"]]}, "expected 'prompts' of the snapshot's header in order"),
        ({"settings": options(20)}, "two stages belong together but they do not"),
    ],
)
def test_a_snapshot_that_does_not_fit_is_refused(changes: dict[str, Any], said: str) -> None:
    engine: Any = Engine()
    with opened(engine, 14) as stream:
        stream._advance(7)
        data = stream.snapshot()
    with pytest.raises(InputError, match=said):
        EnhancedStream.restore(engine, damaged(data, **changes))


def test_a_snapshot_without_its_first_stage_is_refused() -> None:
    engine: Any = Engine()
    with opened(engine, 14) as stream:
        data = stream.snapshot()
    lone = snapshot.pack(snapshot.read_header(data), {"window/call": np.array(0, np.int64)})
    with pytest.raises(InputError, match="expected a snapshot with the array 'source'"):
        EnhancedStream.restore(engine, lone)
