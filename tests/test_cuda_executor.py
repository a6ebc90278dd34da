"""The CUDA executor on a simulated GPU in host memory: its streams are those of the CPU plan, bit for bit.

See fake_cuda.py for what that can and cannot tell.
"""

from __future__ import annotations

import ctypes
import gc
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import fake_cuda
import numpy as np
import pytest
import torch
import toy_family as toy

import pyengine
from pyengine.build.builder import build
from pyengine.bundle.bundle import BUNDLED, MANIFEST
from pyengine.device import cuda as runtime
from pyengine.device.array import DeviceArray
from pyengine.errors import BackendUnavailable, ConfigError, PlanError, ShapeError
from pyengine.runtime.open import load_program

REAL_API = runtime._api  # before a fake takes its place
PROMPT = "a red circle bounces over a blue background"
OTHER = "a green star spins over a grey background"
FRAMES = 40  # the window fills, is full, and the ring wraps around
METHOD = {"steps": 4, "cadence": 2, "context": {"kind": "ring", "sink_frames": 0, "recent_frames": 4}}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model with a small window, which is all that these tests have time for."""
    folder = tmp_path_factory.mktemp("bundle") / "shapes"
    shutil.copytree(BUNDLED / "shapes", folder)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["method"] |= METHOD
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


@pytest.fixture(scope="module")
def cpu(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[pyengine.Engine]:
    cache = tmp_path_factory.mktemp("cpu")
    engine = pyengine.load(bundle, backend="onnxruntime", choice="cut", cache_dir=cache)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def cuda() -> Iterator[fake_cuda.FakeCuda]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield fake_cuda.install(monkeypatch)
        gc.collect()
    runtime.runtime.cache_clear()


@pytest.fixture(scope="module")
def engine(
    bundle: Path, cuda: fake_cuda.FakeCuda, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[pyengine.Engine]:
    cache = tmp_path_factory.mktemp("cuda")
    engine = pyengine.load(bundle, backend="tensorrt", choice="cut", cache_dir=cache)
    engine.encode_prompt(PROMPT)  # encoded here, so that no stream below does
    yield engine
    engine.close()


def frames(engine: pyengine.Engine, count: int = FRAMES, **options: object) -> np.ndarray:
    with engine.stream(PROMPT, seed=3, frames=count, **options) as stream:  # type: ignore[arg-type]
        return np.stack([np.asarray(frame) for frame in stream])


@pytest.fixture(scope="module")
def expected(cpu: pyengine.Engine) -> np.ndarray:
    return frames(cpu)


def test_a_stream_on_the_gpu_is_the_stream_of_the_cpu(engine: pyengine.Engine, expected: np.ndarray) -> None:
    assert np.array_equal(frames(engine), expected)


def test_each_walk_is_captured_once_and_replayed(engine: pyengine.Engine, cuda: fake_cuda.FakeCuda) -> None:
    before = cuda.launches
    with engine.stream(PROMPT, frames=FRAMES) as stream:
        for _ in stream:
            pass
        graphs = stream._open().graphs  # type: ignore[attr-defined]
        launches, calls = cuda.launches - before, stream.calls_made
    # Two window sizes, and the decoder with its state in either of two buffers.
    assert sorted(graphs) == [
        "decoder.chunk2/0/",
        "decoder.chunk2/1/",
        "denoiser.branches2.frames4.ring4.streams1/0/call",
        "denoiser.branches2.frames6.ring4.streams1/0/call",
    ]
    # All but the first run of each; the prompt was encoded earlier.
    assert launches == calls - 2 + FRAMES // 8 - 2


def test_engines_that_cannot_be_captured_run_one_by_one(
    engine: pyengine.Engine,
    cuda: fake_cuda.FakeCuda,
    monkeypatch: pytest.MonkeyPatch,
    expected: np.ndarray,
) -> None:
    monkeypatch.setattr(fake_cuda.FakeEngine, "capturable", False)
    before = cuda.launches
    assert np.array_equal(frames(engine, 24), expected[:24])
    assert cuda.launches == before  # the prompt was encoded earlier


def test_frames_may_stay_on_the_gpu(engine: pyengine.Engine, expected: np.ndarray) -> None:
    with engine.stream(PROMPT, seed=3, frames=FRAMES, device_frames=True) as stream:
        kept = list(stream)
    assert all(isinstance(frame, DeviceArray) and frame.shape == (64, 64, 3) for frame in kept)
    assert np.array_equal(np.stack([frame.numpy() for frame in kept]), expected)


def test_clips_on_the_gpu_are_whole_arrays(engine: pyengine.Engine, expected: np.ndarray) -> None:
    with engine.stream(PROMPT, seed=3, frames=20, device_frames=True) as stream:
        first = next(stream).numpy()
        clips = [clip.numpy() for clip in stream.clips()]
    assert np.array_equal(np.concatenate([first[None], *clips]), expected[:20])


def test_frames_on_the_cpu_cannot_stay_on_a_gpu(cpu: pyengine.Engine) -> None:
    with pytest.raises(ConfigError, match="device_frames needs an engine on device cuda"):
        cpu.stream(PROMPT, device_frames=True)


@pytest.mark.parametrize("device_frames", [False, True])
def test_snapshots_continue_bit_identically(
    engine: pyengine.Engine, expected: np.ndarray, device_frames: bool
) -> None:
    with engine.stream(PROMPT, seed=3, frames=FRAMES, device_frames=device_frames) as stream:
        head = [np.asarray(next(stream)) for _ in range(19)]
        saved = stream.snapshot()
        next(stream)
    with engine.resume(saved) as stream:
        rest = [np.asarray(frame) for frame in stream]
    assert np.array_equal(np.stack([*head, *rest]), expected)


def test_a_cpu_snapshot_continues_on_the_gpu(
    cpu: pyengine.Engine, engine: pyengine.Engine, expected: np.ndarray
) -> None:
    with cpu.stream(PROMPT, seed=3, frames=FRAMES) as stream:
        head = [next(stream) for _ in range(11)]
        saved = stream.snapshot()
    with engine.resume(saved) as stream:
        assert np.array_equal(np.stack([*head, *stream]), expected)


def test_a_new_prompt_rewrites_the_ring_as_on_the_cpu(cpu: pyengine.Engine, engine: pyengine.Engine) -> None:
    seen = []
    for one in (cpu, engine):
        with one.stream(PROMPT, seed=3, frames=FRAMES) as stream:
            head = [next(stream) for _ in range(24)]
            stream.prompt = OTHER
            seen.append(np.stack([*head, *stream]))
    assert np.array_equal(*seen)


def test_a_start_is_continued_as_on_the_cpu(
    cpu: pyengine.Engine, engine: pyengine.Engine, expected: np.ndarray
) -> None:
    assert np.array_equal(frames(engine, 16, start=expected[:16]), frames(cpu, 16, start=expected[:16]))


def test_a_sampler_with_noise_of_its_own(cpu: pyengine.Engine, engine: pyengine.Engine) -> None:
    method = {"sampler": "renoise"}
    assert np.array_equal(frames(engine, 16, method=method), frames(cpu, 16, method=method))


def test_two_streams_do_not_disturb_each_other(engine: pyengine.Engine, expected: np.ndarray) -> None:
    with engine.stream(PROMPT, seed=3, frames=24) as one, engine.stream(OTHER, seed=4, frames=24) as two:
        pairs = list(zip(one, two, strict=True))
    assert np.array_equal(np.stack([pair[0] for pair in pairs]), expected[:24])


def test_the_steady_state_allocates_nothing(engine: pyengine.Engine, cuda: fake_cuda.FakeCuda) -> None:
    with engine.stream(PROMPT, seed=3) as stream:
        for _ in range(96):
            next(stream)
        before = cuda.allocations
        for _ in range(24):
            next(stream)
        assert cuda.allocations == before


def test_inline_plans_append_to_the_ring_on_the_gpu(
    cpu: pyengine.Engine, cuda: fake_cuda.FakeCuda, tmp_path: Path
) -> None:
    program = load_program(
        build(toy.bundle(), variants=[toy.DENOISER], backend="tensorrt", choice="inline", cache_dir=tmp_path)
    )
    host = load_program(
        build(
            toy.bundle(), variants=[toy.DENOISER], backend="onnxruntime", choice="inline", cache_dir=tmp_path
        )
    )
    states = []
    for executor in (program.executor(), host.executor()):
        for name, array in toy.numpy_inputs("denoiser").items():
            if not name.startswith("ring_") or name == "ring_index":
                target = executor.inputs(toy.DENOISER)[name]
                target[...] = array[tuple(slice(size) for size in target.shape)]
        executor.inputs(toy.DENOISER)["append_slot"][...] = [[-1, 2, -1, 0]]
        for _ in range(3):
            executor.run(toy.DENOISER)
        rings = {name: ring.copy() for name, ring in executor.rings.items()}
        states.append(
            executor.state() | rings | {"prediction": executor.output(toy.DENOISER, "prediction").copy()}
        )
        executor.close()
    assert states[0].keys() == states[1].keys()
    assert any(array.any() for name, array in states[0].items() if name.startswith("ring_"))
    assert all(np.array_equal(array, states[1][name]) for name, array in states[0].items())


def test_auto_times_both_choices_on_the_gpu(cuda: fake_cuda.FakeCuda, tmp_path: Path) -> None:
    plan = build(toy.bundle(), variants=[toy.DENOISER], backend="tensorrt", cache_dir=tmp_path)
    seconds = plan.part(toy.DENOISER).seconds
    assert set(seconds) == {"cut", "inline"}
    assert all(value and value > 0 for value in seconds.values())
    again = build(toy.bundle(), variants=[toy.DENOISER], backend="tensorrt", cache_dir=tmp_path)
    assert again.part(toy.DENOISER).seconds == seconds  # found, not built


class HostMemoryArray(DeviceArray):
    """The simulated GPU's memory as what it is, so that a CPU library reads it."""

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0


@pytest.mark.parametrize("dtype", ["float32", "uint8", "int64", "bool", "bfloat16", "float16"])
def test_dlpack_shares_memory(cuda: fake_cuda.FakeCuda, dtype: str) -> None:
    stream = runtime.runtime().stream()
    array = HostMemoryArray.zeros((2, 3, 4), dtype, stream)
    values = (np.arange(24) % 2).astype(array.host_dtype).reshape(2, 3, 4)
    array[...] = values
    tensor = torch.from_dlpack(array)
    assert str(tensor.dtype) == f"torch.{dtype}"
    assert tensor.data_ptr() == array.pointer
    raw = tensor.view(torch.uint16) if dtype == "bfloat16" else tensor
    assert np.array_equal(raw.numpy(), values)
    alive = len(cuda._memory)
    del array
    gc.collect()
    assert len(cuda._memory) == alive  # the tensor holds it
    del tensor, raw
    gc.collect()
    assert len(cuda._memory) == alive - 1


def test_an_unused_capsule_lets_go(cuda: fake_cuda.FakeCuda) -> None:
    array = DeviceArray.zeros((4,), "float32", runtime.runtime().stream())
    alive = len(cuda._memory)
    capsule = array.__dlpack__()
    del array, capsule
    gc.collect()
    assert len(cuda._memory) == alive - 1


def test_a_reader_waits_for_work_under_way(cuda: fake_cuda.FakeCuda) -> None:
    """The DLPack stream of the reader gets our event, so its own work comes after ours."""
    stream, other = runtime.runtime().stream(), runtime.runtime().stream()
    array = DeviceArray.zeros((4,), "float32", stream)
    stream.synchronize()
    seen: list[float] = []
    cuda.streams[stream.handle].add(lambda: fake_cuda.on_host(array).fill(7))
    array.__dlpack__(stream=other.handle)
    cuda.streams[other.handle].add(lambda: seen.append(float(fake_cuda.on_host(array)[0])))
    other.synchronize()
    assert seen == [7.0]


def test_a_dropped_frame_is_not_overwritten_while_its_reader_works(cuda: fake_cuda.FakeCuda) -> None:
    from pyengine.runtime.cuda.memory import Pool

    stream, reader = runtime.runtime().stream(), runtime.runtime().stream()
    pool = Pool(stream, "uint8")
    frame = pool.take((4,))
    frame[...] = np.full(4, 1, np.uint8)
    assert frame.ready is not None
    frame.ready.record(stream)
    frame.__dlpack__(stream=reader.handle)
    place, seen = (ctypes.c_uint8 * 4).from_address(frame.pointer), []
    cuda.streams[reader.handle].add(lambda: seen.append(bytes(place)))  # the reader's kernel, still to run
    pointer = frame.pointer
    del frame
    gc.collect()
    again = pool.take((4,))
    assert again.pointer == pointer
    again[...] = np.full(4, 9, np.uint8)
    reader.synchronize()
    assert seen == [b"\1\1\1\1"]


def test_cuda_array_interface(cuda: fake_cuda.FakeCuda) -> None:
    stream = runtime.runtime().stream()
    array = DeviceArray.zeros((2, 3), "float32", stream)
    facts = array.__cuda_array_interface__
    assert facts["shape"] == (2, 3)
    assert facts["typestr"] == "<f4"
    assert facts["data"] == (array.pointer, False)
    assert facts["stream"] == stream.handle
    with pytest.raises(AttributeError, match="use DLPack"):
        _ = DeviceArray.zeros((2,), "bfloat16", stream).__cuda_array_interface__


def test_device_arrays_refuse_what_does_not_fit(cuda: fake_cuda.FakeCuda) -> None:
    array = DeviceArray.zeros((2, 3), "float32", runtime.runtime().stream())
    with pytest.raises(ShapeError, match=r"expected float32 \[2, 3\] but got float64 \[2, 3\]"):
        array[...] = np.zeros((2, 3))
    with pytest.raises(ShapeError, match="at most 24 bytes but a view has 32"):
        array.view((8,), "float32")


def test_out_of_memory_is_one_sentence(cuda: fake_cuda.FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = runtime.runtime()
    monkeypatch.setattr(cuda, "cudaMalloc", lambda nbytes: (2, 0), raising=False)
    with pytest.raises(
        PlanError, match=r"expected 5 MB more memory of Simulated GPU but could not get it .*; close"
    ):
        gpu.allocate(5_000_000)


def test_without_a_driver_there_is_one_clear_sentence() -> None:
    """On a machine without a GPU; where there is one, nothing to see."""
    try:
        runtime.Runtime(REAL_API())
        pytest.skip("this machine has a GPU")
    except BackendUnavailable as error:
        message = str(error)
    assert re.fullmatch(r"device cuda needs (an NVIDIA GPU|the package cuda-python).*", message)


def test_a_walk_that_cannot_be_captured_runs_call_by_call(
    engine: pyengine.Engine, cuda: fake_cuda.FakeCuda, monkeypatch: pytest.MonkeyPatch, expected: np.ndarray
) -> None:
    monkeypatch.setattr(cuda, "cudaStreamEndCapture", _failing(cuda), raising=False)
    before = cuda.launches
    assert np.array_equal(frames(engine, 24), expected[:24])
    assert cuda.launches == before  # the prompt was encoded earlier


def _failing(cuda: fake_cuda.FakeCuda) -> object:
    def end(stream: int) -> tuple[int, int]:
        cuda.streams[stream].recording = None
        return 901, 0

    return end


def test_garbage_that_is_collected_later_does_not_break_a_capture(cuda: fake_cuda.FakeCuda) -> None:
    stream = runtime.runtime().stream()

    class Knot:
        def __init__(self) -> None:
            self.array = DeviceArray.zeros((4,), "float32", stream)
            self.itself = self

    Knot()  # garbage that only the collector finds
    before = gc.get_threshold()
    try:
        gc.set_threshold(1)
        stream.capture(lambda: [[] for _ in range(100)])
    finally:
        gc.set_threshold(*before)
    assert gc.isenabled()


def test_a_kernel_that_cannot_be_captured_leaves_the_walk_call_by_call(
    engine: pyengine.Engine, cuda: fake_cuda.FakeCuda, monkeypatch: pytest.MonkeyPatch, expected: np.ndarray
) -> None:
    """Our kernels say what is wrong with RuntimeError."""
    enqueue = fake_cuda.FakeKernels._enqueue

    def refusing(self: fake_cuda.FakeKernels, op: object, stream: int, *rest: object) -> None:
        if cuda.streams[stream].recording is not None:
            raise RuntimeError(
                "[cuda] launching a kernel failed: operation failed due to a previous error during capture"
            )
        enqueue(self, op, stream, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(fake_cuda.FakeKernels, "_enqueue", refusing)
    assert np.array_equal(frames(engine, 24), expected[:24])


def test_an_inlined_plan_is_not_kept_once_there_are_kernels(
    cuda: fake_cuda.FakeCuda, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options = {"variants": [toy.DENOISER], "backend": "tensorrt", "cache_dir": tmp_path}
    with monkeypatch.context() as without:
        without.setattr("pyengine.build.builder._has_kernels", lambda: False)
        assert set(build(toy.bundle(), **options).part(toy.DENOISER).seconds) == {"inline"}
    assert set(build(toy.bundle(), **options).part(toy.DENOISER).seconds) == {"cut", "inline"}
