"""Running plans: the ring in place, state, threads, memory."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import toy_family as toy

from pyengine.build.builder import build
from pyengine.bundle.variant import Variant
from pyengine.errors import PlanError, ShapeError
from pyengine.export.runs import decode, encode
from pyengine.runtime.executor import APPEND_SLOT, Executor
from pyengine.runtime.program import Program

VARIANTS = [toy.DENOISER, toy.WIDER, toy.DECODER, toy.TEXT_ENCODER]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plans")


@pytest.fixture(params=["cut", "inline"])
def program(request: pytest.FixtureRequest, cache: Path) -> Program:
    return load(cache, request.param, "auto")


@pytest.fixture
def exact_program(cache: Path) -> Program:
    return load(cache, "cut", "fp32")


def load(cache: Path, choice: str, precision: str) -> Program:
    return Program(
        build(toy.bundle(), variants=VARIANTS, choice=choice, precision=precision, cache_dir=cache)
    )


@pytest.fixture
def executor(program: Program) -> Iterator[Executor]:
    executor = Executor(program)
    yield executor
    executor.close()


def fill(executor: Executor, variant: Variant) -> None:
    """The example inputs, ring included; append_slot stays -1."""
    state = executor.state()
    for name, array in toy.numpy_inputs(variant.component).items():
        if f"{variant.component}/{name}" in state:
            target = state[f"{variant.component}/{name}"]
            target[...] = encode(array, target.dtype)
        elif array.shape == executor.input(variant, name).shape:
            target = executor.input(variant, name)
            target[...] = encode(array, target.dtype)
    executor.load_state(state)


def everything(executor: Executor) -> dict[str, np.ndarray]:
    """Copies of all that a later run depends on: states by their names, and the rings."""
    return executor.state() | {name: ring.copy() for name, ring in executor.rings.items()}


def stream(executor: Executor, calls: int, seed: int) -> np.ndarray:
    """A little stream: denoise with both variants, append a frame per call, decode. All that came out."""
    fill(executor, toy.DENOISER)
    rng, seen = np.random.default_rng(seed), []
    for call in range(calls):
        variant = (toy.DENOISER, toy.WIDER)[call % 2]
        latents = executor.input(variant, "latents")
        latents[...] = rng.standard_normal(latents.shape, np.float32)
        executor.input(variant, "level")[...] = np.linspace(0, 1, latents.shape[1])
        executor.input(variant, "frame_index")[...] = np.arange(latents.shape[1]) + call
        executor.input(variant, APPEND_SLOT)[...] = [call % toy.RING] + [-1] * (latents.shape[1] - 1)
        executor.run(variant)
        seen.append(executor.output(variant, "prediction").ravel().copy())
        executor.input(toy.DECODER, "latents")[...] = executor.output(variant, "prediction")[0, 0, :2]
        executor.run(toy.DECODER)
        seen.append(executor.output(toy.DECODER, "frames").ravel().astype(np.float32))
    return np.concatenate(seen)


def test_appends_to_the_slots_it_is_told(executor: Executor) -> None:
    fill(executor, toy.DENOISER)
    before = everything(executor)
    executor.run(toy.DENOISER)
    assert all(np.array_equal(array, before[name]) for name, array in everything(executor).items())
    executor.input(toy.DENOISER, APPEND_SLOT)[...] = [-1, 2, -1, 0]
    executor.run(toy.DENOISER)
    after = everything(executor)
    module, inputs = toy.modules()["denoiser"]
    with torch.no_grad():
        batches = [tensor.unflatten(0, (toy.BRANCHES, -1)) for tensor in module(**inputs)[1:]]
    outputs = [tensor[:, 0].numpy() for tensor in batches]
    for kind, exact in zip(("key", "value"), (outputs[: toy.DEPTH], outputs[toy.DEPTH :]), strict=True):
        for layer in range(toy.DEPTH):
            name = f"ring_{kind}.{layer}"
            ring = decode(after[name])
            assert np.allclose(ring[:, [2, 0]], exact[layer][:, [1, 3]], atol=0.1)
            assert np.array_equal(after[name][:, 1], before[name][:, 1])


def test_variants_share_the_ring_and_inputs_of_equal_shape(executor: Executor) -> None:
    assert executor.input(toy.DENOISER, "ring_key.0") is executor.input(toy.WIDER, "ring_key.0")
    assert executor.input(toy.DENOISER, "text_key") is executor.input(toy.WIDER, "text_key")
    assert executor.input(toy.DENOISER, "latents").shape != executor.input(toy.WIDER, "latents").shape


def test_state_advances_frame_by_frame(exact_program: Program) -> None:
    """Decoding in two calls equals torch decoding all at once."""
    executor = Executor(exact_program)
    module = toy.modules()["decoder"][0]
    latents = torch.randn(6, toy.CHANNELS, toy.SIDE, toy.SIDE)
    with torch.no_grad():
        exact = module(latents, torch.zeros(1, 16, toy.SIDE, toy.SIDE))[0].numpy()
    frames = []
    for start in range(0, 6, 2):
        executor.input(toy.DECODER, "latents")[...] = latents[start : start + 2].numpy()
        executor.run(toy.DECODER)
        frames.append(executor.output(toy.DECODER, "frames").copy())
    assert np.abs(np.concatenate(frames).astype(int) - exact.astype(int)).max() <= 1


@pytest.mark.parametrize("calls", [1, 2, 3])
def test_snapshot_continues_bit_identically(program: Program, calls: int) -> None:
    first, second = Executor(program), Executor(program)
    stream(first, calls, seed=1)
    second.load_state(first.state())
    for name, ring in first.rings.items():
        second.rings[name][...] = ring
    assert np.array_equal(tail(first), tail(second))
    assert all(np.array_equal(array, everything(second)[name]) for name, array in everything(first).items())


def tail(executor: Executor) -> np.ndarray:
    """One more denoiser call, with an append, and two decoder calls, from the executor's own state."""
    for name, array in toy.numpy_inputs("denoiser").items():
        if not name.startswith("ring_") or name == "ring_index":
            target = executor.input(toy.DENOISER, name)
            target[...] = encode(array, target.dtype)
    executor.input(toy.DENOISER, APPEND_SLOT)[...] = [-1, 1, -1, -1]
    executor.run(toy.DENOISER)
    out = [executor.output(toy.DENOISER, "prediction").ravel().copy()]
    for _ in range(2):
        executor.input(toy.DECODER, "latents")[...] = executor.output(toy.DENOISER, "prediction")[0, 0, :2]
        executor.run(toy.DECODER)
        out.append(executor.output(toy.DECODER, "frames").ravel().astype(np.float32))
    return np.concatenate(out)


def test_a_state_that_does_not_fit_changes_nothing(executor: Executor) -> None:
    state = executor.state()
    damaged = {name: array + 1 for name, array in state.items()}
    damaged["decoder/memory"] = np.zeros((1, 2))
    with pytest.raises(ShapeError, match=r"expected state decoder/memory as"):
        executor.load_state(damaged)
    with pytest.raises(ShapeError, match=r"these differ: decoder/memory"):
        executor.load_state({name: array for name, array in state.items() if name != "decoder/memory"})
    assert all(np.array_equal(array, state[name]) for name, array in executor.state().items())


def test_two_threads_give_what_they_give_alone(program: Program) -> None:
    alone = [stream(Executor(program), 12, seed) for seed in (1, 2)]
    executors = [Executor(program), Executor(program)]
    with ThreadPoolExecutor(2) as pool:
        together = list(
            pool.map(lambda pair: stream(pair[0], 12, pair[1]), zip(executors, (1, 2), strict=True))
        )
    assert all(np.array_equal(left, right) for left, right in zip(alone, together, strict=True))


def test_components_of_one_executor_run_at_the_same_time(program: Program) -> None:
    """Decoding overlaps denoising: neither disturbs the other."""
    executor = Executor(program)
    fill(executor, toy.DENOISER)
    executor.run(toy.DENOISER)
    velocity = executor.output(toy.DENOISER, "prediction").copy()
    executor.input(toy.DECODER, "latents")[...] = 0.5
    for _ in range(20):
        executor.run(toy.DECODER)
    frames = executor.output(toy.DECODER, "frames").copy()
    with ThreadPoolExecutor(2) as pool:
        for variant in (toy.DENOISER, toy.DECODER):
            pool.submit(lambda variant=variant: [executor.run(variant) for _ in range(50)])
    assert np.array_equal(executor.output(toy.DENOISER, "prediction"), velocity)
    assert np.array_equal(executor.output(toy.DECODER, "frames"), frames)


def test_a_run_allocates_nothing(executor: Executor) -> None:
    fill(executor, toy.DENOISER)

    def runs(count: int) -> None:
        for _ in range(count):
            executor.run(toy.DENOISER)
            executor.run(toy.DECODER)

    tracemalloc.start()
    try:
        runs(20)
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        runs(200)
        after, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 1024
    assert peak - before < 4096  # a few Python floats and tuples; the smallest buffer here is larger


def test_time_is_accounted_for(executor: Executor) -> None:
    executor.run(toy.DENOISER)
    seconds = executor.seconds
    assert 0 < seconds["segments"] + seconds["ops"] <= seconds["runs"]


def test_buffers_are_reused_between_layers(exact_program: Program) -> None:
    """Scratch does not grow with depth: less than every crossing tensor would need."""
    cut = toy.bundle().component("denoiser").cut
    assert cut is not None
    executor = Executor(exact_program)
    memory = executor._memory["denoiser"]
    scratch = sum(buffer.size for buffer in memory._scratch)
    separate = sum(4 * int(np.prod(spec.resolve(toy.WIDER.symbols))) for spec in cut.tensors.values())
    assert scratch < separate


def test_unknown_names_are_answered_with_the_known(executor: Executor) -> None:
    with pytest.raises(
        PlanError, match=r"expected a tensor of denoiser.* out of latents, .* but got 'noise'"
    ):
        executor.input(toy.DENOISER, "noise")
    with pytest.raises(PlanError, match=r"has no variant denoiser\.frames99\.ring3, only"):
        executor.run(Variant.of("denoiser", frames=99, ring=3))


def test_closed_executor_refuses(program: Program) -> None:
    executor = Executor(program)
    executor.close()
    with pytest.raises(PlanError, match="has no variant"):
        executor.run(toy.DENOISER)
