"""Turns the steps of a walk into work on a CUDA stream."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from pyengine import _C
from pyengine.backends.base import Port
from pyengine.device.array import DeviceArray
from pyengine.device.cuda import Stream
from pyengine.errors import BackendUnavailable
from pyengine.runtime.bound_plan import Arrays, Call
from pyengine.runtime.cuda.memory import CudaMemory, RingTable

LARGEST_FP8 = 448.0  # of e4m3
VALUE_LIMIT = 64.0  # larger values are clipped; down to 0.002 they keep their three bits of mantissa


def kernels() -> Any:
    """The compiled CUDA ops. Raises BackendUnavailable where this installation was built without them."""
    try:
        from pyengine import _cuda  # type: ignore[attr-defined,unused-ignore]
    except ImportError as error:
        raise BackendUnavailable(
            f"this installation has no CUDA kernels ({error}): install pyengine again where nvcc is on the PATH, with "
            "--config-settings=cmake.define.PYENGINE_CUDA=ON, or build the plan with choice 'inline', which needs none"
        ) from error
    return _cuda


class CudaOps:
    """Everything is enqueued on the stream of one component, in the order of the walk."""

    def __init__(self, memory: CudaMemory, stream: Stream | None = None) -> None:
        self._memory, self._stream = memory, stream or memory.stream

    def on(self, stream: Stream) -> CudaOps:
        """The same, enqueued on another stream."""
        return CudaOps(self._memory, stream)

    def segment(self, engine: Any, inputs: Arrays, outputs: Arrays) -> Call:
        """An engine of a CUDA backend (`backends.CudaEngine`)."""
        call: Call = engine.bind(inputs, outputs, self._stream, self._memory.arena)
        return call

    def op(self, name: str, *inputs: Any, **others: Any) -> Call:
        """One of our kernels by its name, with the workspace that it asks for and the scales of an 8-bit ring."""
        module = kernels()
        arrays = dict(zip(_C.SIGNATURES[name]["inputs"], inputs, strict=False))
        arrays = {key: array for key, array in arrays.items() if array is not None} | others
        ring_key = arrays.get("ring_key")
        if ring_key is not None and ring_key.dtype == "float8_e4m3":
            arrays |= self._scales(ring_key, arrays.get("k_gain"))
        workspace_bytes = getattr(module, f"{name}_workspace", None)
        if workspace_bytes is not None and (nbytes := workspace_bytes(**arrays)):
            arrays["workspace"] = self._memory.workspace(nbytes)
        return partial(getattr(module, name), **arrays, stream=self._stream.handle)

    def _scales(self, ring_key: RingTable, k_gain: DeviceArray | None) -> dict[str, DeviceArray]:
        """Makes the scales of an 8-bit ring, float32 [heads]. e4m3 has 15 octaves of normal numbers, so that a scale has to be right
        within some octaves only: that of normalised keys follows from their largest possible value, no calibration.
        """
        heads, head_size = ring_key.shape[-2:]
        key_limit = VALUE_LIMIT if k_gain is None else float(np.abs(_floats(k_gain)).max()) * head_size**0.5
        scales = {}
        for name, limit in (("ring_key_scale", key_limit), ("ring_value_scale", VALUE_LIMIT)):
            scales[name] = self._memory.new(Port((heads,), "float32"))
            scales[name][...] = np.full(heads, limit / LARGEST_FP8, np.float32)
        return scales


def _floats(array: DeviceArray) -> np.ndarray:
    """A gain as float32 on the host."""
    host = array.numpy()
    return (
        (host.astype(np.uint32) << 16).view(np.float32)
        if array.dtype == "bfloat16"
        else host.astype(np.float32)
    )
