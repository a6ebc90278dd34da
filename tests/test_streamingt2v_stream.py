"""StreamingT2V end to end at tiny sizes: bundle -> plan -> stream, against the same loop in PyTorch, on the CPU and on a simulated GPU."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_cuda
import numpy as np
import pytest
import streamingt2v_family as family
import torch
from fake_streamingt2v import by_hand

import pyengine
from pyengine.cli import main
from pyengine.device import cuda as runtime
from pyengine.export.runs import run_torch
from pyengine.text.prompts import prompts_of
from pyengine.video.writer import VideoWriter

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

ONE, TWO = "a boat sails on the lake", "the cat sleeps"
SEED, FRAMES = 3, 9
HIGH, WIDE = (8 * side for side in family.SIZES.latent)


@pytest.fixture(scope="module")
def engine(plan_cache: Path) -> Iterator[pyengine.Engine]:
    folder = family.streamed_bundle().folder
    options: dict[str, Any] = {"precision": "fp32", "threads": 1, "cache_dir": plan_cache}
    loaded = pyengine.load(folder, backend="onnxruntime", **options)
    yield loaded
    loaded.close()


def video(engine: pyengine.Engine, prompt: str = ONE, frames: int = FRAMES, **options: Any) -> np.ndarray:
    with engine.stream(prompt, seed=SEED, frames=frames, **options) as stream:
        return np.stack([np.asarray(frame) for frame in stream])


def picture() -> np.ndarray:
    """One frame of soft stripes."""
    place = np.linspace(0, 6, WIDE)[None, :, None] + np.arange(3) + np.linspace(0, 2, HIGH)[:, None, None]
    return (127 + 90 * np.sin(place)).astype(np.uint8)[None]


@torch.no_grad()
def torch_video(prompts: list[str], **options: Any) -> np.ndarray:
    """The loop in PyTorch: no schedule, plan or record of ours."""
    parts, bundle = family.streamed_parts(), family.streamed_bundle()
    tokens = prompts_of(bundle)

    def run(name: str, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        inputs: dict[str, Any] = {}
        for key, value in given.items():
            listed, _, place = key.partition(".")
            tensor = torch.from_numpy(np.ascontiguousarray(value))
            if place:
                inputs.setdefault(listed, []).append(tensor)
            else:
                inputs[key] = tensor
        return run_torch(parts[name].module, inputs, list(bundle.component(name).outputs))

    def runner(name: str) -> Any:
        return lambda given: run(name, given)

    def decode(latents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        made = run("decoder", {"latents": latents})
        return made["frames"][:, 0], made["pixels"]

    texts = [run("text_encoder", tokens.inputs(prompt))["text"] for prompt in prompts]
    return by_hand(
        texts,
        SEED,
        7.5,
        method=bundle.method,
        runs={name: runner(name) for name in parts},
        decode=decode,
        shape=(4, *family.SIZES.latent),
        **options,
    )


def close(frames: np.ndarray, exact: np.ndarray) -> None:
    """uint8 videos that differ by rounding alone: a level here and there."""
    assert frames.shape == exact.shape
    apart = np.abs(frames.astype(int) - exact.astype(int))
    assert apart.max() <= 2
    assert (apart > 0).mean() < 0.02


def test_a_video_from_text_equals_the_torch_loop(engine: pyengine.Engine) -> None:
    """With another prompt from the second chunk on, and a length that is cut."""
    with engine.stream(ONE, seed=SEED, frames=FRAMES) as stream:
        head = [next(stream) for _ in range(5)]
        stream.prompt = TWO
        got = np.stack([*head, *stream])
    assert got.std() > 5
    close(got, torch_video([ONE, ONE, TWO, TWO])[:FRAMES])


@pytest.mark.parametrize("count", [1, 5])
def test_a_video_from_frames_equals_the_torch_loop(engine: pyengine.Engine, count: int) -> None:
    """A picture, which is held still, and a video."""
    start = picture() if count == 1 else np.concatenate([picture() // (1 + k) for k in range(count)])
    got = video(engine, frames=4, start=start)
    assert got.std() > 5
    close(got, torch_video([ONE, ONE], given=np.repeat(start, 2, 0) if count == 1 else start))


def test_a_snapshot_goes_on_bit_identically(engine: pyengine.Engine) -> None:
    whole = video(engine)
    for calls in (0, 2, 3, 5, 6, 8, 14):
        with engine.stream(ONE, seed=SEED, frames=FRAMES) as stream:
            stream._advance(calls)
            with engine.resume(stream.snapshot()) as resumed:
                assert np.array_equal(np.stack(list(resumed)), whole), calls


def test_streams_of_a_batch_are_what_they_are_alone(engine: pyengine.Engine) -> None:
    expected = [video(engine), video(engine, TWO, 4, start=picture())]
    with engine.batch(max_streams=2) as batch:
        one = batch.stream(ONE, seed=SEED, frames=FRAMES)
        two = batch.stream(TWO, seed=SEED, frames=4, start=picture())
        clips: dict[Any, list[np.ndarray]] = {one: [], two: []}
        for stream, clip in batch.clips():
            clips[stream].append(clip)
        for stream, wanted in zip((one, two), expected, strict=True):
            got = np.concatenate(clips[stream])
            if batch.exact:
                assert np.array_equal(got, wanted)
            close(got, wanted)


def test_commands_take_the_bundle(engine: pyengine.Engine, plan_cache: Path, tmp_path: Path) -> None:
    folder, options = str(engine.bundle.folder), ["--backend", "onnxruntime", "--precision", "fp32"]
    options += ["--threads", "1", "--cache-dir", str(plan_cache)]
    start = tmp_path / "start.mp4"
    with VideoWriter(start, height=HIGH, width=WIDE, fps=8.0) as writer:
        for frame in np.repeat(picture(), 3, 0):
            writer.write(frame)
    made = tmp_path / "made.mp4"
    assert main(["generate", ONE, "--bundle", folder, "--frames", "7", "--video", str(start),
                 "--output", str(made), *options]) == 0  # fmt: skip
    assert made.stat().st_size > 0
    assert main(["info", folder]) == 0


# ---- a simulated GPU ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def simulated() -> Iterator[fake_cuda.FakeCuda]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield fake_cuda.install(monkeypatch)
        gc.collect()
    runtime.runtime.cache_clear()


@pytest.fixture(scope="module")
def gpu(simulated: fake_cuda.FakeCuda, tmp_path_factory: pytest.TempPathFactory) -> Iterator[pyengine.Engine]:
    cache = tmp_path_factory.mktemp("gpu")
    folder = family.streamed_bundle().folder
    loaded = pyengine.load(folder, backend="tensorrt", precision="fp32", choice="cut", cache_dir=cache)
    yield loaded
    loaded.close()


def test_a_gpu_gives_the_frames_of_the_cpu(engine: pyengine.Engine, gpu: pyengine.Engine) -> None:
    """Also with another prompt on the way, from a picture, and where frames stay on the GPU."""
    videos = []
    for one in (engine, gpu):
        with one.stream(ONE, seed=SEED, frames=FRAMES) as stream:
            head = [next(stream) for _ in range(5)]
            stream.prompt = TWO
            videos.append(np.stack([*head, *stream]))
    assert np.array_equal(videos[0], videos[1])
    assert np.array_equal(
        video(gpu, frames=4, start=picture(), device_frames=True), video(engine, frames=4, start=picture())
    )


def test_snapshots_go_from_the_cpu_to_a_gpu_and_back(engine: pyengine.Engine, gpu: pyengine.Engine) -> None:
    whole = video(engine)
    for first, second in ((engine, gpu), (gpu, engine), (gpu, gpu)):
        for calls in (3, 7):
            with first.stream(ONE, seed=SEED, frames=FRAMES) as stream:
                stream._advance(calls)
                state = stream.snapshot()
            with second.resume(state) as resumed:
                assert np.array_equal(np.stack(list(resumed)), whole), calls


def test_a_gpu_allocates_nothing_once_it_runs(gpu: pyengine.Engine, simulated: fake_cuda.FakeCuda) -> None:
    with gpu.stream(ONE, seed=SEED) as stream:
        for _ in range(10):
            next(stream)
        before = simulated.allocations
        for _ in range(6):
            next(stream)
        assert simulated.allocations == before
