"""One variant bound to memory: the walk of a run, segment, op, segment, ... as flat lists of calls.

The same walk runs on the host and on a GPU. What differs, where arrays live and how a step is called, comes
from a Memory and an Ops.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

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

    def op(self, name: str, *inputs: Any, **others: Any) -> Call:
        """One of our kernels by its name. `inputs` in the order of the ONNX op, None where one is absent; `others` are
        what it writes, and its attributes.
        """
        ...


class HostOps:
    """Engines of a CPU backend, and our kernels on numpy arrays."""

    def segment(self, engine: Engine, inputs: Arrays, outputs: Arrays) -> Call:
        return engine.bind(inputs, outputs)

    def op(self, name: str, *inputs: Any, **others: Any) -> Call:
        return partial(getattr(_C, name), *inputs, **others)


class Walk:
    """The calls of one variant, one list per parity of the state, and the arrays that callers read and write."""

    def __init__(self, program: Program, variant: Variant, memory: Memory, ops: Ops) -> None:
        self.memory, self.ops = memory, ops
        self.component: Component = program.bundle.component(variant.component)
        self._program, self._variant = program, variant
        self.streams = variant.symbols.get("streams", 1)
        self.rings: dict[str, list[Any]] = {}  # by name, the table that ops read: one ring per stream
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
        outer = {*self.inputs, *self.rings, *outputs, *states, *self.component.state.values()}
        inner = self._inner(steps, outer)
        self.calls: list[list[tuple[str, Call]]] = []
        for parity in (0, 1) if states else (0,):
            swapped = {name: pair[parity] for name, pair in states.items()}
            swapped |= {self.component.state[name]: pair[1 - parity] for name, pair in states.items()}
            arrays = {
                **program.constants(variant),
                **self.inputs,
                **self.rings,
                **outputs,
                **inner,
                **swapped,
            }
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
                self.rings[name] = memory.ring(name, port, self.streams)
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
                ports = (
                    {name: self._whole(name, arrays[name]) for name in names}
                    for names in (step.inputs, step.outputs)
                )
                calls.append(("segments", ops.segment(next(engines), *ports)))
            elif step.kind == "append":
                inputs = [arrays[name] for name in step.inputs]  # key, value, ring_key, ring_value
                calls.append(("ops", ops.op("ring_append", *inputs, arrays[APPEND_SLOT])))
            elif step.op is not None and hasattr(_C, kernel_name(step.op)):
                calls.append(("ops", self._kernel(step, arrays)))
            else:
                raise PlanError(
                    f"this pyengine does not know the op {step.op or step.kind!r}: install the version "
                    "that made the bundle"
                )
        return calls

    def _whole(self, name: str, array: Any) -> Any:
        """What a compiler's segment reads. A ring is one array there, so only a stream that runs alone may inline it."""
        if name not in self.rings:
            return array
        if self.streams > 1:
            raise PlanError(
                f"{self._variant} reads the ring {name} inside a compiled segment, which cannot find the rings of several "
                "streams: build it with choice 'cut'"
            )
        return array[0]

    def _kernel(self, step: Step, arrays: Arrays) -> Call:
        """The kernel on fixed arrays. One that reads a ring also appends to it in place."""
        assert step.op is not None
        inputs = [arrays[name] if name else None for name in step.inputs]
        others: dict[str, Any] = {"out": arrays[step.outputs[0]], **step.attributes}
        if any(name in self.rings for name in step.inputs):
            others["append_slot"] = arrays[APPEND_SLOT]
        return self.ops.op(kernel_name(step.op), *inputs, **others)


def kernel_name(op: str) -> str:
    """The kernel of an ONNX op: `FrameWindowAttention` is `frame_window_attention`."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", op).lower()
