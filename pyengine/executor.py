"""Runs a plan. The scheduler decides, the executor obeys: every buffer exists before the first run, and a run is a loop over calls.

    program = Program(plan)                      # compiled engines and weights: shared by streams and threads
    executor = Executor(program)                 # the buffers of one stream
    executor.input(variant, "latents")[...] = x  # views of the very memory that the engines read
    executor.run(variant)
    executor.output(variant, "velocity")
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from time import perf_counter
from typing import Any

import numpy as np

from . import _C, plan
from .backends import Engine, Port
from .bundle import Component, Step
from .errors import PlanError, ShapeError
from .plan import Plan, Variant

ALIGNMENT = 64
APPEND_SLOT = "append_slot"
Call = Callable[[], object]
Arrays = dict[str, np.ndarray]


class Program:
    """A plan with its engines loaded and the weights that our ops read. Immutable, so threads may share it."""

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
            arrays[name] = np.fromfile(path, constant.dtype, count, offset=constant.offset).reshape(constant.shape)
        return arrays


class Executor:
    """The buffers and requests of one stream. Its components may run at the same time in different threads, each in one at a time."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._memory = {name: _Memory() for name in {variant.component for variant in program.variants}}
        self._bound = {variant: _BoundVariant(program, variant, self._memory[variant.component]) for variant in program.variants}

    def run(self, variant: Variant) -> None:
        """Runs a variant on what its inputs hold, then lets its state advance."""
        try:
            bound = self._bound[variant]
        except KeyError:
            raise PlanError(f"this executor has no variant {variant}, only {', '.join(map(str, self._bound)) or 'none'}") from None
        bound.run()

    def input(self, variant: Variant, name: str) -> np.ndarray:
        """The memory of an input. Variants of a component share an input of equal shape; bf16 comes as uint16."""
        return _get(self.inputs(variant), name, variant)

    def output(self, variant: Variant, name: str) -> np.ndarray:
        """The memory of an output, overwritten by the next run."""
        return _get(self._bound[variant].outputs, name, variant)

    def inputs(self, variant: Variant) -> Arrays:
        """Every input of a variant by name, without its state; with `append_slot` where there is a ring."""
        return self._bound[variant].inputs

    def state(self) -> Arrays:
        """Copies of all that a later run depends on: rings, and the state of streaming components, as `component/name`."""
        return {f"{name}/{key}": array.copy() for name, memory in self._memory.items() for key, array in memory.state().items()}

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Puts back what `state()` returned. Raises ShapeError, and changes nothing, where it does not fit this plan."""
        own = {f"{name}/{key}": array for name, memory in self._memory.items() for key, array in memory.state().items()}
        if set(own) != set(state):
            odd = ", ".join(sorted(set(own) ^ set(state)))
            raise ShapeError(f"expected a state with the same arrays as this plan but these differ: {odd}")
        for key, array in own.items():
            given = state[key]
            if given.shape != array.shape or given.dtype != array.dtype:
                raise ShapeError(f"expected state {key} as {array.dtype} {array.shape} but got {given.dtype} {given.shape}")
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


class _Memory:
    """The buffers of one component, shared by its variants: inputs by name and shape, state in pairs, scratch by size."""

    def __init__(self) -> None:
        self._named: dict[tuple[str, tuple[int, ...]], np.ndarray] = {}
        self._states: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self._rings: set[str] = set()
        self._scratch: dict[int, list[np.ndarray]] = {}
        self._nbytes = 0
        self.parity = 0

    @property
    def nbytes(self) -> int:
        return self._nbytes

    def named(self, name: str, port: Port) -> np.ndarray:
        place = (name, port.shape)
        if place not in self._named:
            self._named[place] = self.new(port)
        return self._named[place]

    def ring(self, name: str, port: Port) -> np.ndarray:
        if any(known == name and shape != port.shape for known, shape in self._named):
            raise PlanError(f"expected every variant to give the ring {name} the same shape but got another, {list(port.shape)}")
        self._rings.add(name)
        return self.named(name, port)

    def pair(self, name: str, port: Port) -> tuple[np.ndarray, np.ndarray]:
        """Two buffers of a state: a run reads one and writes the other, then they change places."""
        if name not in self._states:
            self._states[name] = (self.new(port), self.new(port))
        if self._states[name][0].shape != port.shape:
            raise PlanError(f"expected every variant to give the state {name} the same shape but got another, {list(port.shape)}")
        return self._states[name]

    def scratch(self, sizes: Sequence[int]) -> list[np.ndarray]:
        """Raw buffers of these sizes, none twice; the next call gets the same ones."""
        used: dict[int, int] = {}
        taken = []
        for size in sizes:
            pool = self._scratch.setdefault(size, [])
            index = used[size] = used.get(size, -1) + 1
            if index == len(pool):
                pool.append(self.new(Port((size,), "uint8")))
            taken.append(pool[index])
        return taken

    def state(self) -> Arrays:
        rings = {name: array for (name, _), array in self._named.items() if name in self._rings}
        return rings | {name: pair[self.parity] for name, pair in self._states.items()}

    def new(self, port: Port) -> np.ndarray:
        """A zeroed array that starts on a cache line."""
        dtype = port.array_dtype
        size = int(np.prod(port.shape, dtype=np.int64)) * dtype.itemsize
        raw = np.zeros(size + ALIGNMENT, np.uint8)
        start = -raw.ctypes.data % ALIGNMENT
        self._nbytes += raw.nbytes
        return raw[start : start + size].view(dtype).reshape(port.shape)


class _BoundVariant:
    """One variant bound to memory: flat lists of calls, one per parity of the state."""

    def __init__(self, program: Program, variant: Variant, memory: _Memory) -> None:
        self.memory = memory
        self.component: Component = program.bundle.component(variant.component)
        self._program, self._variant = program, variant
        self._specs = plan.specs(self.component, program.plan.part(variant).choice)
        self.seconds = {"segments": 0.0, "ops": 0.0, "runs": 0.0}
        steps = program.plan.graph(variant).steps
        states = {name: memory.pair(name, self._port(name)) for name in self.component.state}
        self.inputs = self._inputs(memory)
        made = {name for step in steps for name in step.outputs} & set(self.component.outputs)
        outputs = {name: memory.new(self._port(name)) for name in sorted(made - set(self.component.state.values()))}
        self.outputs = outputs
        inner = self._inner(steps, {*self.inputs, *outputs, *states, *self.component.state.values()})
        self._calls: list[list[tuple[str, Call]]] = []
        for parity in (0, 1) if states else (0,):
            swapped = {name: pair[parity] for name, pair in states.items()}
            swapped |= {self.component.state[name]: pair[1 - parity] for name, pair in states.items()}
            arrays = {**program.constants(variant), **self.inputs, **outputs, **inner, **swapped}
            self._calls.append(self._bind(steps, arrays))
        if states and len(self._calls) == 2:
            self._flip = 1
        else:
            self._flip = 0

    def run(self) -> None:
        seconds, memory = self.seconds, self.memory
        start = previous = perf_counter()
        for kind, call in self._calls[memory.parity if self._flip else 0]:
            call()
            now = perf_counter()
            seconds[kind] += now - previous
            previous = now
        memory.parity ^= self._flip
        seconds["runs"] += perf_counter() - start

    def _port(self, name: str) -> Port:
        return self._program.plan.port(self._variant, self._specs[name])

    def _inputs(self, memory: _Memory) -> Arrays:
        component = self.component
        arrays: Arrays = {}
        for name in component.inputs:
            if name in component.ring:
                arrays[name] = memory.ring(name, self._port(name))
            elif name not in component.state:
                arrays[name] = memory.named(name, self._port(name))
        if component.append_spec is not None:
            arrays[APPEND_SLOT] = memory.named(APPEND_SLOT, self._program.plan.port(self._variant, component.append_spec))
            arrays[APPEND_SLOT][...] = -1
        return arrays

    def _inner(self, steps: Sequence[Step], outer: set[str]) -> Arrays:
        """Buffers for what crosses between steps. One is reused as soon as its last reader has run: less memory, warmer caches."""
        last = {name: index for index, step in enumerate(steps) for name in (*step.inputs, *step.outputs)}
        ports = {name: self._port(name) for step in steps for name in step.outputs if name not in outer and name in self._specs}
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
        return {name: buffers[place].view(ports[name].array_dtype).reshape(ports[name].shape) for name, place in places.items()}

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
                calls.append(("ops", partial(_C.ring_append, *(arrays[name] for name in step.inputs), arrays[APPEND_SLOT])))
            elif step.op == "FrameWindowAttention":
                calls.append(("ops", _frame_window_attention(step, arrays)))
            else:
                raise PlanError(f"this pyengine does not know the op {step.op or step.kind!r}: install the version that made the bundle")
        return calls


def _frame_window_attention(step: Step, arrays: Arrays) -> Call:
    """The kernel on fixed arrays, which also appends to the ring in place."""
    names = [*step.inputs, *[""] * (9 - len(step.inputs))]
    given = [arrays[name] if name else None for name in names]
    attributes: dict[str, Any] = dict(step.attributes)
    attributes["interleaved"] = bool(attributes.get("interleaved", 1))
    return partial(
        _C.frame_window_attention,
        *given[:6],
        arrays[step.outputs[0]],
        append_slot=arrays.get(APPEND_SLOT),
        q_gain=given[6],
        k_gain=given[7],
        reach=given[8],
        **attributes,
    )


def _get(arrays: Arrays, name: str, variant: Variant) -> np.ndarray:
    if name not in arrays:
        raise PlanError(f"expected a tensor of {variant} out of {', '.join(arrays)} but got {name!r}")
    return arrays[name]
