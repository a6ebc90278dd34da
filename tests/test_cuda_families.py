"""The other families on a simulated GPU in host memory: decoding frame by frame, windows of several sizes, two-level generation."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_cuda
import lvdm_family
import numpy as np
import opensora_family
import pytest
import wan_family

import pyengine
from pyengine.device import cuda as runtime
from pyengine.device.array import DeviceArray
from pyengine.schedule.call import Call
from pyengine.schedule.samplers import make_sampler
from pyengine.streaming.driver import Driver

pytestmark = pytest.mark.slow

PROMPT = "a red fox runs over snow"


@pytest.fixture(autouse=True, scope="module")
def gpu() -> Iterator[fake_cuda.FakeCuda]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield fake_cuda.install(monkeypatch)
        gc.collect()
    runtime.runtime.cache_clear()


@pytest.fixture(scope="module")
def opensora(tmp_path_factory: pytest.TempPathFactory) -> pyengine.Engine:
    cache = tmp_path_factory.mktemp("cuda")
    folder = opensora_family.bundle().folder
    return pyengine.load(folder, backend="tensorrt", precision="fp32", choice="cut", cache_dir=cache)


def whole(engine: pyengine.Engine, frames: int, **options: Any) -> np.ndarray:
    prompt = PROMPT if engine.bundle.family == "opensora" else ""
    with engine.stream(prompt, seed=5, frames=frames, **options) as stream:
        made = list(stream)
        assert all(isinstance(frame, DeviceArray) for frame in made) == options.get("device_frames", False)
        return np.stack([np.asarray(frame) for frame in made])


@pytest.mark.parametrize("device_frames", [False, True])
def test_opensora_decodes_frame_by_frame_on_the_gpu(
    opensora: pyengine.Engine, gpu: fake_cuda.FakeCuda, tmp_path: Path, device_frames: bool
) -> None:
    cpu = pyengine.load(opensora.bundle.folder, backend="onnxruntime", choice="cut", cache_dir=tmp_path)
    expected = whole(cpu, 51)
    assert expected.std() > 1
    np.testing.assert_array_equal(whole(opensora, 51, device_frames=device_frames), expected)
    with opensora.stream(PROMPT, seed=5, frames=51, device_frames=device_frames) as stream:
        for _ in range(18):  # the window is warm, and the second chunk is out
            next(stream)
        before = gpu.to_host
        for _ in range(33):
            next(stream)
        clips = 0 if device_frames else 1
        assert gpu.to_host - before == clips * 17 * expected[0].nbytes  # finished frames, and nothing else
        graphs = stream._open().graphs  # type: ignore[attr-defined]
    assert {graph.split(".")[0].split("/")[0] for graph in graphs} == {"denoiser", "decoder", "frame_decoder"}


def test_tiles_are_blended_on_the_host(tmp_path: Path) -> None:
    tiles = dataclasses.replace(opensora_family.OPTIONS, tile=(40, 40), decode_batch=4)
    folder = opensora_family.bundle(tiles).folder
    videos = []
    for backend in ("onnxruntime", "tensorrt"):
        engine = pyengine.load(folder, backend=backend, precision="fp32", choice="cut", cache_dir=tmp_path)
        videos.append(whole(engine, 34, device_frames=backend == "tensorrt"))
    np.testing.assert_array_equal(*videos)


@pytest.fixture(scope="module")
def two_levels(tmp_path_factory: pytest.TempPathFactory) -> list[pyengine.Engine]:
    """On the CPU and on the GPU."""
    cache, folder = tmp_path_factory.mktemp("two_levels"), lvdm_family.bundle().folder
    options: Any = {"precision": "fp32", "choice": "cut", "cache_dir": cache}
    return [pyengine.load(folder, backend=backend, **options) for backend in ("onnxruntime", "tensorrt")]


def test_two_levels_run_on_the_gpu(
    two_levels: list[pyengine.Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    videos, states, calls = [], [], []
    enqueue = fake_cuda.FakeKernels._enqueue

    def counted(self: fake_cuda.FakeKernels, name: str, *others: Any) -> None:
        calls.append(name)
        enqueue(self, name, *others)

    monkeypatch.setattr(fake_cuda.FakeKernels, "_enqueue", counted)
    for engine in two_levels:
        with engine.stream(frames=60, seed=5) as stream:
            made = [next(stream) for _ in range(30)]
            states.append(stream.snapshot())
            videos.append(np.stack([*made, *stream]))
    assert "relative_attention" in calls
    assert videos[0].std() > 1
    np.testing.assert_array_equal(*videos)
    for engine in two_levels:
        for state in states:  # of either device
            with engine.resume(state) as resumed:
                np.testing.assert_array_equal(np.stack(list(resumed)), videos[0][30:])


@pytest.mark.parametrize("calls", [1, 6, 8, 9, 12])
def test_two_levels_resume_within_a_clip(two_levels: list[pyengine.Engine], calls: int) -> None:
    """In the first prediction, in an interpolation, between two rounds, in a prediction with known keys, and at the end."""
    for engine in two_levels:
        with engine.stream(frames=60, seed=5) as stream:
            for _ in range(calls):
                stream._advance()
            state = stream.snapshot()
            expected = np.stack(list(stream))
        with engine.resume(state) as resumed:
            np.testing.assert_array_equal(np.stack(list(resumed)), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"guidance": 0.0},
        {"method": {"perturbation": None}},
        {"method": {"clips_per_round": 2}},
        {"method": {"behaviour": "released", "decode": "whole"}},
        {"method": {"eta": 0.0}},
        {"device_frames": True},
    ],
    ids=str,
)
def test_two_levels_in_all_their_forms(two_levels: list[pyengine.Engine], options: dict[str, Any]) -> None:
    cpu, gpu = two_levels
    same = {name: value for name, value in options.items() if name != "device_frames"}
    np.testing.assert_array_equal(whole(gpu, 100, **options), whole(cpu, 100, **same))


def test_two_levels_cross_the_host_as_frames_only(
    two_levels: list[pyengine.Engine], gpu: fake_cuda.FakeCuda
) -> None:
    with two_levels[1].stream(frames=200, seed=5) as stream:
        for _ in range(100):  # every network has run at every size
            next(stream)
        waiting = len(stream._rest) + sum(len(clip.result()) for clip in stream._state.clips)
        frame, captured = stream._video.height * stream._video.width * 3, gpu.graphs_made
        before, waited = gpu.to_host, gpu.from_pageable
        for _ in stream:
            pass
        crossed = (gpu.to_host - before) / frame
    assert gpu.from_pageable == waited
    assert gpu.graphs_made == captured
    assert crossed == int(crossed)
    # The last clip may be longer than what is left to show.
    assert 100 - waiting <= crossed < 100 - waiting + 24


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> list[pyengine.Engine]:
    """On the CPU and on the GPU."""
    cache, folder = tmp_path_factory.mktemp("wan"), wan_family.bundle().folder
    options: Any = {"precision": "fp32", "choice": "cut", "cache_dir": cache}
    return [pyengine.load(folder, backend=backend, **options) for backend in ("onnxruntime", "tensorrt")]


def test_causal_wan_runs_on_the_gpu(wan: list[pyengine.Engine]) -> None:
    """A first clip of 9 frames, a change of the prompt, a ring that rolls, and snapshots of either device."""
    videos, states = [], []
    method = {"visible_frames": 9, "sink_frames": 3, "recache": "kept"}
    for engine in wan:
        with engine.stream(PROMPT, frames=57, seed=5, method=method) as stream:
            made = [next(stream) for _ in range(33)]
            stream.prompt = "waves at night"
            made += [next(stream) for _ in range(3)]
            states.append(stream.snapshot())
            videos.append(np.stack([*made, *stream]))
    assert videos[0].std() > 1
    np.testing.assert_array_equal(*videos)
    for engine in wan:
        for state in states:
            with engine.resume(state) as resumed:
                np.testing.assert_array_equal(np.stack(list(resumed)), videos[0][36:])


@pytest.mark.parametrize("device_frames", [False, True])
def test_causal_wan_hands_out_what_belongs_to_the_video(
    wan: list[pyengine.Engine], device_frames: bool
) -> None:
    """The first three frames that the decoder makes are dropped on the GPU, too."""
    cpu, gpu = wan
    with gpu.stream(PROMPT, frames=21, seed=5, device_frames=device_frames) as stream:
        clips = [np.asarray(clip) for clip in stream.clips()]
    assert [len(clip) for clip in clips] == [9, 12]
    with cpu.stream(PROMPT, frames=21, seed=5) as stream:
        np.testing.assert_array_equal(np.concatenate(clips), np.stack(list(stream)))


def test_latents_are_noised_for_a_feature_network_wherever_they_lie() -> None:
    latents = np.random.default_rng(0).standard_normal((2, 3, 4, 4), np.float32)
    on_gpu = DeviceArray.zeros(latents.shape, "float32", runtime.runtime().stream())
    on_gpu[...] = latents
    driver: Any = SimpleNamespace(_frame_shape=latents.shape[1:])
    state: Any = SimpleNamespace(seed=7, sampler=make_sampler("euler"))
    call = Call(None, latents=(5, 6), latents_level=0.25, draw=3)
    host, gpu = (Driver._noised(driver, state, call, window) for window in (latents, on_gpu))
    assert np.array_equal(gpu, host)
    assert not np.array_equal(host, latents)
    np.testing.assert_array_equal(np.asarray(on_gpu), latents)
