"""Runs a plan. The scheduler decides, the executor obeys: every buffer exists before the first run, and a run
is a loop over calls.

    program = Program(plan)                      # compiled engines and weights: shared by streams and threads
    executor = Executor(program)                 # the buffers of one stream
    executor.input(variant, "latents")[...] = x  # views of the very memory that the engines read
    executor.run(variant)
    executor.output(variant, "velocity")

Nothing is copied between steps, and a run allocates nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from time import perf_counter
from typing import Any

import numpy as np

from . import _C, plan
from .backends import Engine, Port
from .buffers import Arrays, Memory
from .bundle import Component, Step
from .errors import PlanError, ShapeError
from .plan import Plan, Variant

APPEND_SLOT = "append_slot"
Call = Callable[[], object]


class Program:
    """A plan with its engines loaded and the weights that our ops read. Threads may share it."""

    def __init__(self, source: Plan) -> None:
        self.plan = source
        self.bundle = source.bundle
        self.variants = tuple(source.parts)
        self._engines = {variant: source.engines(variant) for variant in self.variants}
        self._constants = {variant: self._read(variant) for variant in self.variants}

    def engines(self, variant: Variant) -> Sequence[Engine]:
        return self._engines[variant]

    def constants(self, variant: Variant) -> Arrays:
        return self._constants[variant]

    def _read(self, variant: Variant) -> Arrays:
        arrays = {}
        for name, constant in self.plan.graph(variant).constants.items():
            count = int(np.prod(constant.shape, dtype=np.int64))
            path = self.bundle.path(constant.file)
            arrays[name] = np.fromfile(path, constant.dtype, count, offset=constant.offset).reshape(
                constant.shape
            )
        return arrays


class Executor:
    """The buffers and requests of one stream. Its components may run at the same time in different threads,
    each in one at a time.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self._memory = {name: Memory() for name in {variant.component for variant in program.variants}}
        # The largest first: the others find room in its scratch.
        order = sorted(program.variants, key=lambda variant: -sum(variant.symbols.values()))
        self._bound = {
            variant: _BoundVariant(program, variant, self._memory[variant.component]) for variant in order
        }

    def run(self, variant: Variant) -> None:
        """Runs a variant on what its inputs hold, then lets its state advance."""
        try:
            bound = self._bound[variant]
        except KeyError:
            raise PlanError(
                f"this executor has no variant {variant}, only {', '.join(map(str, self._bound)) or 'none'}"
            ) from None
        bound.run()

    def input(self, variant: Variant, name: str) -> np.ndarray:
        """The memory of an input. Variants of a component share an input of equal shape; bf16 comes as
        uint16.
        """
        return _get(self.inputs(variant), name, variant)

    def output(self, variant: Variant, name: str) -> np.ndarray:
        """The memory of an output, overwritten by the next run."""
        return _get(self._bound[variant].outputs, name, variant)

    def inputs(self, variant: Variant) -> Arrays:
        """Every input of a variant by name, without its state; with `append_slot` where there is a ring."""
        return self._bound[variant].inputs

    def state(self) -> Arrays:
        """Copies of all that a later run depends on: rings, and the state of streaming components, as
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
            f"{name}/{key}": array
            for name, memory in self._memory.items()
            for key, array in memory.state().items()
        }
        if set(own) != set(state):
            odd = ", ".join(sorted(set(own) ^ set(state)))
            raise ShapeError(f"expected a state with the same arrays as this plan but these differ: {odd}")
        for key, array in own.items():
            given = state[key]
            if given.shape != array.shape or given.dtype != array.dtype:
                raise ShapeError(
                    f"expected state {key} as {array.dtype} {array.shape} but got {given.dtype} {given.shape}"
                )
        for key, array in own.items():
            array[...] = state[key]

    def reset(self) -> None:
        """Zeroes rings and states, as for a new stream."""
        for memory in self._memory.values():
            for array in memory.state().values():
                array[...] = 0

    @property
    def seconds(self) -> dict[str, float]:
        """Time spent so far in `segments` (the backend), in `ops` (our kernels), and in `runs` as a whole."""
        totals = {"segments": 0.0, "ops": 0.0, "runs": 0.0}
        for bound in self._bound.values():
            for key, value in bound.seconds.items():
                totals[key] += value
        return totals

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(memory.nbytes for memory in self._memory.values())

    def close(self) -> None:
        """Frees every buffer and request. Using the executor afterwards raises PlanError."""
        self._bound.clear()
        self._memory.clear()


class _BoundVariant:
    """One variant bound to memory: flat lists of calls, one per parity of the state."""

    def __init__(self, program: Program, variant: Variant, memory: Memory) -> None:
        self.memory = memory
        self.component: Component = program.bundle.component(variant.component)
        self._program, self._variant = program, variant
        self._specs = plan.specs(self.component, program.plan.part(variant).choice)
        self.seconds = {"segments": 0.0, "ops": 0.0, "runs": 0.0}
        steps = program.plan.graph(variant).steps
        states = {name: memory.pair(name, self._port(name)) for name in self.component.state}
        self.inputs = self._inputs(memory)
        made = {name for step in steps for name in step.outputs} & set(self.component.outputs)
        outputs = {
            name: memory.new(self._port(name)) for name in sorted(made - set(self.component.state.values()))
        }
        self.outputs = outputs
        inner = self._inner(steps, {*self.inputs, *outputs, *states, *self.component.state.values()})
        self._calls: list[list[tuple[str, Call]]] = []
        for parity in (0, 1) if states else (0,):
            swapped = {name: pair[parity] for name, pair in states.items()}
            swapped |= {self.component.state[name]: pair[1 - parity] for name, pair in states.items()}
            arrays = {**program.constants(variant), **self.inputs, **outputs, **inner, **swapped}
            self._calls.append(self._bind(steps, arrays))
        self._flip = len(self._calls) - 1

    def run(self) -> None:
        seconds, memory = self.seconds, self.memory
        start = previous = perf_counter()
        for kind, call in self._calls[memory.parity]:
            call()
            now = perf_counter()
            seconds[kind] += now - previous
            previous = now
        memory.parity ^= self._flip
        seconds["runs"] += perf_counter() - start

    def _port(self, name: str) -> Port:
        return self._program.plan.port(self._variant, self._specs[name])

    def _inputs(self, memory: Memory) -> Arrays:
        component = self.component
        arrays: Arrays = {}
        for name in component.inputs:
            if name in component.ring:
                arrays[name] = memory.ring(name, self._port(name))
            elif name not in component.state:
                arrays[name] = memory.named(name, self._port(name))
        if component.append_spec is not None:
            arrays[APPEND_SLOT] = memory.named(
                APPEND_SLOT, self._program.plan.port(self._variant, component.append_spec)
            )
            arrays[APPEND_SLOT][...] = -1
        return arrays

    def _inner(self, steps: Sequence[Step], outer: set[str]) -> Arrays:
        """Buffers for what crosses between steps. One is reused as soon as its last reader has run: less
        memory, warmer caches.
        """
        last = {name: index for index, step in enumerate(steps) for name in (*step.inputs, *step.outputs)}
        ports = {
            name: self._port(name)
            for step in steps
            for name in step.outputs
            if name not in outer and name in self._specs
        }
        free: dict[int, list[int]] = {}
        places: dict[str, int] = {}
        sizes: list[int] = []
        for index, step in enumerate(steps):
            for name in step.outputs:
                if name in ports and name not in places:
                    size = int(np.prod(ports[name].shape, dtype=np.int64)) * ports[name].array_dtype.itemsize
                    if not free.get(size):
                        sizes.append(size)
                        free.setdefault(size, []).append(len(sizes) - 1)
                    places[name] = free[size].pop()
            for name in places:
                if last[name] == index:
                    free.setdefault(sizes[places[name]], []).append(places[name])
        buffers = self.memory.scratch(sizes)
        raw = {name: buffers[place][: sizes[place]] for name, place in places.items()}
        return {
            name: array.view(ports[name].array_dtype).reshape(ports[name].shape)
            for name, array in raw.items()
        }

    def _bind(self, steps: Sequence[Step], arrays: Arrays) -> list[tuple[str, Call]]:
        engines = iter(self._program.engines(self._variant))
        calls: list[tuple[str, Call]] = []
        for step in steps:
            if step.kind == "segment":
                ports = ({name: arrays[name] for name in names} for names in (step.inputs, step.outputs))
                calls.append(("segments", next(engines).bind(*ports)))
            elif step.kind == "copy":
                calls.append(("ops", partial(np.copyto, arrays[step.outputs[0]], arrays[step.inputs[0]])))
            elif step.kind == "append":
                key, value, ring_key, ring_value = (arrays[name] for name in step.inputs)
                append = partial(_C.ring_append, key, value, ring_key, ring_value, arrays[APPEND_SLOT])
                calls.append(("ops", append))
            elif step.op == "FrameWindowAttention":
                calls.append(("ops", _frame_window_attention(step, arrays)))
            else:
                raise PlanError(
                    f"this pyengine does not know the op {step.op or step.kind!r}: install the version "
                    "that made the bundle"
                )
        return calls


def _frame_window_attention(step: Step, arrays: Arrays) -> Call:
    """The kernel on fixed arrays, which also appends to the ring in place."""
    names = [*step.inputs, *[""] * (9 - len(step.inputs))]
    qkv, level, frame_index, ring_key, ring_value, ring_index, *optional = names
    q_gain, k_gain, reach = (arrays[name] if name else None for name in optional)
    ring = (
        [arrays[name] for name in (ring_key, ring_value, ring_index)] if ring_index else _no_ring(arrays[qkv])
    )
    attributes: dict[str, Any] = dict(step.attributes)
    attributes["interleaved"] = bool(attributes.get("interleaved", 1))
    attributes |= {"append_slot": arrays.get(APPEND_SLOT), "q_gain": q_gain, "k_gain": k_gain, "reach": reach}
    return partial(
        _C.frame_window_attention,
        arrays[qkv],
        arrays[level],
        arrays[frame_index],
        *ring,
        arrays[step.outputs[0]],
        **attributes,
    )


def _no_ring(qkv: np.ndarray) -> list[np.ndarray]:
    """Keys, values and indices of no slots at all, for a network whose context is recomputed."""
    batch, _, tokens, _, heads, head_dim = qkv.shape
    nothing = np.zeros((batch, 0, tokens, heads, head_dim), qkv.dtype)
    return [nothing, nothing, np.zeros(0, np.int64)]


def _get(arrays: Arrays, name: str, variant: Variant) -> np.ndarray:
    if name not in arrays:
        raise PlanError(f"expected a tensor of {variant} out of {', '.join(arrays)} but got {name!r}")
    return arrays[name]
