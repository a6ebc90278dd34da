"""The engine as a service uses it: shared networks, builds that hold nobody up, and closing that gives everything back."""

from __future__ import annotations

import gc
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

import pyengine
from pyengine.backends.openvino import OpenVINO
from pyengine.errors import StreamClosed
from pyengine.measure.probe import memory_mb

PROMPT = "a red circle bounces over a blue background"
OTHER = "a green star orbits over a grey background"
THIRD = "a yellow circle bounces over a grey background"
SOON = 120


def load(plan_cache: Path, **options: Any) -> pyengine.Engine:
    return pyengine.load("shapes", cache_dir=plan_cache, choice="cut", **options)


def test_streams_of_another_guidance_share_decoder_and_text_encoder(plan_cache: Path) -> None:
    with load(plan_cache) as engine:
        before = set(engine._library.loaded)
        with engine.stream(PROMPT, guidance=1.0) as stream:
            next(stream)
            new = set(engine._library.loaded) - before
            assert {variant.component for variant in new} <= {"denoiser"}
        with engine.stream(PROMPT, method={"steps": 8, "cadence": 2}) as stream:
            next(stream)
            assert {variant.component for variant in set(engine._library.loaded) - before} <= {"denoiser"}
        assert len(engine.plans[0].parts) == len(engine._library.loaded)


def test_a_stream_goes_on_while_another_ones_network_is_built(
    plan_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = OpenVINO()
    building, go_on, compile_ = threading.Event(), threading.Event(), held.compile
    slow = False

    def wait_to_compile(*arguments: Any) -> Any:
        if slow:
            building.set()
            assert go_on.wait(SOON)
        return compile_(*arguments)

    monkeypatch.setattr(held, "compile", wait_to_compile)
    monkeypatch.setattr("pyengine.backends.openvino.backend", lambda: held)
    with load(tmp_path) as engine, engine.stream(PROMPT, seed=1) as stream, ThreadPoolExecutor(1) as pool:
        list(islice(stream, 3))
        slow = True
        other = pool.submit(
            engine.stream, PROMPT, method={"chunk_frames": 1, "cadence": 2, "row_counts": (8, 10)}
        )
        assert building.wait(SOON)
        stream.prompt = OTHER  # encoded just now
        list(islice(stream, 9))
        with engine.stream(THIRD, seed=2, frames=1) as another:
            assert len(list(another)) == 1
        assert engine.plans[0].parts
        assert not other.done()
        go_on.set()
        with other.result(SOON) as late:
            next(late)


def test_a_budget_drops_what_no_stream_uses(plan_cache: Path) -> None:
    with load(plan_cache, memory_budget=0) as engine:
        assert not engine._library.loaded
        with engine.stream(PROMPT, seed=1) as stream:
            first = list(islice(stream, 9))
            held = engine.nbytes
            assert held > 0
            assert {variant.component for variant in engine._library.loaded} == {"denoiser", "decoder"}
            stream.prompt = OTHER
            next(stream)
        assert engine.nbytes == 0
        with engine.stream(PROMPT, seed=1) as stream:
            assert all((a == b).all() for a, b in zip(first, islice(stream, 9), strict=True))


def test_the_budget_is_checked(plan_cache: Path) -> None:
    with pytest.raises(
        pyengine.ConfigError, match=r"\[memory_budget\] expected a whole number of at least 0"
    ):
        load(plan_cache, memory_budget=-1)


def test_closing_closes_streams_and_batches(plan_cache: Path) -> None:
    engine = load(plan_cache)
    stream, batch = engine.stream(PROMPT), engine.batch(2)
    member = batch.stream(OTHER)
    next(stream)
    next(member)
    snapshot = stream.snapshot()
    engine.close()
    engine.close()
    for ask in (
        lambda: next(stream),
        lambda: next(stream.clips()),
        lambda: stream.snapshot(),
        lambda: next(member),
        lambda: batch.stream(PROMPT),
    ):
        with pytest.raises(StreamClosed, match="closed"):
            ask()
    with pytest.raises(StreamClosed, match="closed"):
        stream.prompt = OTHER
    for refused in (lambda: engine.stream(PROMPT), lambda: engine.batch(2), lambda: engine.resume(snapshot)):
        with pytest.raises(StreamClosed, match=r"the engine is closed; load another with pyengine\.load"):
            refused()
    stream.close()
    assert engine.nbytes == 0


def test_closing_from_another_thread_ends_streams_between_frames(plan_cache: Path) -> None:
    engine = load(plan_cache)
    going = [threading.Event() for _ in range(2)]

    def watch(number: int) -> int:
        stream, seen = engine.stream(PROMPT, seed=number), 0
        try:
            for frame in stream:
                assert frame.shape == (64, 64, 3)
                seen += 1
                going[number].set()
        except StreamClosed:
            return seen
        raise AssertionError("an endless stream ended")

    with ThreadPoolExecutor(2) as pool:
        watching = [pool.submit(watch, number) for number in range(2)]
        assert all(event.wait(SOON) for event in going)
        engine.close()
        assert all(future.result(SOON) > 0 for future in watching)
    assert engine.nbytes == 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_closed_engine_has_given_everything_back(plan_cache: Path) -> None:
    kept = []
    for _ in range(4):
        with load(plan_cache) as engine, engine.stream(PROMPT) as one, engine.stream(OTHER) as two:
            for _ in range(9):
                next(one), next(two)
            loaded = memory_mb()
        del engine, one, two
        gc.collect()
        kept.append((len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), memory_mb()))
    files, threads, memory = zip(*kept[1:], strict=True)
    assert len(set(files)) == 1
    assert len(set(threads)) == 1
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("pyengine")]
    assert max(memory) - min(memory) < 12  # MB; an engine takes 200
    assert loaded - memory[-1] > 60
