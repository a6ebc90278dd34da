"""The memory of one stream: every array that a run touches, allocated before the first run.

`Memory` is numpy on the host; `pyengine.runtime.cuda.memory` is the same on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pyengine.backends.base import Port
from pyengine.errors import PlanError

ALIGNMENT = 64  # a cache line
Arrays = dict[str, np.ndarray]


class Memory:
    """The buffers of one component, shared by its variants: inputs by name and shape, state in pairs, scratch
    by size.
    """

    def __init__(self) -> None:
        self._named: dict[tuple[str, tuple[int, ...]], Any] = {}
        self._states: dict[str, tuple[Any, Any]] = {}
        self._rings: dict[str, Any] = {}
        self._scratch: list[Any] = []
        self._nbytes = 0
        self.parity = 0

    @property
    def nbytes(self) -> int:
        return self._nbytes

    def named(self, name: str, port: Port) -> Any:
        """The input of that name and shape, one for all variants."""
        place = (name, port.shape)
        if place not in self._named:
            self._named[place] = self.new(port)
        return self._named[place]

    def ring(self, name: str, port: Port, streams: int) -> list[Any]:
        """The table through which a variant finds a ring: for every stream of its calls, that stream's own
        [branches, ring, ...]. `port` is of all streams together. At first each entry is the component's own ring.
        """
        shape = (port.shape[0] // streams, *port.shape[1:])
        own = self._rings.get(name)
        if own is None:
            own = self._rings[name] = self.new(Port(shape, port.dtype))
        if tuple(own.shape) != shape:
            raise PlanError(
                f"expected every variant to give the ring {name} the same shape but got another, {list(shape)}"
            )
        return [own] * streams

    @property
    def rings(self) -> dict[str, Any]:
        """The component's own rings, of a stream that runs alone: [branches, ring, tokens, heads, head_dim] each."""
        return dict(self._rings)

    def new_rings(self) -> dict[str, Any]:
        """Rings for one more stream of a batch, zeroed."""
        return {name: self.like(own) for name, own in self._rings.items()}

    def like(self, array: Any) -> Any:
        """A zeroed array of the same shape and dtype."""
        return self.new(Port(array.shape, "bf16" if array.dtype == np.uint16 else str(array.dtype)))

    def pair(self, name: str, port: Port) -> tuple[Any, Any]:
        """Two buffers of a state: a run reads one and writes the other, then they change places."""
        if name not in self._states:
            self._states[name] = (self.new(port), self.new(port))
        if self._states[name][0].shape != port.shape:
            raise PlanError(
                f"expected every variant to give the state {name} the same shape but got another, "
                f"{list(port.shape)}"
            )
        return self._states[name]

    def scratch(self, sizes: Sequence[int]) -> list[Any]:
        """Raw buffers of at least these bytes, none twice. Variants never run at the same time, so they get
        the same ones.
        """
        free = sorted(self._scratch, key=len)
        taken: dict[int, Any] = {}
        for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
            fit = next((place for place, buffer in enumerate(free) if len(buffer) >= sizes[index]), None)
            if fit is None:
                self._scratch.append(self.new(Port((sizes[index],), "uint8")))
                taken[index] = self._scratch[-1]
            else:
                taken[index] = free.pop(fit)
        return [taken[index] for index in range(len(sizes))]

    def view(self, raw: Any, port: Port) -> Any:
        """The first bytes of a raw buffer as the port's array."""
        array: np.ndarray = raw[: port.nbytes].view(port.array_dtype).reshape(port.shape)
        return array

    def host(self, array: Any) -> Any:
        """What the host writes to, so that the next run reads it in `array`: here the array itself."""
        return array

    def host_dtype(self, array: Any) -> np.dtype:
        """numpy's dtype of a copy of the array."""
        dtype: np.dtype = array.dtype
        return dtype

    def state(self) -> dict[str, Any]:
        return {name: pair[self.parity] for name, pair in self._states.items()}

    def new(self, port: Port) -> Any:
        """A zeroed array that starts on a cache line."""
        dtype = port.array_dtype
        size = port.nbytes
        raw = np.zeros(size + ALIGNMENT, np.uint8)
        start = -raw.ctypes.data % ALIGNMENT
        self._nbytes += raw.nbytes
        return raw[start : start + size].view(dtype).reshape(port.shape)
