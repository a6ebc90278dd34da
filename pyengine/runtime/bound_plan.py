"""One variant bound to memory: the walk of a run, segment, op, segment, ... as flat lists of calls.

The same walk runs on the host and on a card. What differs, where arrays live and how a step is called, comes
from a Memory and an Ops.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from pyengine import _C
from pyengine.backends.base import Engine, Port
from pyengine.bundle.bundle import Component, Step
from pyengine.bundle.variant import Variant
from pyengine.errors import PlanError
from pyengine.plans import plan
from pyengine.runtime.host.memory import Memory

if TYPE_CHECKING:
    from pyengine.runtime.program import Program

APPEND_SLOT = "append_slot"
Call = Callable[[], object]
Arrays = Mapping[str, Any]  # numpy arrays, or device arrays


class Ops(Protocol):
    """How the steps of a walk become calls on fixed arrays."""

    def segment(self, engine: Engine, inputs: Arrays, outputs: Arrays) -> Call: ...

    def copy(self, target: Any, source: Any) -> Call:
        """`source` broadcast to `target` along leading axes."""
        ...

    def ring_append(self, *arrays: Any) -> Call: ...

    def frame_window_attention(self, *arrays: Any, **attributes: Any) -> Call: ...

    def relative_attention(self, *arrays: Any, **attributes: Any) -> Call: ...


class HostOps:
    """Engines of a CPU backend, and our kernels on numpy arrays."""

    def segment(self, engine: Engine, inputs: Arrays, outputs: Arrays) -> Call:
        return engine.bind(inputs, outputs)

    def copy(self, target: np.ndarray, source: np.ndarray) -> Call:
        return partial(np.copyto, target, source)

    def ring_append(self, *arrays: np.ndarray) -> Call:
        return partial(_C.ring_append, *arrays)

    def frame_window_attention(self, *arrays: np.ndarray, **attributes: Any) -> Call:
        return partial(_C.frame_window_attention, *arrays, **attributes)

    def relative_attention(self, *arrays: np.ndarray, **attributes: Any) -> Call:
        return partial(_C.relative_attention, *arrays, **attributes)


class Walk:
    """The calls of one variant, one list per parity of the state, and the arrays that callers read and write."""

    def __init__(self, program: Program, variant: Variant, memory: Memory, ops: Ops) -> None:
        self.memory, self.ops = memory, ops
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
        self.calls: list[list[tuple[str, Call]]] = []
        for parity in (0, 1) if states else (0,):
            swapped = {name: pair[parity] for name, pair in states.items()}
            swapped |= {self.component.state[name]: pair[1 - parity] for name, pair in states.items()}
            arrays = {**program.constants(variant), **self.inputs, **outputs, **inner, **swapped}
            self.calls.append(self._bind(steps, arrays))
        self.flip = len(self.calls) - 1

    def _port(self, name: str) -> Port:
        return self._program.plan.port(self._variant, self._specs[name])

    def _inputs(self, memory: Memory) -> dict[str, Any]:
        component = self.component
        arrays: dict[str, Any] = {}
        for name in component.inputs:
            if name in component.ring:
                port = self._program.plan.ring_port(self._variant, self._specs[name])
                arrays[name] = memory.ring(name, port)
            elif name not in component.state:
                arrays[name] = memory.named(name, self._port(name))
        if component.append_spec is not None:
            port = self._program.plan.port(self._variant, component.append_spec)
            arrays[APPEND_SLOT] = memory.named(APPEND_SLOT, port)
            memory.host(arrays[APPEND_SLOT])[...] = -1
        return arrays

    def _inner(self, steps: Sequence[Step], outer: set[str]) -> dict[str, Any]:
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
                    size = ports[name].nbytes
                    if not free.get(size):
                        sizes.append(size)
                        free.setdefault(size, []).append(len(sizes) - 1)
                    places[name] = free[size].pop()
            for name in places:
                if last[name] == index:
                    free.setdefault(sizes[places[name]], []).append(places[name])
        buffers = self.memory.scratch(sizes)
        return {name: self.memory.view(buffers[place], ports[name]) for name, place in places.items()}

    def _bind(self, steps: Sequence[Step], arrays: Arrays) -> list[tuple[str, Call]]:
        engines = iter(self._program.engines(self._variant))
        ops = self.ops
        calls: list[tuple[str, Call]] = []
        for step in steps:
            if step.kind == "segment":
                ports = ({name: arrays[name] for name in names} for names in (step.inputs, step.outputs))
                calls.append(("segments", ops.segment(next(engines), *ports)))
            elif step.kind == "copy":
                calls.append(("ops", ops.copy(arrays[step.outputs[0]], arrays[step.inputs[0]])))
            elif step.kind == "append":
                rings = (arrays[name] for name in step.inputs)  # key, value, ring_key, ring_value
                calls.append(("ops", ops.ring_append(*rings, arrays[APPEND_SLOT])))
            elif step.op == "FrameWindowAttention":
                calls.append(("ops", self._attention(step, arrays)))
            elif step.op == "RelativeAttention":
                tensors = [arrays[name] for name in step.inputs]
                transposed = bool(step.attributes.get("transposed", 0))
                out = arrays[step.outputs[0]]
                calls.append(("ops", ops.relative_attention(*tensors, out=out, transposed=transposed)))
            else:
                raise PlanError(
                    f"this pyengine does not know the op {step.op or step.kind!r}: install the version "
                    "that made the bundle"
                )
        return calls

    def _attention(self, step: Step, arrays: Arrays) -> Call:
        """The kernel on fixed arrays, which also appends to the ring in place."""
        names = [*step.inputs, *[""] * (9 - len(step.inputs))]
        q_gain, k_gain, reach = (arrays[name] if name else None for name in names[6:])
        attributes: dict[str, Any] = dict(step.attributes)
        attributes["interleaved"] = bool(attributes.get("interleaved", 1))
        attributes |= {
            "append_slot": arrays.get(APPEND_SLOT),
            "q_gain": q_gain,
            "k_gain": k_gain,
            "reach": reach,
        }
        qkv = arrays[names[0]]
        ring = [arrays[name] for name in names[3:6]] if names[5] else self._no_ring(names[0])
        tensors = (qkv, arrays[names[1]], arrays[names[2]], *ring, arrays[step.outputs[0]])
        return self.ops.frame_window_attention(*tensors, **attributes)

    def _no_ring(self, qkv: str) -> list[Any]:
        """Keys, values and indices of no slots at all, for a network whose context is recomputed."""
        port = self._port(qkv)
        batch, _, tokens, _, heads, head_size = port.shape
        nothing = Port((batch, 0, tokens, heads, head_size), port.dtype)
        return [self.memory.new(nothing), self.memory.new(nothing), self.memory.new(Port((0,), "int64"))]
