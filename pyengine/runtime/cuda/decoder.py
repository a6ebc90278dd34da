"""Decoding on streams of its own, and finished frames to the host while the next call runs."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from pyengine.bundle.bundle import Bundle
from pyengine.device.array import DeviceArray, PinnedArray
from pyengine.device.cuda import Event, Stream
from pyengine.device.nvtx import annotate
from pyengine.runtime.codec import FRAME_DECODER, decoded, decoder_variants
from pyengine.runtime.cuda.memory import Pool
from pyengine.runtime.host.decoder import HostDecoder

if TYPE_CHECKING:
    from pyengine.runtime.cuda.executor import CudaExecutor

SLOTS = 2  # one clip is written by the GPU while the host reads the other


class CudaDecoder:
    """`Decoder`: the latents never leave the GPU, nor do planes between two networks, nor the frames with `device_frames`."""

    def __init__(self, executor: CudaExecutor, bundle: Bundle, *, device_frames: bool = False) -> None:
        video = bundle.video
        assert video is not None
        self._executor, self._bundle = executor, bundle
        self._stream = executor.stream("decoder")
        by_frame = FRAME_DECODER.component in bundle.components
        self._last = executor.stream(FRAME_DECODER.component) if by_frame else self._stream
        self._cuda = self._stream.cuda
        self._between = self._cuda.event()
        self._frame = (video.height, video.width, 3)
        self._out = _Pooled(self._last) if device_frames else _Slots(self._last, self._largest(by_frame))
        # Latents are not given back to their pool before the decoder has read them.
        self._reading: deque[tuple[Event, object]] = deque()

    def submit(self, latents: DeviceArray | np.ndarray, kept: slice = slice(None), lead: int = 0) -> CudaClip:
        executor, stream = self._executor, self._stream
        variant, *per_frame = decoder_variants(self._bundle, len(latents))
        with annotate("decode"):
            if isinstance(latents, DeviceArray):
                if latents.ready is not None:
                    stream.wait_for(latents.ready)
                target = executor.on_gpu(variant, "latents")
                self._cuda.copy(target.pointer, latents.pointer, target.nbytes, stream)
            else:
                executor.input(variant, "latents")[...] = latents
            executor.run(variant)
            clip = (
                self._by_frame(executor.on_gpu(variant, "planes")[lead:])
                if per_frame
                else self._whole(executor.on_gpu(variant, "frames")[kept], lead)
            )
        while self._reading and self._reading[0][0].done():
            self._reading.popleft()
        self._reading.append((clip.arrived, latents))
        return clip

    def outputs(self, latents: int, names: Sequence[str]) -> dict[str, np.ndarray]:
        return decoded(self._executor, self._bundle, latents, names)

    def own(self, frames: np.ndarray) -> np.ndarray | DeviceArray:
        return self._out.own(frames)

    def close(self) -> None:
        self._stream.synchronize()
        self._last.synchronize()
        self._reading.clear()

    def _largest(self, by_frame: bool) -> int:
        """Bytes of the longest clip."""
        executor, name = self._executor, "planes" if by_frame else "frames"
        variants = [v for v in executor.program.variants if v.component == "decoder"]
        made = [executor.on_gpu(variant, name) for variant in variants]
        return max(len(array) * prod(self._frame) if by_frame else array.nbytes for array in made)

    def _whole(self, frames: DeviceArray, lead: int) -> CudaClip:
        """The frames of the run just enqueued but the first `lead`, on their way out."""
        one = prod(self._frame)
        with self._out.clip((frames.nbytes // one - lead, *self._frame)) as clip:
            self._cuda.copy(
                clip.pointer, frames.pointer + lead * one, frames.nbytes - lead * one, self._stream
            )
        return clip

    def _by_frame(self, planes: DeviceArray) -> CudaClip:
        """Planes of the run just enqueued through the second network, a few at a time, each batch on its way out behind it."""
        executor, stream, cuda = self._executor, self._last, self._cuda
        stream.wait_for(self._between.record(self._stream))
        given, made = (executor.on_gpu(FRAME_DECODER, name) for name in ("planes", "frames"))
        with self._out.clip((len(planes), *self._frame)) as clip:
            for start in range(0, len(planes), len(given)):
                part = planes[start : start + len(given)]
                cuda.copy(given.pointer, part.pointer, part.nbytes, stream)
                executor.run(FRAME_DECODER)
                frames = made[: len(part)]
                cuda.copy(clip.pointer + start * prod(self._frame), frames.pointer, frames.nbytes, stream)
        self._stream.wait_for(clip.arrived)  # the next chunk's planes lie where these do
        return clip


class CudaTileDecoder(HostDecoder):
    """For frames that are decoded in tiles: planes and tiles cross the host, where they are blended, in a thread of its own. The
    decoder's stream waits for the latents, the denoiser's goes on.
    """

    def __init__(self, executor: CudaExecutor, bundle: Bundle, *, device_frames: bool = False) -> None:
        super().__init__(executor, bundle)
        self._decoder_stream = executor.stream("decoder")
        self._kept = _Pooled(self._decoder_stream) if device_frames else None

    def own(self, frames: np.ndarray) -> np.ndarray | DeviceArray:  # type: ignore[override]
        return frames if self._kept is None else self._kept.own(frames)

    def _decode(  # type: ignore[override]
        self, latents: DeviceArray | np.ndarray, kept: slice, lead: int
    ) -> np.ndarray | DeviceArray:
        if isinstance(latents, DeviceArray):
            stream, on_gpu = self._decoder_stream, latents
            latents = np.empty(on_gpu.shape, on_gpu.host_dtype)
            if on_gpu.ready is not None:
                stream.wait_for(on_gpu.ready)
            stream.cuda.copy(latents.ctypes.data, on_gpu.pointer, on_gpu.nbytes, stream)
            stream.synchronize()
        return self.own(super()._decode(latents, kept, lead))


class CudaClip:
    """`Clip`: frames on their way to the host, or on the GPU. `pointer` is where they are written."""

    def __init__(self, frames: np.ndarray | DeviceArray, pointer: int, arrived: Event) -> None:
        self._frames, self.pointer, self.arrived, self._out = frames, pointer, arrived, False

    def result(self) -> np.ndarray | DeviceArray:
        """Returns the frames: a numpy copy once they have arrived, or at once a DeviceArray whose `ready` a reader on the GPU waits for."""
        if isinstance(self._frames, np.ndarray) and not self._out:
            self.arrived.wait()
            self._frames = self._frames.copy()
        self._out = True
        return self._frames


class _Pooled:
    """Clips that stay on the GPU."""

    def __init__(self, stream: Stream) -> None:
        self._stream, self._pool = stream, Pool(stream, "uint8")

    @contextmanager
    def clip(self, shape: tuple[int, ...]) -> Iterator[CudaClip]:
        """Where frames go that are enqueued inside."""
        block = self._pool.take(shape)
        assert block.ready is not None
        yield CudaClip(block, block.pointer, block.ready)
        block.ready.record(self._stream)

    def own(self, frames: np.ndarray) -> np.ndarray | DeviceArray:
        with self.clip(frames.shape) as clip:
            clip.result()[...] = frames
        return clip.result()


class _Slots:
    """Clips in page-locked memory, which is written again only when its frames are out."""

    def __init__(self, stream: Stream, nbytes: int) -> None:
        self._stream = stream
        self._slots = [PinnedArray(stream.cuda, nbytes) for _ in range(SLOTS)]
        self._pending: list[CudaClip | None] = [None] * SLOTS
        self._turn = 0

    @contextmanager
    def clip(self, shape: tuple[int, ...]) -> Iterator[CudaClip]:
        """Where frames go that are enqueued inside."""
        turn, self._turn = self._turn, (self._turn + 1) % SLOTS
        waiting, slot = self._pending[turn], self._slots[turn]
        if waiting is not None:
            waiting.result()
        clip = CudaClip(slot.array(shape, "uint8"), slot.pointer, self._stream.cuda.event())
        yield clip
        clip.arrived.record(self._stream)
        self._pending[turn] = clip

    def own(self, frames: np.ndarray) -> np.ndarray:
        return frames
