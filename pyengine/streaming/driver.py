"""The one driver: does what schedules say, one call of one network at a time, for any number of streams at once.

It knows no method. A call gathers the rows of every lane where the network reads them, writes levels, positions, slots and
texts, runs the network, and updates the latents by what it predicts; clean latents then go to each stream's own decoder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from pyengine.bundle.bundle import Bundle
from pyengine.bundle.variant import Variant
from pyengine.runtime.executor import Executor
from pyengine.runtime.latents import CallBuffers
from pyengine.schedule.call import Call, Key, Lane, Row
from pyengine.schedule.positions import positions
from pyengine.schedule.samplers import Multistep, frame_noise
from pyengine.streaming.state import StreamState

__all__ = ["Driver", "sized"]

RENOISED = 1 << 40  # noise of re-noised rows is drawn under numbers from here on, never those of a sampler


class _Written(NamedTuple):
    """What was written into an input for a lane: a stream's text, or the part of a kept value that a key names."""

    state: StreamState
    value: np.ndarray
    key: Key | None

    def is_same(self, other: _Written | None) -> bool:
        """Values are told apart by identity: none is ever changed in place."""
        if other is None:
            return False
        return self.state is other.state and self.value is other.value and self.key == other.key


class _Large(NamedTuple):
    """An input of a variant that takes texts or kept values: whose it is, where its axis of branches is, and what lies in it for each
    lane.
    """

    buffers: CallBuffers
    axis: int | None
    known: list[_Written | None]


@lru_cache(maxsize=256)
def sized(variant: Variant, lanes: int, branches: int, streams: int = 1) -> Variant:
    """A denoiser variant of a schedule, as it is compiled for a number of streams. One that names its branches has those."""
    return variant.sized(branches=variant.symbols.get("branches", branches), streams=lanes * streams)


class Driver:
    """Runs calls on one executor. `sizes` are the prepared numbers of streams in a call, smallest first."""

    def __init__(self, executor: Executor, bundle: Bundle, sizes: tuple[int, ...] = (1,)) -> None:
        assert bundle.latent is not None
        assert bundle.video is not None
        self.executor, self.sizes, self._video = executor, sizes, bundle.video
        self._components = bundle.components
        self._frame_shape = (bundle.latent.channels, bundle.latent.height, bundle.latent.width)
        self._buffers: dict[Variant, CallBuffers] = {}
        # What lies in the inputs that stay as they are: by component, name and shape, since variants share those; of each lane.
        self._written: dict[tuple[str, str, tuple[int, ...]], list[_Written | None]] = {}
        self._large: dict[Variant, dict[str, _Large]] = {}

    def steps(self, streams: Sequence[StreamState], calls: int) -> None:
        """So many calls of each stream, or as many as its schedule has."""
        for _ in range(calls):
            self.step([state for state in streams if not state.ended])

    def step(self, streams: Sequence[StreamState]) -> None:
        """One call of each stream; those whose calls run the same network at the same sizes share a run."""
        calls = [(state, state.call_at(state.call)) for state in streams]
        for group in _groups(calls, self.sizes[-1]):
            self._run(group)
        for state, call in calls:
            state.call += 1
            for emit in call.emit:
                latents, shown = state.store.window(emit.frames), emit.frames[emit.keep]
                state.clips.append(state.decoder.submit(latents, emit.keep, self._video.lead(shown[0])))
            if call.keeps is not None:
                state.store.forget(*call.keeps)
        for state, call in calls:  # once every stream's frames are on their way
            if call.emit and call.emit[-1].writes:
                state.keep_decoded(call.emit[-1])

    def prepare(self, state: StreamState) -> None:
        """Runs the calls whose outputs a stream's later calls read, before its first one."""
        for call in state.schedule.prepare():
            self._run([(state, call)])
        state.prepared = dict(state.kept)

    def recache(self, state: StreamState) -> None:
        """Rewrites the keys and values of every clean frame in the ring under the text that is set now."""
        for call in state.schedule.recache(state.call):
            self._run([(state, call)])
        state.switch(state.call)

    def forget(self, state: StreamState) -> None:
        """Lets go of a stream that has left."""
        for lanes in self._written.values():
            lanes[:] = [None if known is not None and known.state is state else known for known in lanes]

    def _run(self, group: Sequence[tuple[StreamState, Call]]) -> None:
        state, call = group[0]
        if call.variant is None:
            return
        if not call.lanes:
            self._transform(state, call)
            return
        branches, per_stream = len(state.weights_of(call)), len(call.lanes)
        streams = next(size for size in self.sizes if size >= len(group))
        variant = sized(call.variant, per_stream, branches, streams)
        buffers = self._buffers_of(variant)
        lanes = [(state, call, lane) for state, call in group for lane in call.lanes]
        for place, (state, call, lane) in enumerate(lanes):
            self._gather(buffers, place, state, call, lane)
            buffers.attach(place, state.rings)
        self._feed(variant, buffers, lanes)
        if not call.update:
            buffers.run()
            return
        self._update(buffers, lanes)

    def _transform(self, state: StreamState, call: Call) -> None:
        """Runs a network that turns numbers, texts, kept values or clean latents into values that are kept."""
        variant = call.variant
        assert variant is not None
        window = state.store.window(call.latents) if call.latents else None
        if variant.component == "decoder":
            frames = np.asarray(state.decoder.submit(window).result())
            state.kept |= dict.fromkeys(call.writes.values(), frames)
            return
        inputs = self.executor.inputs(variant)
        texts = {name: value for name, value in state.text.items() if name in inputs}
        kept = [state.value(key.name) for key in call.reads.values()]
        read = ((call.values, call.reads), *texts.values(), *kept)
        if window is None and state.has_made(call, read):
            return
        for name, numbers in call.values.items():
            if name in inputs:
                inputs[name][...] = numbers
        for name, value in texts.items():
            inputs[name][...] = value
        for name, key in call.reads.items():
            inputs[name][...] = state.part(key, 0).reshape(inputs[name].shape)
        if window is not None:
            inputs["latents"][...] = self._noised(state, call, window) if call.latents_level else window
        self.executor.run(variant)
        made = {kept: self.executor.output(variant, name).copy() for name, kept in call.writes.items()}
        state.kept |= made
        if window is None:
            state.made[variant] = (read, made)

    def _noised(self, state: StreamState, call: Call, window: Any) -> np.ndarray:
        """The clean latents of a call with noise on each, of its frame and the call's number. [frames, c, h, w]"""
        keep, share = state.sampler.noised(call.latents_level)
        latents: np.ndarray = np.float32(keep) * np.asarray(window)
        for latent, frame in zip(latents, call.latents, strict=True):
            latent += np.float32(share) * frame_noise(state.seed, frame, self._frame_shape, call.draw)
        return latents

    def _gather(self, buffers: CallBuffers, place: int, state: StreamState, call: Call, lane: Lane) -> None:
        """Puts the rows of a lane where the network reads them. Latents are born where they will lie in flight."""
        store = state.store
        buffers.claim(store)
        for row in lane.rows:
            if row.place < 0 or row.origin in ("absent", "carried"):
                continue
            if row.origin == "noise":
                store.draw(row.place, self._noise(state, row.frame))
            elif row.origin == "given":
                store.put(row.place, row.frame)
            else:
                keep, share = state.sampler.noised(row.level)
                store.mix(row.place, row.frame, keep, share, self._noise(state, row.frame, call.noised_draw))
        for first, row, count in _runs(lane.rows):
            if row.frame < 0:
                buffers.clear(place, first, count)
            elif row.place < 0:
                buffers.give(place, first, store, row.frame)
            else:
                buffers.load(place, first, store, row.place, count)
        for index, row in enumerate(lane.rows):
            if row.renoised:
                keep, share = state.sampler.noised(row.level)
                buffers.renoise(
                    place, index, keep, share, self._noise(state, row.frame, RENOISED + call.draw)
                )

    def _feed(
        self, variant: Variant, buffers: CallBuffers, lanes: Sequence[tuple[StreamState, Call, Lane]]
    ) -> None:
        """Writes numbers, texts and kept values into the inputs. Lanes that no stream fills get no frames: they see and write nothing."""
        level, frame_index, mask = (buffers.input(name) for name in ("level", "frame_index", "mask"))
        ring_index, append_slot = buffers.input("ring_index"), buffers.input("append_slot")
        guidance = buffers.input("guidance")
        for place, (state, call, lane) in enumerate(lanes):
            rows, (policy, pinned) = lane.rows, state.positions
            if level is not None:
                level[place] = [row.level for row in rows]
            if frame_index is not None:
                seen, in_ring = positions(policy, [row.frame for row in rows], lane.ring, pinned)
                frame_index[place] = seen
                if ring_index is not None:
                    ring_index[place] = in_ring
            if append_slot is not None:
                append_slot[place] = [row.slot for row in rows]
            if mask is not None:
                mask[0, place] = [row.mask for row in rows]
                mask[1:, place] = 0
            if guidance is not None:
                guidance[:, place] = state.weights_of(call)
        for array in (frame_index, ring_index, append_slot):
            if array is not None:
                array[len(lanes) :] = -1
        for place, (_, call, _) in enumerate(lanes):
            for name, (number,) in call.values.items():
                target = buffers.input(name)
                if target is not None:
                    target[place] = number
        state, call, _ = lanes[0]
        for name, large in self._large_of(variant, buffers).items():
            if name in state.text or name in call.reads:
                self._write_large(name, large, lanes)

    def _large_of(self, variant: Variant, buffers: CallBuffers) -> dict[str, _Large]:
        """Inputs of a variant that may take a text or a kept value, by name: worked out once, since every call asks."""
        if variant not in self._large:
            found = self._large[variant] = {}
            for name, spec in self._components[variant.component].inputs.items():
                memory = (variant.component, name, spec.resolve(variant.symbols))
                known = self._written.setdefault(memory, [None] * buffers.lanes)
                found[name] = _Large(buffers, spec.axis("branches"), known)
        return self._large[variant]

    def _write_large(self, name: str, large: _Large, lanes: Sequence[tuple[StreamState, Call, Lane]]) -> None:
        """Writes a text, or a kept value, of every lane. It stays where it is until the lane has another stream or the stream another
        value: on a GPU what is not written is not sent.
        """
        for place, (state, call, _) in enumerate(lanes):
            key = call.reads.get(name)
            wanted = _Written(state, state.text[name] if key is None else state.value(key.name), key)
            if wanted.is_same(large.known[place]):
                continue
            large.known[place] = wanted
            # Asked for only where it is written: on a GPU that sends it.
            target = large.buffers.input(name)
            assert target is not None
            if large.axis is None:
                assert key is not None
                target[place] = state.part(key, 0)
                continue
            own = np.moveaxis(target, (large.axis, large.axis + 1), (0, 1))[:, place]
            if key is None:
                own[...] = np.moveaxis(wanted.value, large.axis, 0)[: len(own)]
            else:
                for branch in range(len(own)):
                    own[branch] = state.part(key, branch)

    def _update(self, buffers: CallBuffers, lanes: Sequence[tuple[StreamState, Call, Lane]]) -> None:
        """Runs the network, updates every row that is not a condition, and keeps what became clean."""
        rows = len(lanes[0][2].rows)
        weights = np.ones((buffers.branches, buffers.lanes), np.float32)
        scales = np.zeros((7, buffers.lanes, rows), np.float32)
        scales[0] = 1  # a lane that no stream fills is copied
        noise = remembers = False
        for place, (state, call, lane) in enumerate(lanes):
            if buffers.branches == len(state.weights_of(call)):
                weights[:, place] = state.weights_of(call)
            affine = state.coefficients(call, lane)
            if isinstance(affine, Multistep):
                remembers, (affine, *kept) = True, affine
                for kind, values in enumerate(kept, 3):
                    scales[kind, place] = values
                for first, row, count in _runs(lane.rows):
                    if scales[3, place, first] or scales[6, place, first]:
                        buffers.recall(place, first, state.store, row.history, count)
            for kind, values in enumerate(affine):
                scales[kind, place] = values
            if affine.needs_noise:
                noise = True
                for index, row in enumerate(lane.rows):
                    if affine.noise[index]:
                        buffers.draw(place, index, self._noise(state, row.frame, call.draw))
        history = (scales[3], scales[4], scales[5], scales[6]) if remembers else None
        buffers.run(weights, (scales[0], scales[1], scales[2]), noise, history)
        for place, (state, _, lane) in enumerate(lanes):
            for first, row, count in _runs(lane.rows):
                if row.level != row.level_next:
                    buffers.save(place, first, state.store, _target(row), count)
                    if row.history >= 0:
                        buffers.keep(place, first, state.store, row.history, count)
            for row in lane.rows:
                if row.done:
                    state.store.finish(_target(row), row.frame)

    def _noise(
        self, state: StreamState, frame: int, draw: int | None = None
    ) -> Callable[[np.ndarray], object]:
        """What fills a latent with the noise of a frame: of its birth, or drawn under a number."""
        return lambda out: frame_noise(state.seed, frame, self._frame_shape, draw, out)

    def _buffers_of(self, variant: Variant) -> CallBuffers:
        if variant not in self._buffers:
            self._buffers[variant] = self.executor.call_buffers(variant)
        return self._buffers[variant]


def _groups(calls: Sequence[tuple[StreamState, Call]], most: int) -> list[list[tuple[StreamState, Call]]]:
    """Calls that can share a run, at most so many together; the order of streams is kept."""
    groups: dict[Any, list[list[tuple[StreamState, Call]]]] = {}
    for state, call in calls:
        branches = len(state.weights_of(call))
        shares = (call.variant, len(call.lanes), branches, call.update) if call.lanes else id(state)
        runs = groups.setdefault(shares, [[]])
        if len(runs[-1]) == most:
            runs.append([])
        runs[-1].append((state, call))
    return [run for runs in groups.values() for run in runs]


def _runs(rows: Sequence[Row]) -> list[tuple[int, Row, int]]:
    """(index, first row, rows) of neighbours that lie next to each other and are treated alike. One copy for many: numpy lets go
    of the interpreter in each, and a thread that decodes may be slow to give it back.
    """
    runs = []
    numbered = enumerate(rows)
    for _, same in groupby(numbered, lambda entry: _kind(*entry)):
        part = list(same)
        runs.append((part[0][0], part[0][1], len(part)))
    return runs


def _kind(index: int, row: Row) -> tuple[Any, ...]:
    if row.frame < 0:
        return ("absent",)
    if row.place < 0:
        return ("given", index)
    return (
        row.place - index,
        row.level == row.level_next,
        _target(row) - index,
        row.history >= 0 and row.history - index,
    )


def _target(row: Row) -> int:
    return row.place if row.target < 0 else row.target
