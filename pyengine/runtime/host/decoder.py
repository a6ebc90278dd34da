"""Turns clean latents into frames while the next call of the denoiser runs."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from pyengine.bundle.bundle import Bundle
from pyengine.errors import ConfigError
from pyengine.runtime.codec import decode_chunk, decoded

if TYPE_CHECKING:
    from pyengine.runtime.executor import Executor

__all__ = ["Clip", "Decoder", "HostDecoder", "Ready"]


class Clip(Protocol):
    """Frames that are being decoded."""

    def result(self) -> Any:
        """Waits for the frames and returns them, uint8 [frames, height, width, 3]."""
        ...


class Ready:
    """A clip that is decoded already, from a snapshot."""

    def __init__(self, frames: Any) -> None:
        self._frames = frames

    def result(self) -> Any:
        return self._frames


class Decoder(Protocol):
    """Decodes a stream's chunks in order. What it remembers from chunk to chunk is the executor's state."""

    def submit(self, latents: Any, kept: slice = slice(None), lead: int = 0) -> Clip:
        """Begins to decode a chunk of latents [frames, c, h, w]. Returned are the frames of the `kept` ones but the first `lead`."""
        ...

    def outputs(self, latents: int, names: Sequence[str]) -> dict[str, np.ndarray]:
        """Copies to the host what the last run on so many latents gave beside its frames."""
        ...

    def own(self, frames: np.ndarray) -> Any:
        """Copies a snapshot's frames [frames, height, width, 3] to where this decoder's frames are: the host or the GPU."""
        ...

    def close(self) -> None:
        """Waits for what is under way."""
        ...


class HostDecoder:
    """Decodes in a thread of its own."""

    def __init__(self, executor: Executor, bundle: Bundle, *, device_frames: bool = False) -> None:
        if device_frames:
            raise ConfigError("device_frames needs an engine on device cuda but this one runs on the CPU")
        self._executor, self._bundle = executor, bundle
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="pyengine-decode")

    def submit(self, latents: np.ndarray, kept: slice = slice(None), lead: int = 0) -> Future[np.ndarray]:
        return self._thread.submit(self._decode, latents, kept, lead)

    def outputs(self, latents: int, names: Sequence[str]) -> dict[str, np.ndarray]:
        # In the thread that decodes, so after what was submitted before.
        return self._thread.submit(decoded, self._executor, self._bundle, latents, names).result()

    def own(self, frames: np.ndarray) -> np.ndarray:
        return frames

    def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _decode(self, latents: np.ndarray, kept: slice, lead: int) -> np.ndarray:
        return decode_chunk(self._executor, self._bundle, latents, kept, lead)
