"""The latents of two-level generation on a card. A call is: a little noise sent there, a row of the table of embeddings, and one graph:
what is known, network, guidance and sampler. Keys, clips and windows of the decoder stay there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from pyengine.backends.base import Port
from pyengine.device.array import DeviceArray
from pyengine.device.cuda import Stream
from pyengine.runtime.cuda.memory import CudaMemory, Pool, Staging
from pyengine.runtime.host.clip_latents import Batch, Call, Draw

if TYPE_CHECKING:
    from pyengine.runtime.cuda.executor import CudaExecutor, Enqueue


class CudaClipLatents:
    """`host.clip_latents.ClipLatents` with DeviceArrays. Every network has a stream of its own; single latents are blocks that come back
    to the pool of the stream that made them.
    """

    def __init__(
        self,
        executor: CudaExecutor,
        frame_shape: tuple[int, int, int],
        batches: Sequence[Batch],
        tables: Mapping[str, np.ndarray],
        branches: int,
    ) -> None:
        self._executor, self._frame_shape = executor, frame_shape
        self._plane = 4 * prod(frame_shape[1:])  # bytes
        self._clips = {batch: _Clips(executor, batch, frame_shape, branches) for batch in batches}
        names = {batch.variant.component for batch in batches}
        streams = {name: executor.stream(name) for name in names}
        largest = max(batch.frames for batch in batches) * frame_shape[0] * self._plane
        self._staging = {name: Staging(stream, largest) for name, stream in streams.items()}
        self._pools = {name: Pool(stream, "float32") for name, stream in streams.items()}
        self._tables = {name: DeviceArray.of(tables[name], stream) for name, stream in streams.items()}
        self._batch: Batch | None = None
        self._known = 0  # frames of the batch in flight

    def begin(self, batch: Batch, known: Sequence[Sequence[DeviceArray]], noise: Sequence[Draw]) -> None:
        self._batch, self._known = batch, len(known[0])
        clips = self._clips[batch]
        self._send(clips.sample, noise)
        for clip, latents in enumerate(known):
            for place, latent in enumerate(latents):
                self._read(latent, clips.stream)
                self._scatter(clips.condition[clip], place, latent, clips.stream)

    def perturb(self, keep: float, mix: float, noise: Sequence[Draw]) -> None:
        clips = self._in_flight()
        self._send(clips.condition_noise, noise)
        clips.mix(self._executor, keep, mix)

    def call(self, call: Call) -> None:
        batch, clips = self._batch, self._in_flight()
        assert batch is not None
        inputs = self._executor.inputs(batch.variant)
        if "mask" in inputs and (clips.mask is None or not np.array_equal(call.mask, clips.mask)):
            inputs["mask"][...] = call.mask.reshape(inputs["mask"].shape)
            clips.mask = call.mask
        table, rows = self._tables[batch.variant.component], inputs["embedding"]
        for branch, (row, step) in enumerate(call.embedding):
            for clip in range(batch.clips):
                rows[branch * batch.clips + clip] = table[row][step]
        clips.give(call)
        if call.noise:
            self._send(clips.noise, call.noise)
        tag = f"call, {self._known} known{' with noise' if call.noise else ''}"
        self._executor.launch(
            batch.variant, tag, lambda: (self._head(batch), [self._tail(batch, bool(call.noise))])
        )

    def made(self, clip: int, frame: int) -> DeviceArray:
        assert self._batch is not None
        clips = self._in_flight()
        block = self._pools[self._batch.variant.component].take(self._frame_shape)
        sample = clips.sample[clip]
        clips.stream.cuda.copy_rows(
            block.pointer,
            self._plane,
            sample.pointer + frame * self._plane,
            sample.nbytes // len(sample),
            self._plane,
            len(sample),
            clips.stream,
        )
        assert block.ready is not None
        block.ready.record(clips.stream)
        return block

    def window(self, latents: Sequence[DeviceArray]) -> DeviceArray:
        assert self._batch is not None
        stream = self._in_flight().stream
        block = self._pools[self._batch.variant.component].take((len(latents), *self._frame_shape))
        for place, latent in enumerate(latents):
            self._read(latent, stream)
            stream.cuda.copy(block[place].pointer, latent.pointer, latent.nbytes, stream)
        assert block.ready is not None
        block.ready.record(stream)
        return block

    def own(self, latent: np.ndarray) -> DeviceArray:
        pool = next(iter(self._pools.values()))
        block = pool.take(self._frame_shape)
        block[...] = latent.astype(np.float32, copy=False)
        assert block.ready is not None
        block.ready.record(block.stream)
        return block

    def host(self, latent: DeviceArray) -> np.ndarray:
        return latent.numpy()

    def state(self) -> dict[str, np.ndarray]:
        if self._batch is None:
            channels, height, width = self._frame_shape
            nothing = np.zeros((0, channels, 0, height, width), np.float32)
            return {"sample": nothing, "condition": nothing}
        clips = self._in_flight()
        return {"sample": clips.sample.numpy(), "condition": clips.condition.numpy()[:, :, : self._known]}

    def load_state(self, batch: Batch | None, state: Mapping[str, np.ndarray]) -> None:
        self._batch, self._known = batch, 0
        if batch is not None:
            clips, condition = self._in_flight(), state["condition"]
            self._known = condition.shape[2]
            clips.sample[...] = state["sample"]
            if self._known:
                clips.condition[...] = condition

    def _in_flight(self) -> _Clips:
        assert self._batch is not None
        return self._clips[self._batch]

    def _head(self, batch: Batch) -> list[Enqueue]:
        """What is known goes over the clips, for all branches and for the update, and the clips to the network."""
        clips = self._clips[batch]
        sample, condition, plane = clips.sample, clips.condition, self._plane
        rows = batch.clips * self._frame_shape[0]
        runs = [(0, 0, 1), (batch.frames - 1, 1, 1)] if batch.ends else [(0, 0, batch.known)]

        def copy(frame: int, place: int, count: int) -> Enqueue:
            def call() -> None:
                clips.stream.cuda.copy_rows(
                    sample.pointer + frame * plane,
                    batch.frames * plane,
                    condition.pointer + place * plane,
                    batch.known * plane,
                    count * plane,
                    rows,
                    clips.stream,
                )

            return call

        known = [copy(*run) for run in runs] if self._known else []
        latents = self._executor.on_card(batch.variant, "latents")
        return [*known, self._executor.ops(batch.variant.component).copy(latents, sample)]

    def _tail(self, batch: Batch, noise: bool) -> Enqueue:
        """Guidance and the sampler's update."""
        clips = self._clips[batch]
        predicted = self._executor.on_card(batch.variant, "predicted")
        return self._executor.ops(batch.variant.component).denoise_step(
            clips.sample,
            predicted.view((len(clips.weights), *clips.sample.shape), predicted.dtype),
            clips.weights,
            *clips.scales,
            noise=clips.noise if noise else None,
            out=clips.sample,
        )

    def _send(self, target: DeviceArray, noise: Sequence[Draw]) -> None:
        """Noise is drawn on the host, where it is a function of seed and clip on every device alike."""
        assert self._batch is not None
        staging = self._staging[self._batch.variant.component]
        for clip, draw in zip(target, noise, strict=True):
            self._send_one(staging, clip, draw)

    def _send_one(self, staging: Staging, clip: DeviceArray, draw: Draw) -> None:
        staging.send(clip.pointer, clip.nbytes, lambda out: draw(out.view(np.float32).reshape(clip.shape)))

    def _scatter(self, clips: DeviceArray, place: int, latent: DeviceArray, stream: Stream) -> None:
        """A latent as one frame of a clip [channels, frames, height, width]."""
        stream.cuda.copy_rows(
            clips.pointer + place * self._plane,
            clips.nbytes // len(clips),
            latent.pointer,
            self._plane,
            self._plane,
            len(clips),
            stream,
        )

    def _read(self, latent: DeviceArray, stream: Stream) -> None:
        """Lets the stream read a latent that may be of another: after it was made, and before its block is written again."""
        if latent.stream is not stream:
            assert latent.ready is not None
            stream.wait_for(latent.ready)
            latent.owner.own_readers.add(stream)  # type: ignore[attr-defined]


class _Clips:
    """The arrays of one batch."""

    def __init__(
        self, executor: CudaExecutor, batch: Batch, frame_shape: tuple[int, int, int], branches: int
    ) -> None:
        memory: CudaMemory = executor.memory(batch.variant.component)
        self._memory, self.stream, self._component = memory, memory.stream, batch.variant.component
        channels, height, width = frame_shape
        sample, known = (
            (batch.clips, channels, frames, height, width) for frames in (batch.frames, batch.known)
        )
        self.sample, self.noise = (memory.new(Port(sample, "float32")) for _ in range(2))
        self.condition, self.condition_noise = (memory.new(Port(known, "float32")) for _ in range(2))
        self.weights = memory.control(Port((branches,), "float32"))
        self.scales = [memory.control(Port((batch.clips,), "float32")) for _ in range(3)]
        self.mask: np.ndarray | None = None  # what the network's input holds
        self._nothing = memory.new(Port((1, *known), "float32"))
        self._no_weight = memory.new(Port((1,), "float32"))
        self._mix = [memory.new(Port((batch.clips,), "float32")) for _ in range(3)]
        self._mixed: tuple[float, float] | None = None

    def give(self, call: Call) -> None:
        """Numbers that go with the next run."""
        self._memory.host(self.weights)[...] = call.weights
        for array, values in zip(self.scales, call.scales, strict=True):
            self._memory.host(array)[...] = values

    def mix(self, executor: CudaExecutor, keep: float, mix: float) -> None:
        """condition = keep * condition + mix * condition_noise: DenoiseStep without a prediction."""
        if self._mixed != (keep, mix):
            for array, value in zip(self._mix, (keep, 0.0, mix), strict=True):
                array[...] = np.full(len(array), value, np.float32)
            self._mixed = (keep, mix)
        enqueue = executor.ops(self._component).denoise_step(
            self.condition,
            self._nothing,
            self._no_weight,
            *self._mix,
            noise=self.condition_noise,
            out=self.condition,
        )
        enqueue()
