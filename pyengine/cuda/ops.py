"""The steps of a walk as work on a CUDA stream."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from ..device_array import DeviceArray
from ..errors import BackendUnavailable, PlanError
from ..walk import Arrays, Call
from .memory import CudaMemory


def kernels() -> Any:
    """The compiled CUDA ops. Raises BackendUnavailable where this installation was built without them."""
    try:
        from pyengine import _cuda  # type: ignore[attr-defined,unused-ignore]
    except ImportError as error:
        raise BackendUnavailable(
            f"this installation has no CUDA kernels ({error}): install pyengine again where nvcc is on the PATH, with "
            "-Ccmake.define.PYENGINE_CUDA=ON, or build the plan with choice 'inline', which needs none"
        ) from error
    return _cuda


class CudaOps:
    """Everything is enqueued on the stream of one component, in the order of the walk."""

    def __init__(self, memory: CudaMemory) -> None:
        self._memory, self._stream = memory, memory.stream

    def segment(self, engine: Any, inputs: Arrays, outputs: Arrays) -> Call:
        """An engine of a CUDA backend (`backends.CudaEngine`)."""
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
        return partial(
            module.frame_window_attention,
            *arrays,
            **attributes,
            workspace=workspace,
            stream=self._stream.handle,
        )

    def relative_attention(self, *arrays: DeviceArray, **attributes: Any) -> Call:
        raise PlanError("RelativeAttention has no CUDA kernel yet; build with choice 'inline'")

    def denoise_step(
        self, *arrays: DeviceArray, noise: DeviceArray | None, out: DeviceArray
    ) -> Callable[[], Any]:
        return partial(kernels().denoise_step, *arrays, noise=noise, out=out, stream=self._stream.handle)
