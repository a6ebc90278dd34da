"""The other families on a card made of host memory: decoding frame by frame, windows of several sizes, two-level generation."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_cuda
import lvdm_family
import numpy as np
import opensora_family
import pytest

import pyengine
from pyengine.cuda import runtime
from pyengine.device_array import DeviceArray
from pyengine.errors import ConfigError

PROMPT = "a red fox runs over snow"


@pytest.fixture(autouse=True, scope="module")
def card() -> Iterator[fake_cuda.FakeCuda]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield fake_cuda.install(monkeypatch)
        gc.collect()
    runtime.runtime.cache_clear()


@pytest.fixture(scope="module")
def opensora(tmp_path_factory: pytest.TempPathFactory) -> pyengine.Engine:
    cache = tmp_path_factory.mktemp("cuda")
    folder = opensora_family.bundle().folder
    return pyengine.load(folder, backend="tensorrt", precision="fp32", choice="cut", cache_dir=cache)


def test_opensora_decodes_frame_by_frame_beside_the_denoiser(
    opensora: pyengine.Engine, tmp_path: Path
) -> None:
    cpu = pyengine.load(opensora.bundle.folder, backend="onnxruntime", choice="cut", cache_dir=tmp_path)
    videos = []
    for engine in (cpu, opensora):
        with engine.stream(PROMPT, seed=5, frames=51) as stream:
            videos.append(np.stack(list(stream)))
    assert videos[0].std() > 1
    np.testing.assert_array_equal(*videos)


def test_frames_in_parts_cannot_stay_on_the_card(opensora: pyengine.Engine) -> None:
    with pytest.raises(ConfigError, match="leave device_frames out"):
        opensora.stream(PROMPT, frames=17, device_frames=True)


def test_two_levels_run_on_the_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    videos, calls = [], []
    kernel = fake_cuda.FakeKernels.relative_attention

    def counted(self: fake_cuda.FakeKernels, *arrays: DeviceArray, **options: Any) -> None:
        calls.append(arrays)
        kernel(self, *arrays, **options)

    monkeypatch.setattr(fake_cuda.FakeKernels, "relative_attention", counted)
    for backend in ("onnxruntime", "tensorrt"):
        folder = lvdm_family.bundle().folder
        engine = pyengine.load(folder, backend=backend, precision="fp32", choice="cut", cache_dir=tmp_path)
        with engine.stream(frames=60, seed=5) as stream:
            made = [next(stream) for _ in range(30)]
            state = stream.snapshot()
            videos.append(np.stack([*made, *stream]))
        with engine.resume(state) as resumed:
            np.testing.assert_array_equal(np.stack(list(resumed)), videos[-1][30:])
    assert calls
    assert videos[0].std() > 1
    np.testing.assert_array_equal(*videos)
