"""The steps of a walk as work on a CUDA stream."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from pyengine.backends.base import Port
from pyengine.device.array import DeviceArray
from pyengine.errors import BackendUnavailable
from pyengine.runtime.bound_plan import Arrays, Call
from pyengine.runtime.cuda.memory import CudaMemory

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

    def __init__(self, memory: CudaMemory) -> None:
        self._memory, self._stream = memory, memory.stream

    def segment(self, engine: Any, inputs: Arrays, outputs: Arrays) -> Call:
        """An engine of a CUDA backend (`backends.base.CudaEngine`)."""
        call: Call = engine.bind(inputs, outputs, self._stream, self._memory.arena)
        return call

    def copy(self, target: DeviceArray, source: DeviceArray) -> Call:
        repeats = target.nbytes // source.nbytes
        flat = target.view((repeats, *source.shape), target.dtype)
        enqueue = self._stream.cuda.copy

        def call() -> None:
            for part in flat:
                enqueue(part.pointer, source.pointer, source.nbytes, self._stream)

        return call

    def ring_append(self, *arrays: DeviceArray) -> Call:
        return partial(kernels().ring_append, *arrays, stream=self._stream.handle)

    def frame_window_attention(self, *arrays: DeviceArray, **attributes: Any) -> Call:
        module = kernels()
        qkv, ring_key = arrays[0], arrays[3]
        scope = attributes.get("scope", "temporal")
        nbytes = module.frame_window_attention_workspace(qkv, ring_key, scope=scope)
        workspace = self._memory.workspace(nbytes) if nbytes else None
        if ring_key.dtype == "float8_e4m3":
            attributes |= self._scales(ring_key, attributes.get("k_gain"))
        return partial(
            module.frame_window_attention,
            *arrays,
            **attributes,
            workspace=workspace,
            stream=self._stream.handle,
        )

    def _scales(self, ring_key: DeviceArray, k_gain: DeviceArray | None) -> dict[str, DeviceArray]:
        """What a number of the ring is worth, per head. e4m3 has 15 octaves of normal numbers, so that a scale has to be right
        within some octaves only: that of normalised keys follows from their largest possible value, no calibration.
        """
        heads, head_size = ring_key.shape[-2:]
        key_limit = VALUE_LIMIT if k_gain is None else float(np.abs(_floats(k_gain)).max()) * head_size**0.5
        scales = {}
        for name, limit in (("ring_key_scale", key_limit), ("ring_value_scale", VALUE_LIMIT)):
            scales[name] = self._memory.new(Port((heads,), "float32"))
            scales[name][...] = np.full(heads, limit / LARGEST_FP8, np.float32)
        return scales

    def relative_attention(self, *arrays: DeviceArray, **attributes: Any) -> Call:
        return partial(kernels().relative_attention, *arrays, **attributes, stream=self._stream.handle)

    def denoise_step(
        self, *arrays: DeviceArray, noise: DeviceArray | None, out: DeviceArray
    ) -> Callable[[], Any]:
        return partial(kernels().denoise_step, *arrays, noise=noise, out=out, stream=self._stream.handle)


def _floats(array: DeviceArray) -> np.ndarray:
    """A gain as float32 on the host."""
    host = array.numpy()
    return (
        (host.astype(np.uint32) << 16).view(np.float32)
        if array.dtype == "bfloat16"
        else host.astype(np.float32)
    )
