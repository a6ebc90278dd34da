"""A wavefront on a compiled network: on the CPU and on a simulated GPU, whose latents, noise and what the solver keeps stay there."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_cuda
import numpy as np
import pytest
import toy_enhancer as toy
from fake_network import finish, stream_settings

from pyengine.build.builder import build
from pyengine.build.variants import codec_variants, denoiser_variants
from pyengine.bundle.bundle import Bundle
from pyengine.device import cuda as runtime
from pyengine.methods.enhancement import Enhancement, EnhancerSettings
from pyengine.runtime.open import load_program
from pyengine.streaming.driver import Driver
from pyengine.streaming.state import StreamState
from pyengine.streaming.stream import open_state

pytestmark = pytest.mark.slow

CHUNKS = 4
OVERLAPS = pytest.mark.parametrize(("overlap", "guidance"), [(2, 7.5), (3, 7.5), (2, 1.0)])


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return toy.export(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def gpu() -> Iterator[fake_cuda.FakeCuda]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield fake_cuda.install(monkeypatch)
        gc.collect()
    runtime.runtime.cache_clear()


class Run:
    """A stream on a backend, given all its latents."""

    def __init__(self, bundle: Bundle, cache: Path, backend: str, schedule: Enhancement) -> None:
        guidance = schedule.settings.guidance
        variants = (*denoiser_variants(schedule, guidance), *codec_variants(bundle, schedule))
        options: dict[str, Any] = {
            "backend": backend,
            "precision": "fp32",
            "choice": "cut",
            "cache_dir": cache,
        }
        self.executor = load_program(build(bundle, variants=variants, **options)).executor()
        self.driver = Driver(self.executor, bundle)
        self.bundle, self.schedule = bundle, schedule

    def opened(self) -> StreamState:
        schedule, settings = (
            self.schedule,
            stream_settings({}, seed=5, guidance=self.schedule.settings.guidance),
        )
        state = open_state(
            self.driver, schedule, schedule.sampler, settings, {}, self.executor, self.bundle.latent
        )
        text = np.random.default_rng(1).standard_normal((2, 8)).astype(np.float32)
        state.text = {"text": text}
        assert schedule.wave.frames is not None
        given = np.random.default_rng(2).standard_normal((schedule.wave.frames, 4, 2, 2)).astype(np.float32)
        for frame, latent in enumerate(given):
            state.store.give(frame, latent)
        return state

    def frames(self, state: StreamState) -> np.ndarray:
        return np.concatenate([np.asarray(clip) for clip in finish(self.driver, state)])


@OVERLAPS
def test_the_simulated_gpu_gives_the_frames_of_the_cpu_to_the_bit(
    bundle: Bundle, tmp_path: Path, gpu: fake_cuda.FakeCuda, overlap: int, guidance: float
) -> None:
    settings = EnhancerSettings(**(toy.SETTINGS | {"overlap": overlap, "guidance": guidance}))  # type: ignore[arg-type]
    schedule = Enhancement(settings, CHUNKS, 3)
    cpu, cuda = (Run(bundle, tmp_path, backend, schedule) for backend in ("onnxruntime", "tensorrt"))
    expected = cpu.frames(cpu.opened())
    assert expected.std() > 10
    assert len(expected) == schedule.wave.frames
    assert np.array_equal(cuda.frames(cuda.opened()), expected)
    assert any("call with history" in name for name in cuda.executor.graphs)  # type: ignore[attr-defined]
    # From the middle of the wavefront, on the other device.
    for one, other in ((cpu, cuda), (cuda, cpu)):
        state, resumed = one.opened(), other.opened()
        for _ in range(7):
            one.driver.step([state])
        resumed.store.load_state(state.store.state())
        resumed.call = state.call
        rest = other.frames(resumed)
        assert np.array_equal(rest, expected[len(expected) - len(rest) :])
        assert len(rest) > 10


@OVERLAPS
def test_nothing_but_noise_crosses_to_the_gpu(
    bundle: Bundle, tmp_path: Path, gpu: fake_cuda.FakeCuda, overlap: int, guidance: float
) -> None:
    settings = EnhancerSettings(**(toy.SETTINGS | {"overlap": overlap, "guidance": guidance}))  # type: ignore[arg-type]
    schedule = Enhancement(settings, CHUNKS, 3)
    run = Run(bundle, tmp_path, "tensorrt", schedule)
    state = run.opened()
    made = 0
    while not state.ended:
        allocations, pageable = gpu.allocations, gpu.from_pageable
        run.driver.step([state])
        made += 1
        if made > 3 * schedule.wave.steps and made % schedule.wave.steps:
            assert gpu.from_pageable == pageable
            assert gpu.allocations == allocations, made
    run.frames(state)
