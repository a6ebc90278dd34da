"""The executor on a GPU. Buffers, ring and decoder state live there from the start; each variant's walk is
captured once in a CUDA graph and replayed.

A run enqueues one small copy (what the host has written) and one graph, and returns; nothing waits until someone
reads. Every component has a stream of its own, so that decoding overlaps denoising.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from time import perf_counter
from typing import TYPE_CHECKING, Any

from pyengine.backends.base import Engine
from pyengine.bundle.variant import Variant
from pyengine.device.array import DeviceArray
from pyengine.device.cuda import CudaGraph, Stream, runtime
from pyengine.device.nvtx import annotate
from pyengine.errors import PlanError
from pyengine.plans.plan import Part, Plan
from pyengine.runtime.bound_plan import Walk
from pyengine.runtime.codec import FRAME_DECODER
from pyengine.runtime.cuda.decoder import CudaDecoder, CudaTileDecoder
from pyengine.runtime.cuda.latents import CudaCallBuffers, CudaLatentStore
from pyengine.runtime.cuda.memory import CudaMemory
from pyengine.runtime.cuda.ops import CudaOps
from pyengine.runtime.executor import Executor
from pyengine.runtime.program import LoadedVariant, Program

if TYPE_CHECKING:
    from pyengine.runtime.host.decoder import Decoder
    from pyengine.runtime.latents import CallBuffers, LatentStore

Enqueue = Callable[[], object]
Around = Callable[[], tuple[Sequence[Enqueue], Sequence[Enqueue]]]
log = logging.getLogger("pyengine")


class CudaVariant(LoadedVariant):
    """Engines, and the weights of our ops on the GPU."""

    @classmethod
    def load(cls, plan: Plan, part: Part, engines: Sequence[Engine] | None = None) -> CudaVariant:
        host = LoadedVariant.load(plan, part, engines)
        stream = runtime().stream()
        constants = {name: DeviceArray.of(array, stream) for name, array in host.constants.items()}
        return cls(part, host.engines, constants, host.nbytes)


class CudaProgram(Program):
    variant_type = CudaVariant

    def __init__(self, source: Plan, loaded: Mapping[Variant, LoadedVariant] | None = None) -> None:
        self.cuda = runtime()
        super().__init__(source, loaded)

    def executor(self) -> CudaExecutor:
        return CudaExecutor(self)


class CudaExecutor(Executor):
    """The buffers, streams and graphs of one stream of frames."""

    device = "cuda"
    program: CudaProgram

    def __init__(self, program: CudaProgram) -> None:
        self._graphs: dict[tuple[Variant, int, str], CudaGraph | None] = {}
        super().__init__(program)
        self.synchronize()

    def stream(self, component: str) -> Stream:
        """The CUDA stream that a component runs on."""
        return self._memory_of(component).stream

    def run(self, variant: Variant) -> None:
        self.launch(variant)

    def launch(self, variant: Variant, tag: str = "", around: Around = lambda: ((), ())) -> None:
        """Enqueues a run, with the work of `around` before and after it in the same graph. `tag` names that work:
        it must be the same calls on the same arrays every time.
        """
        walk = self._walk(variant)
        memory = self._memory_of(variant.component)
        start = perf_counter()
        key = (variant, memory.parity, tag)
        with annotate(f"{variant} {tag}".rstrip()):
            memory.upload()
            graph = self._graphs.get(key)
            if graph is not None:
                graph.launch(memory.stream)
            else:
                head, tail = around()
                self._first(key, [*head, *(call for _, call in walk.calls[memory.parity]), *tail])
        memory.parity ^= walk.flip
        walk.seconds["runs"] += perf_counter() - start

    def _first(self, key: tuple[Variant, int, str], calls: list[Enqueue]) -> None:
        """Runs the calls one by one; the first time also captures them, after that run, since engines allocate and
        load lazily in their first run, which a capture would not allow.
        """

        def enqueue() -> None:
            for call in calls:
                call()

        enqueue()
        if key in self._graphs:
            return  # cannot be captured
        self._graphs[key] = None
        if not all(getattr(engine, "capturable", True) for engine in self.program.engines(key[0])):
            return
        stream = self.stream(key[0].component)
        stream.synchronize()
        try:
            self._graphs[key] = stream.capture(enqueue)
        except (
            PlanError,
            RuntimeError,
        ) as error:  # RuntimeError: of our kernels, where the driver has ended the capture
            log.warning(
                "%s cannot be captured in a CUDA graph (%s): it runs call by call, slower", key[0], error
            )

    @property
    def graphs(self) -> list[str]:
        """Names of what has been captured so far."""
        return [
            f"{variant}/{parity}/{tag}" for (variant, parity, tag), graph in self._graphs.items() if graph
        ]

    def inputs(self, variant: Variant) -> dict[str, Any]:
        """Every input by name. Small ones are numpy and are sent with the next run, large ones are DeviceArrays."""
        memory = self._memory_of(variant.component)
        return {name: memory.host(array) for name, array in self._walk(variant).inputs.items()}

    def on_gpu(self, variant: Variant, name: str) -> DeviceArray:
        """An input or output as the engines see it."""
        walk = self._walk(variant)
        array: DeviceArray = (walk.inputs | walk.outputs)[name]
        return array

    def ops(self, component: str) -> CudaOps:
        return CudaOps(self._memory_of(component))

    def memory(self, component: str) -> CudaMemory:
        return self._memory_of(component)

    def latent_store(self, frame_shape: tuple[int, ...], places: int) -> LatentStore:
        component = next(variant.component for variant in self.program.variants)
        return CudaLatentStore(self, component, frame_shape, places)

    def call_buffers(self, variant: Variant) -> CallBuffers:
        return CudaCallBuffers(self, variant)

    def decoder(self, *, device_frames: bool = False) -> Decoder:
        bundle = self.program.bundle
        tiled = FRAME_DECODER.component in bundle.components and self._is_tiled()
        return (CudaTileDecoder if tiled else CudaDecoder)(self, bundle, device_frames=device_frames)

    def _is_tiled(self) -> bool:
        """Whether the second network takes less than a whole plane."""
        planes = next(
            self.on_gpu(variant, "planes")
            for variant in self.program.variants
            if variant.component == "decoder"
        )
        return planes.shape[2:] != self.on_gpu(FRAME_DECODER, "planes").shape[2:]

    def synchronize(self) -> None:
        for name in self._memory:
            self.stream(name).synchronize()

    def close(self) -> None:
        if self._memory:
            self.synchronize()
        self._graphs.clear()
        super().close()

    def _new_memory(self, component: str) -> CudaMemory:
        engines = [
            engine
            for variant in self.program.variants
            if variant.component == component
            for engine in self.program.engines(variant)
        ]
        # An engine may be tied to a stream from the start, as an ONNX Runtime session is.
        given = next((engine.stream for engine in engines if getattr(engine, "stream", None)), None)  # type: ignore[attr-defined]
        memory = CudaMemory(given or self.program.cuda.stream())
        memory.reserve(max((engine.arena_bytes for engine in engines), default=0))  # type: ignore[attr-defined]
        return memory

    def _bind(self, variant: Variant) -> Walk:
        memory = self._memory_of(variant.component)
        return Walk(self.program, variant, memory, CudaOps(memory))

    def _memory_of(self, component: str) -> CudaMemory:
        if component not in self._memory:
            raise PlanError(
                f"this executor has no component {component}, only {', '.join(self._memory) or 'none'}"
            )
        memory = self._memory[component]
        assert isinstance(memory, CudaMemory)
        return memory
