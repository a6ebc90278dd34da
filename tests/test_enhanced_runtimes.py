"""Streams of two stages on compiled networks: on the CPU, and on a simulated GPU."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import fake_cuda
import numpy as np
import pytest
import streamingt2v_family
from PIL import Image

import pyengine
from pyengine.cli import main
from pyengine.device import cuda as runtime
from pyengine.errors import ConfigError, InputError
from pyengine.video.letterbox import letterboxed

pytestmark = pytest.mark.slow

OPTIONS: dict[str, Any] = {"precision": "fp32", "choice": "cut"}
ENHANCE: dict[str, Any] = {"method": {"enhance": True}}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("enhanced")


@pytest.fixture(scope="module")
def engine(cache: Path) -> Iterator[pyengine.Engine]:
    folder = streamingt2v_family.enhanced_bundle().folder
    with pyengine.load(folder, backend="onnxruntime", cache_dir=cache, **OPTIONS) as found:
        yield found


def start() -> np.ndarray:
    rows, columns = np.indices((128, 128))
    return np.stack([np.stack([rows + 40 * t, columns, rows + columns], -1) % 256 for t in range(2)]).astype(
        np.uint8
    )


def whole(engine: pyengine.Engine, frames: int, **options: Any) -> np.ndarray:
    with engine.stream("a red fox", seed=5, frames=frames, start=start(), **ENHANCE, **options) as stream:
        return np.stack([np.asarray(frame) for frame in stream])


def test_enhanced_frames_are_larger_and_differ_from_the_preview(engine: pyengine.Engine) -> None:
    made = whole(engine, 7)
    assert made.shape == (7, 80, 128, 3)
    assert made.std() > 1
    with engine.stream("a red fox", seed=5, frames=7, start=start()) as preview:
        assert np.stack(list(preview)).shape == (7, 128, 128, 3)
    assert any("enhancer" in str(part.folder) for plan in engine.plans for part in plan.parts.values())


def test_a_snapshot_of_both_stages_continues_to_the_bit(engine: pyengine.Engine) -> None:
    expected = whole(engine, 7)
    for taken in (0, 3):
        with engine.stream("a red fox", seed=5, frames=7, start=start(), **ENHANCE) as stream:
            head = list(islice(stream, taken))
            if not taken:
                stream._advance(4)
            with engine.resume(stream.snapshot()) as resumed:
                assert np.array_equal(np.stack([*head, *resumed]), expected)


def test_a_prompt_may_change_on_the_way(engine: pyengine.Engine) -> None:
    with engine.stream("a red fox", seed=5, frames=15, start=start(), **ENHANCE) as stream:
        first = [next(stream)]
        stream.prompt = "snow"
        with engine.resume(stream.snapshot()) as resumed:
            rest = np.stack(list(stream))
            assert np.array_equal(np.stack(list(resumed)), rest)
    assert not np.array_equal(np.stack([*first, *rest])[8:], whole(engine, 15)[8:])


def test_what_cannot_be_is_said(engine: pyengine.Engine, tmp_path: Path) -> None:
    with (
        pytest.raises(ConfigError, match="expected false for a batch, whose streams have one stage"),
        engine.batch(2, **ENHANCE),
    ):
        pass
    with engine.stream("a red fox", seed=5, frames=4, start=start(), **ENHANCE) as stream:
        data = stream.snapshot()
    with pytest.raises(InputError, match="expected"):
        engine.resume(data[:-200])
    plain = streamingt2v_family.streamed_bundle().folder
    with (
        pyengine.load(plain, backend="onnxruntime", cache_dir=tmp_path, **OPTIONS) as other,
        pytest.raises(ConfigError, match="this model has no second stage"),
    ):
        other.stream("a red fox", **ENHANCE)


def test_the_simulated_gpu_gives_the_same_to_the_bit(
    engine: pyengine.Engine, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Latents, what the solver keeps and frames stay there; streams of two chunks in flight, and a snapshot."""
    expected = whole(engine, 9)
    gpu = fake_cuda.install(monkeypatch)
    try:
        with pyengine.load(engine.bundle.folder, backend="tensorrt", cache_dir=cache, **OPTIONS) as other:
            assert np.array_equal(whole(other, 9), expected)
            assert np.array_equal(whole(other, 9, device_frames=True), expected)
            with other.stream("a red fox", seed=5, frames=9, start=start(), **ENHANCE) as stream:
                head = [next(stream), next(stream)]
                with other.resume(stream.snapshot()) as resumed:
                    assert np.array_equal(np.stack([*head, *resumed]), expected)
            assert gpu.graphs_made
        gc.collect()
    finally:
        runtime.runtime.cache_clear()


def test_the_command_writes_enhanced_frames(
    engine: pyengine.Engine, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it starts from is scaled as the frames are; the rest is what a stream gives."""
    monkeypatch.setenv("PYENGINE_CACHE", str(cache))
    picture, made = tmp_path / "start.png", tmp_path / "made"
    Image.fromarray(start()[0]).save(picture)
    words = ["--bundle", str(engine.bundle.folder), "--preset", "enhanced", "--image", str(picture)]
    words += ["--frames", "6", "--seed", "5", "--upscale", "1", "--output", f"{made}/", "--choice", "cut"]
    words += ["--backend", "onnxruntime", "--precision", "fp32"]
    assert main(["generate", "a red fox", *words]) == 0
    frames = np.stack([np.asarray(Image.open(path)) for path in sorted(made.glob("*.png"))])
    assert frames.shape == (6, 80, 128, 3)
    assert np.array_equal(frames[0], letterboxed(start()[:1], 80, 128)[0])
    with engine.stream("a red fox", seed=5, frames=5, start=start()[:1], **ENHANCE) as stream:
        assert np.array_equal(frames[1:], np.stack(list(stream)))
