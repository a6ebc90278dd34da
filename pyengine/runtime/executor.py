"""Runs a plan. The schedule decides, the executor obeys: every buffer exists before the first run, and a run
is a loop over calls.

    program = load_program(plan)                 # compiled engines and weights: shared by streams and threads
    executor = program.executor()                # the buffers of one stream
    executor.input(variant, "latents")[...] = x  # views of the very memory that the engines read
    executor.run(variant)
    executor.output(variant, "prediction")

Nothing is copied between steps, and a run allocates nothing. A plan for a GPU gets the executor of
`pyengine.runtime.cuda`, which walks the same steps there.
"""

from __future__ import annotations

from collections.abc import Mapping
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from pyengine.bundle.variant import Variant
from pyengine.errors import PlanError, ShapeError
from pyengine.runtime.bound_plan import APPEND_SLOT, HostOps, Walk
from pyengine.runtime.host.decoder import HostDecoder
from pyengine.runtime.host.latents import HostCallBuffers, HostLatentStore
from pyengine.runtime.host.memory import Arrays, Memory

if TYPE_CHECKING:
    from pyengine.runtime.host.decoder import Decoder
    from pyengine.runtime.latents import CallBuffers, LatentStore
    from pyengine.runtime.program import Program

__all__ = ["APPEND_SLOT", "Executor"]


class Executor:
    """The buffers and requests of one stream. Its components may run at the same time in different threads,
    each in one at a time.
    """

    device = "cpu"

    def __init__(self, program: Program) -> None:
        self.program = program
        self._memory = {name: self._new_memory(name) for name in self._components(program)}
        # The largest first: the others find room in its scratch.
        order = sorted(program.variants, key=lambda variant: -sum(variant.symbols.values()))
        self._bound = {variant: self._bind(variant) for variant in order}
        program.bound(self)

    def _components(self, program: Program) -> list[str]:
        return sorted({variant.component for variant in program.variants})

    def _new_memory(self, component: str) -> Memory:
        return Memory()

    def _bind(self, variant: Variant) -> Walk:
        return Walk(self.program, variant, self._memory[variant.component], HostOps())

    def run(self, variant: Variant) -> None:
        """Runs a variant on what its inputs hold, then lets its state advance."""
        walk = self._walk(variant)
        seconds, memory = walk.seconds, walk.memory
        start = previous = perf_counter()
        for kind, call in walk.calls[memory.parity]:
            call()
            now = perf_counter()
            seconds[kind] += now - previous
            previous = now
        memory.parity ^= walk.flip
        seconds["runs"] += perf_counter() - start

    def latent_store(self, frame_shape: tuple[int, ...], places: int) -> LatentStore:
        """Makes the store of one stream's latents, of which at most `places` are in flight."""
        return HostLatentStore(frame_shape, places)

    def call_buffers(self, variant: Variant) -> CallBuffers:
        """Makes the buffers that a denoiser variant reads and writes in calls."""
        return HostCallBuffers(self, variant)

    @property
    def rings(self) -> Arrays:
        """The executor's own rings by name, those of a stream that runs alone: [branches, ring, tokens, heads, head_dim]."""
        return {name: ring for memory in self._memory.values() for name, ring in memory.rings.items()}

    def new_rings(self) -> Arrays:
        """Makes rings for one more stream of a batch, zeroed."""
        return {name: ring for memory in self._memory.values() for name, ring in memory.new_rings().items()}

    def attach(self, variant: Variant, stream: int, rings: Mapping[str, Any]) -> None:
        """Makes stream number `stream` of a variant's calls read and write these rings, from its next run on."""
        for name, table in self._walk(variant).rings.items():
            table[stream] = rings[name]

    def decoder(self, *, device_frames: bool = False) -> Decoder:
        """Makes the decoder of one stream, which turns finished chunks of latents into frames while the next call runs."""
        return HostDecoder(self, self.program.bundle, device_frames=device_frames)

    def synchronize(self) -> None:
        """Waits for every run. A host run is done when it returns."""

    def _walk(self, variant: Variant) -> Walk:
        try:
            return self._bound[variant]
        except KeyError:
            raise PlanError(
                f"this executor has no variant {variant}, only {', '.join(map(str, self._bound)) or 'none'}"
            ) from None

    def input(self, variant: Variant, name: str) -> np.ndarray:
        """The memory of an input. Variants of a component share an input of equal shape; bf16 comes as
        uint16.
        """
        array: np.ndarray = _get({**self.inputs(variant), **self.rings}, name, variant)
        return array

    def output(self, variant: Variant, name: str) -> np.ndarray:
        """The memory of an output, overwritten by the next run. `.copy()` is numpy on every device."""
        array: np.ndarray = _get(self._walk(variant).outputs, name, variant)
        return array

    def inputs(self, variant: Variant) -> Arrays:
        """Every input of a variant by name, without its state; with `append_slot` where there is a ring."""
        return self._walk(variant).inputs

    def state(self) -> Arrays:
        """Copies of all that a later run depends on beside rings: the state of streaming components, as
        `component/name`.
        """
        return {
            f"{name}/{key}": array.copy()
            for name, memory in self._memory.items()
            for key, array in memory.state().items()
        }

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Puts back what `state()` returned. Raises ShapeError, and changes nothing, where it does not fit
        this plan.
        """
        own = {
            f"{name}/{key}": (memory, array)
            for name, memory in self._memory.items()
            for key, array in memory.state().items()
        }
        if set(own) != set(state):
            odd = ", ".join(sorted(set(own) ^ set(state)))
            raise ShapeError(f"expected a state with the same arrays as this plan but these differ: {odd}")
        for key, (memory, array) in own.items():
            given, dtype = state[key], memory.host_dtype(array)
            if given.shape != array.shape or given.dtype != dtype:
                raise ShapeError(
                    f"expected state {key} as {dtype} {array.shape} but got {given.dtype} {given.shape}"
                )
        for key, (_, array) in own.items():
            array[...] = state[key]

    @property
    def seconds(self) -> dict[str, float]:
        """Time spent so far in `segments` (the backend), in `ops` (our kernels), and in `runs` as a whole."""
        totals = {"segments": 0.0, "ops": 0.0, "runs": 0.0}
        for walk in self._bound.values():
            for key, value in walk.seconds.items():
                totals[key] += value
        return totals

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(memory.nbytes for memory in list(self._memory.values()))  # it may be closed meanwhile

    def close(self) -> None:
        """Frees every buffer and request, and lets go of its program. Using the executor afterwards raises PlanError."""
        self._bound.clear()
        self._memory.clear()
        self.program = self.program.emptied()


def _get(arrays: Mapping[str, Any], name: str, variant: Variant) -> Any:
    if name not in arrays:
        raise PlanError(
            f"expected a tensor of {variant} out of {', '.join(arrays)} but got {name!r}; if another version of pyengine made the "
            "bundle, export it again"
        )
    return arrays[name]
