"""Loaded variants: each in memory once, a lock per variant, eviction by a budget."""

from __future__ import annotations

import gc
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy_family as toy

from pyengine.backends.openvino import OpenVINO
from pyengine.build.library import VariantLibrary
from pyengine.build.progress import Progress
from pyengine.bundle.variant import Variant
from pyengine.errors import ConfigError, PlanError, StreamClosed
from pyengine.once import Once
from pyengine.options import EngineOptions
from pyengine.runtime.program import Program

ALONE = toy.DENOISER.sized(streams=1)
VARIANTS = (ALONE, toy.DECODER, toy.TEXT_ENCODER)
SOON = 60  # seconds after which a test that waits for an event has failed


class CountingBackend(OpenVINO):
    """Counts what is compiled and loaded, and holds compilations of some graphs up until it is told to go on."""

    def __init__(self) -> None:
        super().__init__()
        self.made: Counter[str] = Counter()
        self.held: dict[str, threading.Event] = {}  # start of a graph's name -> go on
        self.waiting = threading.Event()
        self.refuses = ""

    def compile(self, model: Path, *arguments: Any) -> Any:
        for name, go_on in self.held.items():
            if model.name.startswith(name):
                self.waiting.set()
                assert go_on.wait(SOON)
        self.made[f"compiled {model.name}"] += 1
        if self.refuses and model.name.startswith(self.refuses):
            raise PlanError(f"cannot compile {model.name}")
        return super().compile(model, *arguments)

    def load(self, path: Path, *arguments: Any) -> Any:
        self.made[f"loaded {path.parent.name}/{path.name}"] += 1
        return super().load(path, *arguments)


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> CountingBackend:
    counting = CountingBackend()
    monkeypatch.setattr("pyengine.backends.openvino.backend", lambda: counting)
    return counting


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plans of all variants."""
    folder = tmp_path_factory.mktemp("plans")
    library(folder).program(VARIANTS)
    return folder


def library(
    cache: Path,
    *,
    progress: Progress | None = None,
    relieve: Callable[[], object] | None = None,
    **options: Any,
) -> VariantLibrary:
    given = EngineOptions(**{"cache_dir": cache, "choice": "cut", **options})
    return VariantLibrary(toy.bundle(), given, progress=progress, relieve=relieve)


def engines(program: Program) -> dict[Variant, list[int]]:
    return {variant: [id(engine) for engine in program.engines(variant)] for variant in program.variants}


def one_at_a_time(backend: CountingBackend) -> bool:
    return bool(backend.made) and set(backend.made.values()) == {1}


@pytest.mark.parametrize("built", [False, True])
def test_threads_that_start_at_once_share_what_is_loaded(
    backend: CountingBackend, cache: Path, tmp_path: Path, built: bool
) -> None:
    shared, ready = library(cache if built else tmp_path), threading.Barrier(8)
    sets = [VARIANTS, VARIANTS[:2], VARIANTS[1:], (toy.DECODER,)] * 2

    def start(variants: tuple[Variant, ...]) -> Program:
        ready.wait()
        return shared.program(variants)

    with ThreadPoolExecutor(8) as pool:
        programs = list(pool.map(start, sets))
    assert one_at_a_time(backend)
    whole = engines(programs[0])
    assert all(engines(program).items() <= whole.items() for program in programs)
    assert [program.variants for program in programs] == sets


def test_a_variant_that_was_cut_is_the_one_that_must_be(
    backend: CountingBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyengine.build.builder.time_choices", lambda *_: {"cut": 1.0, "inline": 2.0})
    shared = library(tmp_path, choice="auto")
    chosen = shared.program([ALONE])
    assert engines(shared.program([ALONE], choice="cut")) == engines(chosen)
    assert engines(shared.program([ALONE], choice="inline")) != engines(chosen)
    assert len(shared.loaded) == 2


def test_a_slow_build_holds_up_only_those_who_want_it(
    backend: CountingBackend, cache: Path, tmp_path: Path
) -> None:
    shared = library(tmp_path)
    text = shared.program([toy.TEXT_ENCODER]).executor()
    go_on = backend.held["denoiser"] = threading.Event()
    with ThreadPoolExecutor(3) as pool:
        slow = [pool.submit(shared.program, [ALONE, toy.TEXT_ENCODER]) for _ in range(2)]
        assert backend.waiting.wait(SOON)
        # Another variant is built, a loaded one is had, run and let go of, all while the first is being built.
        other = pool.submit(shared.program, [toy.DECODER, toy.TEXT_ENCODER]).result(SOON)
        assert engines(other)[toy.TEXT_ENCODER] == engines(text.program)[toy.TEXT_ENCODER]
        text.run(toy.TEXT_ENCODER)
        text.close()
        assert not any(future.done() for future in slow)
        go_on.set()
        first, second = (future.result(SOON) for future in slow)
    assert engines(first) == engines(second)
    assert one_at_a_time(backend)


def test_a_failure_goes_to_all_who_wait_and_is_not_kept(backend: CountingBackend, tmp_path: Path) -> None:
    shared, go_on = library(tmp_path), threading.Event()
    backend.held["decoder"], backend.refuses = go_on, "decoder"
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(shared.program, [toy.DECODER]) for _ in range(2)]
        assert backend.waiting.wait(SOON)
        go_on.set()
        for future in waiting:
            with pytest.raises(PlanError, match="cannot compile decoder"):
                future.result(SOON)
    backend.refuses = ""
    assert shared.program([toy.DECODER]).variants == (toy.DECODER,)
    assert not list(tmp_path.glob("*/.*"))


def test_progress_counts_everything_that_is_built(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    shared = library(tmp_path, progress=lambda done, total, what: calls.append((done, total)))
    shared.program(VARIANTS)
    engines = 4 + 1 + 1  # segments of denoiser, decoder and text encoder
    assert calls == [(done + 1, engines) for done in range(engines)]
    shared.program(VARIANTS)
    assert len(calls) == engines


def test_without_a_budget_everything_stays(backend: CountingBackend, cache: Path) -> None:
    shared = library(cache)
    for _ in range(2):
        for variant in VARIANTS:
            shared.program([variant])
    assert set(shared.loaded) == set(VARIANTS)
    assert one_at_a_time(backend)


def test_the_least_recently_used_goes_first_and_what_is_in_use_stays(
    backend: CountingBackend, cache: Path
) -> None:
    sizes = {}
    for variant in VARIANTS:
        alone = library(cache)
        alone.program([variant])
        sizes[variant] = alone.nbytes
    assert all(size > 0 for size in sizes.values())
    shared = library(cache, memory_budget=sum(sizes.values()) - 1)
    for variant in VARIANTS:
        shared.program([variant])
    assert shared.loaded == [toy.DECODER, toy.TEXT_ENCODER]
    shared.program([toy.DECODER])
    assert shared.loaded == [toy.TEXT_ENCODER, toy.DECODER]
    used = shared.program([toy.TEXT_ENCODER])
    shared.program([toy.DECODER])
    backend.made.clear()
    shared.program([ALONE])
    assert shared.loaded == [toy.TEXT_ENCODER, ALONE]  # the decoder went, although the text encoder is older
    assert engines(used) == engines(shared.program([toy.TEXT_ENCODER]))
    assert one_at_a_time(backend)


def test_buffers_count_and_an_executor_that_is_closed_lets_go(cache: Path) -> None:
    shared = library(cache, memory_budget=0)
    executor = shared.program([toy.DECODER]).executor()
    assert shared.loaded == [toy.DECODER]
    assert shared.nbytes >= executor.nbytes > 0
    executor.close()
    assert not shared.loaded
    assert shared.nbytes == 0
    with pytest.raises(PlanError, match="has no variant"):
        executor.run(toy.DECODER)
    dropped = shared.program([toy.DECODER]).executor()
    del dropped  # never closed
    gc.collect()
    assert not shared.loaded


def test_what_was_evicted_is_loaded_again_and_runs_as_before(cache: Path) -> None:
    shared, results = library(cache, memory_budget=0), []
    for _ in range(2):
        executor = shared.program([toy.TEXT_ENCODER]).executor()
        executor.input(toy.TEXT_ENCODER, "token_ids")[...] = np.arange(toy.TOKENS)
        executor.run(toy.TEXT_ENCODER)
        outputs = toy.bundle().component("text_encoder").outputs
        results.append([executor.output(toy.TEXT_ENCODER, name).copy() for name in outputs])
        executor.close()
    assert all(np.array_equal(*pair) for pair in zip(*results, strict=True))


def test_reserves_are_given_up_where_the_budget_is_passed(cache: Path) -> None:
    reserve: list[Any] = []

    def relieve() -> None:
        while reserve:
            reserve.pop().close()

    shared = library(cache, memory_budget=0, relieve=relieve)
    reserve.append(shared.program([toy.TEXT_ENCODER]).executor())
    executor = shared.program([toy.DECODER]).executor()
    assert shared.loaded == [toy.DECODER]
    executor.close()
    assert not shared.loaded


@pytest.mark.parametrize("budget", [-1, 1.5, True, "1 GB"])
def test_a_budget_that_is_none_is_refused(cache: Path, budget: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"\[memory_budget\] expected a whole number of at least 0 or none but got"
    ):
        library(cache, memory_budget=budget)


def test_a_closed_library_refuses_and_leaves_programs_running(
    backend: CountingBackend, tmp_path: Path
) -> None:
    shared = library(tmp_path)
    executor = shared.program([toy.DECODER]).executor()
    go_on = backend.held["text_encoder"] = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        late = pool.submit(shared.program, [toy.TEXT_ENCODER])
        assert backend.waiting.wait(SOON)
        shared.close()
        shared.close()
        go_on.set()
        with pytest.raises(StreamClosed, match="the engine is closed; load another"):
            late.result(SOON)
    with pytest.raises(StreamClosed):
        shared.program([toy.DECODER])
    assert not shared.loaded
    executor.run(toy.DECODER)
    executor.close()


def test_another_makes_what_an_interrupted_thread_did_not() -> None:
    once: Once[str, int] = Once()
    started, go_on = threading.Event(), threading.Event()

    def interrupted() -> int:
        started.set()
        assert go_on.wait(SOON)
        raise KeyboardInterrupt

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(once.get, "key", interrupted)
        assert started.wait(SOON)
        second = pool.submit(once.get, "key", lambda: 7)
        go_on.set()
        assert second.result(SOON) == 7
        with pytest.raises(KeyboardInterrupt):
            first.result(SOON)


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    """Programs of one test are gone before the next one counts."""
    yield
    gc.collect()
