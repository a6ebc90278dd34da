"""What the arrays of a snapshot must be to fit a stream that has just been opened: names, shapes, dtypes, and how much there may be of
what has no fixed size. All of it follows from the plan and the schedule, nothing from the snapshot.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from pyengine.bundle.bundle import Video
from pyengine.bundle.variant import Variant
from pyengine.errors import InputError, PromptError
from pyengine.runtime.executor import Executor
from pyengine.schedule.call import Call, Schedule
from pyengine.streaming.driver import Driver
from pyengine.streaming.state import StreamState

__all__ = ["Fit", "Spec", "fit_of", "missing_latents", "missing_values", "most_clean"]

CALL, LATENTS, INDEX, CLEAN = "window/call", "window/latents", "window/clean_index", "window/clean"
RINGS, STATE, KEPT, PENDING = "executor/denoiser/", "executor/", "kept/", "pending"
LOOK = 256  # calls that are looked through for what they read and write
WAITING = 8  # calls whose frames may wait to be taken: more than a stream or a batch makes ahead
HEAD = 1024  # bytes of an array's description, and to spare


class Spec(NamedTuple):
    """Of an array: `kind` is the dtype as the plan has it, which for bf16 and fp8 is not numpy's."""

    shape: tuple[int, ...]
    dtype: np.dtype
    kind: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def check(self, name: str, array: np.ndarray) -> None:
        """Raises InputError for another shape or dtype, and for numbers that are not finite."""
        if array.shape != self.shape or array.dtype != self.dtype:
            raise InputError(
                f"expected {name} of the snapshot as {self.dtype} {list(self.shape)} but got {array.dtype} {list(array.shape)}"
            )
        if not _is_finite(array, self.kind):
            raise InputError(
                f"expected finite numbers in {name} of the snapshot but some are not; make it again"
            )


@dataclass(frozen=True)
class Fit:
    """`arrays` and `kept` by name; at most `clean` latents and `pending` frames."""

    arrays: Mapping[str, Spec]
    kept: Mapping[str, Spec]
    latent: Spec
    frame: Spec
    clean: int
    pending: int

    @property
    def max_bytes(self) -> int:
        """Bytes that all arrays together take at most, their descriptions included."""
        exact = [*self.arrays.values(), *self.kept.values()]
        varying = self.clean * (self.latent.nbytes + 8) + self.pending * self.frame.nbytes
        return sum(spec.nbytes + HEAD for spec in exact) + varying + 3 * HEAD

    def check(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Raises InputError where arrays are missing, are too many, or do not fit."""
        needed = {*self.arrays, INDEX, CLEAN, PENDING}
        odd = sorted(needed - set(arrays)) or sorted(set(arrays) - needed - set(self.kept))
        if odd:
            what = "has no" if odd[0] in needed else "has also"
            raise InputError(
                f"expected a snapshot with the arrays of this stream but it {what} {odd[0][:60]!r}; make it again"
            )
        for name, spec in {**self.arrays, **self.kept}.items():
            if name in arrays:
                spec.check(name, arrays[name])
        self._check_clean(arrays[INDEX], arrays[CLEAN])
        pending = arrays[PENDING]
        count = len(pending) if pending.ndim else 0
        _several(self.frame, count).check(PENDING, pending)
        if count > self.pending:
            raise InputError(f"expected at most {self.pending} pending frames but the snapshot has {count}")

    def _check_clean(self, index: np.ndarray, clean: np.ndarray) -> None:
        count = len(index) if index.ndim == 1 else 0
        Spec((count,), np.dtype(np.int64), "int64").check(INDEX, index)
        _several(self.latent, count).check(CLEAN, clean)
        if count > self.clean:
            raise InputError(f"expected at most {self.clean} clean latents but the snapshot has {count}")
        if count and (index[0] < 0 or (np.diff(index) < 1).any()):
            raise InputError(
                f"expected rising frame numbers from 0 on in {INDEX} of the snapshot but got others; make it again"
            )


def fit_of(driver: Driver, codec: Executor, state: StreamState, video: Video, call: int) -> Fit:
    """What fits a stream that has been opened and has made no call. `codec` is the executor of its decoder; `call` is where the
    snapshot says that it stands.
    """
    arrays = {CALL: Spec((), np.dtype(np.int64), "int64")}
    flight = state.store.state()["latents"]
    arrays[LATENTS] = _spec(flight)
    arrays |= {RINGS + name: _spec(ring) for name, ring in state.rings.items()}
    arrays |= {STATE + name: _spec(array) for name, array in codec.state().items()}
    schedule = state.schedule
    per_call = max(schedule.places, *schedule.decoder_sizes)
    per_latent = max(video.frames_per_latent, video.first_frames or 0)
    return Fit(
        arrays=arrays,
        kept={KEPT + name: spec for name, spec in _kept(driver, codec, state, video, call).items()},
        latent=Spec(flight.shape[1:], flight.dtype, "float32"),
        frame=Spec((video.height, video.width, 3), np.dtype(np.uint8), "uint8"),
        clean=most_clean(schedule),
        pending=math.ceil(WAITING * per_call * per_latent),
    )


def most_clean(schedule: Schedule) -> int:
    """Clean latents that a stream keeps at once at most: what is in flight and what its ring shows, with those of two rounds and of what
    is decoded together.
    """
    lanes = schedule.call(schedule.first_call).lanes
    ring = max((len(lane.ring) for lane in lanes), default=0)
    return 4 * schedule.places + ring + sum(schedule.decoder_sizes)


def missing_latents(schedule: Schedule, call: int, index: np.ndarray, given: int | None = None) -> list[int]:
    """Clean latents that calls from `call` on read, or the re-caching of a new prompt there, and that are not in `index`. Those from
    `given` on are still to come.
    """
    there, missing = set(index.tolist()), set()
    with contextlib.suppress(PromptError):
        missing |= {row.frame for made in schedule.recache(call) for row in _read(made)} - there
    end = call + LOOK if schedule.calls is None else min(call + LOOK, schedule.calls)
    for number in range(call, end):
        made = schedule.call(number)
        needed = {row.frame for row in _read(made)} | set(made.latents)
        there |= {row.frame for lane in made.lanes for row in lane.rows if row.done}
        needed.update(frame for emit in made.emit for frame in emit.frames)
        missing |= needed - there
        if made.keeps is not None:
            pinned, oldest = made.keeps
            there = {frame for frame in there if not pinned <= frame < oldest}
    return sorted(frame for frame in missing if given is None or frame < given)


def missing_values(state: StreamState, call: int, names: Set[str]) -> list[str]:
    """Kept values that calls from `call` on read before any writes them, and that are not among these names or prepared anew."""
    schedule, there, missing = state.schedule, {*names, *state.prepared}, set()
    end = call + LOOK if schedule.calls is None else min(call + LOOK, schedule.calls)
    for made in map(schedule.call, range(call, end)):
        missing |= {key.name for key in made.reads.values()} - there
        there |= {*made.writes.values(), *(name for emit in made.emit for name in emit.writes.values())}
    return sorted(missing)


def _read(call: Call) -> list[Any]:
    """Rows that are clean latents of before."""
    rows = [row for lane in call.lanes for row in lane.rows if row.frame >= 0]
    return [row for row in rows if row.place < 0 or row.origin in ("given", "noised")]


def _kept(driver: Driver, codec: Executor, state: StreamState, video: Video, call: int) -> dict[str, Spec]:
    """Outputs that calls may have kept by then, of the first calls, the last ones and those up to the next clip, and what the stream
    began with: that is what calls read whole and none has written.
    """
    schedule, found = state.schedule, {name: _spec(value) for name, value in state.prepared.items()}
    first = schedule.first_call
    last = call if schedule.calls is None else min(call, schedule.calls)
    numbers = {
        *range(first, min(first + LOOK, last)),
        *range(max(first, last - LOOK), last),
        *_to_clip(schedule, call),
    }
    calls = [schedule.call(number) for number in sorted(numbers)]
    for made in calls:
        for output, name in made.writes.items():
            if made.variant is None or name in found:
                continue
            if made.variant.component == "decoder":
                shape = (video.frames(len(made.latents)), video.height, video.width, 3)
                found[name] = Spec(shape, np.dtype(np.uint8), "uint8")
            else:
                found[name] = _spec(driver.executor.output(made.variant, output))
        for emit in made.emit:
            for output, name in emit.writes.items():
                found.setdefault(
                    name, _spec(codec.output(Variant.of("decoder", chunk=len(emit.frames)), output))
                )
    for made in calls:
        for name, key in made.reads.items():
            if made.variant is not None and not made.lanes and not key.places and key.name not in found:
                found[key.name] = _spec(driver.executor.inputs(made.variant)[name])
    return found


def _to_clip(schedule: Schedule, call: int) -> range:
    """The numbers of the calls from this one on to the next that finishes a chunk."""
    end = call
    while (schedule.calls is None or end < schedule.calls) and not schedule.call(end).emit:
        end += 1
    return range(call, end + 1 if schedule.calls is None else min(end + 1, schedule.calls))


def _several(spec: Spec, count: int) -> Spec:
    return Spec((count, *spec.shape), spec.dtype, spec.kind)


def _spec(array: Any) -> Spec:
    return Spec(tuple(array.shape), np.dtype(getattr(array, "host_dtype", array.dtype)), str(array.dtype))


def _is_finite(array: np.ndarray, kind: str) -> bool:
    # On the host bf16 is uint16 and nothing else is; fp8 has no infinity.
    if array.dtype == np.uint16:
        return not ((array & 0x7F80) == 0x7F80).any()
    if kind == "float8_e4m3":
        return not ((array & 0x7F) == 0x7F).any()
    return array.dtype.kind != "f" or bool(np.isfinite(array).all())
