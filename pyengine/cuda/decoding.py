"""Decoding on a stream of its own, and finished frames to the host while the next call runs."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import numpy as np

from ..bundle import Bundle
from ..chunks import decoder_variants
from ..decoding import HostDecoder
from ..device_array import DeviceArray, PinnedArray
from ..errors import ConfigError
from .memory import Pool
from .nvtx import annotate
from .runtime import Event

if TYPE_CHECKING:
    from .executor import CudaExecutor

SLOTS = 2  # one clip is written by the card while the host reads the other


class CudaDecoder:
    """`decoding.Decoder`: the latents never leave the card, nor do the frames with `device_frames`."""

    def __init__(self, executor: CudaExecutor, chunk_frames: int, *, device_frames: bool = False) -> None:
        bundle = executor.program.bundle
        (variant,) = decoder_variants(bundle, chunk_frames)
        video = bundle.video
        assert video is not None
        self._executor, self._variant = executor, variant
        self._stream = executor.stream(variant.component)
        self._cuda = self._stream.cuda
        self._frames = executor.on_card(variant, "frames")
        nbytes = self._frames.nbytes
        self._shape = (nbytes // (video.height * video.width * 3), video.height, video.width, 3)
        self._pool = Pool(self._stream, "uint8")
        self._slots = [] if device_frames else [PinnedArray(self._cuda, nbytes) for _ in range(SLOTS)]
        self._pending: list[CudaClip | None] = [None] * SLOTS
        self._turn = 0
        # Latents are not given back to their pool before the decoder has read them.
        self._reading: deque[tuple[Event, object]] = deque()

    def submit(self, latents: DeviceArray | np.ndarray, kept: slice = slice(None)) -> CudaClip:
        executor, stream, variant = self._executor, self._stream, self._variant
        with annotate("decode"):
            target = executor.on_card(variant, "latents")
            if isinstance(latents, DeviceArray):
                if latents.ready is not None:
                    stream.wait_for(latents.ready)
                self._cuda.copy(target.pointer, latents.pointer, target.nbytes, stream)
            else:
                given = executor.input(variant, "latents")
                given[...] = latents
            executor.run(variant)
            clip = self._deliver()
        while self._reading and self._reading[0][0].done():
            self._reading.popleft()
        self._reading.append((clip.arrived, latents))
        return clip

    def own(self, frames: np.ndarray) -> np.ndarray | DeviceArray:
        if self._slots:
            return frames
        copy = DeviceArray.zeros(frames.shape, "uint8", self._stream)
        copy[...] = frames
        return copy

    def close(self) -> None:
        self._stream.synchronize()
        self._reading.clear()

    def _deliver(self) -> CudaClip:
        """The frames of the run just enqueued, on their way out."""
        if not self._slots:
            block = self._pool.take(self._shape)
            assert block.ready is not None
            self._cuda.copy(block.pointer, self._frames.pointer, block.nbytes, self._stream)
            block.ready.record(self._stream)
            return CudaClip(block, block.ready)
        turn, self._turn = self._turn, (self._turn + 1) % SLOTS
        waiting = self._pending[turn]
        if waiting is not None:
            waiting.result()  # a slot is written again only when its frames are out
        slot = self._slots[turn]
        self._cuda.copy(slot.pointer, self._frames.pointer, self._frames.nbytes, self._stream)
        arrived = self._cuda.event().record(self._stream)
        clip = CudaClip(slot.array(self._shape, "uint8"), arrived)
        self._pending[turn] = clip
        return clip


class CudaFrameDecoder(HostDecoder):
    """For bundles that decode frame by frame, or windows of several sizes: what passes between the networks crosses the host, in a
    thread of its own. The decoder's stream waits for the latents, the denoiser's goes on.
    """

    def __init__(self, executor: CudaExecutor, bundle: Bundle, *, device_frames: bool = False) -> None:
        if device_frames:
            raise ConfigError(
                f"expected a bundle with one decoder of one size for device_frames but '{bundle.name}' decodes in "
                "parts that meet on the host; leave device_frames out"
            )
        super().__init__(executor, bundle)
        self._decoder_stream = executor.stream("decoder")

    def _decode(self, latents: DeviceArray | np.ndarray, kept: slice) -> np.ndarray:
        if isinstance(latents, DeviceArray):
            stream, on_card = self._decoder_stream, latents
            latents = np.empty(on_card.shape, on_card.host_dtype)
            if on_card.ready is not None:
                stream.wait_for(on_card.ready)
            stream.cuda.copy(latents.ctypes.data, on_card.pointer, on_card.nbytes, stream)
            stream.synchronize()
        return super()._decode(latents, kept)


class CudaClip:
    """`decoding.Clip`: frames on their way to the host, or on the card."""

    def __init__(self, frames: np.ndarray | DeviceArray, arrived: Event) -> None:
        self._frames, self.arrived, self._out = frames, arrived, False

    def done(self) -> bool:
        return self._out or self.arrived.done()

    def result(self) -> np.ndarray | DeviceArray:
        """numpy of the caller's own, or at once a DeviceArray, for whose `ready` a reader on the card waits."""
        if isinstance(self._frames, np.ndarray) and not self._out:
            self.arrived.wait()
            self._frames = self._frames.copy()
        self._out = True
        return self._frames
