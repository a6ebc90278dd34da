"""The text encoder of an engine: each prompt once, no prompt behind a queue, everything given back."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from pyengine.bundle.variant import Variant
from pyengine.errors import PromptError
from pyengine.runtime.prompt_encoder import EXECUTORS, KEPT, PromptEncoder

TEXT = Variant.of("text_encoder")
SOON = 60


class Encoder:
    """Executors whose output is twice their input; they may be held up."""

    def __init__(self) -> None:
        self.opened = self.closed = self.runs = 0
        self.inside = threading.Semaphore(0)  # released by every run that has begun
        self.go_on = threading.Event()
        self.go_on.set()
        self._lock = threading.Lock()

    def executor(self) -> Any:
        with self._lock:
            self.opened += 1
        return Executor(self)

    def run(self) -> None:
        with self._lock:
            self.runs += 1
        self.inside.release()
        assert self.go_on.wait(SOON)


class Executor:
    def __init__(self, owner: Encoder) -> None:
        self._owner, self._array = owner, np.zeros(1)

    def input(self, variant: Variant, name: str) -> np.ndarray:
        return self._array

    def output(self, variant: Variant, name: str) -> np.ndarray:
        return self._array * 2

    def run(self, variant: Variant) -> None:
        self._owner.run()

    def close(self) -> None:
        self._owner.closed += 1


def inputs(prompt: str) -> dict[str, np.ndarray]:
    if not prompt:
        raise PromptError("expected a prompt")
    return {"ids": np.array([float(prompt)])}


@pytest.fixture
def encoder() -> Encoder:
    return Encoder()


@pytest.fixture
def prompts(encoder: Encoder) -> PromptEncoder:
    return PromptEncoder(TEXT, {"features": None}, inputs, lambda: encoder)  # type: ignore[arg-type,return-value]


def test_a_prompt_in_many_streams_is_encoded_once(encoder: Encoder, prompts: PromptEncoder) -> None:
    ready = threading.Barrier(8)

    def ask(_: int) -> float:
        ready.wait()
        return float(prompts.features("3")["features"][0])

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(8))) == [6.0] * 8
    assert encoder.runs == 1


def test_features_cannot_be_changed_by_who_has_them(prompts: PromptEncoder) -> None:
    features = prompts.features("3")
    with pytest.raises(ValueError, match="read-only"):
        features["features"][...] = 0
    features.clear()
    assert prompts.features("3")["features"] == 6


def test_prompts_do_not_queue_behind_one_that_is_slow(encoder: Encoder, prompts: PromptEncoder) -> None:
    prompts.features("1")
    assert encoder.inside.acquire(timeout=SOON)
    encoder.go_on.clear()
    with ThreadPoolExecutor(EXECUTORS) as pool:
        both = [pool.submit(prompts.features, str(number)) for number in range(2, 2 + EXECUTORS)]
        for _ in both:
            assert encoder.inside.acquire(timeout=SOON)  # all of them are at work at the same time
        assert prompts.features("1")["features"] == 2  # what is known waits for nobody
        encoder.go_on.set()
        assert [future.result(SOON)["features"] for future in both] == [4, 6]
    assert encoder.opened == EXECUTORS


def test_the_last_prompts_are_kept(encoder: Encoder, prompts: PromptEncoder) -> None:
    for number in range(KEPT + 1):
        prompts.features(str(number))
        prompts.features("0")
    assert encoder.runs == KEPT + 1
    prompts.features("1")  # the oldest that nobody asked for again
    assert encoder.runs == KEPT + 2
    assert encoder.opened == 1


def test_a_bad_prompt_is_refused_and_not_kept(encoder: Encoder, prompts: PromptEncoder) -> None:
    for _ in range(2):
        with pytest.raises(PromptError):
            prompts.features("")
    assert encoder.opened == 0


def test_closing_closes_an_executor_that_is_at_work_when_it_is_done(
    encoder: Encoder, prompts: PromptEncoder
) -> None:
    encoder.go_on.clear()
    with ThreadPoolExecutor(1) as pool:
        late = pool.submit(prompts.features, "4")
        assert encoder.inside.acquire(timeout=SOON)
        prompts.close()
        assert encoder.closed == 0
        encoder.go_on.set()
        assert late.result(SOON)["features"] == 8
    assert encoder.closed == encoder.opened == 1


def test_executors_in_reserve_are_given_up(encoder: Encoder, prompts: PromptEncoder) -> None:
    prompts.features("1")
    prompts.release()
    assert encoder.closed == 1
    prompts.features("1")
    prompts.features("2")
    assert encoder.opened == 2
