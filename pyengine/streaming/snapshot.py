"""Snapshots: a stream as bytes. A npz without pickles: a header in JSON, and arrays that are checked before any is used.

A snapshot may come from anywhere. Its header is read first, within a small bound. Once the stream that it describes is open, the plan says
what arrays there must be and how large all of them may be together; only then are they unpacked.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from pyengine.arguments import printable
from pyengine.bundle.bundle import Bundle, Video
from pyengine.errors import InputError, OutputError, ShapeError
from pyengine.runtime.executor import Executor
from pyengine.settings import shown
from pyengine.streaming.archive import read_archive
from pyengine.streaming.driver import Driver
from pyengine.streaming.fitting import (
    CALL,
    CLEAN,
    INDEX,
    KEPT,
    LATENTS,
    PENDING,
    RINGS,
    STATE,
    Fit,
    fit_of,
    missing_latents,
    missing_values,
)
from pyengine.streaming.state import StreamState

__all__ = [
    "check_bundle",
    "digest",
    "load",
    "pack",
    "read_bytes",
    "read_header",
    "read_inner",
    "state_arrays",
    "write",
]

FORMAT = 3
HEADER = "header"
MOST_HEADER = 2**22  # bytes; one with the longest ladder takes half of it
MOST_NUMBER = 2**53  # of a call or a frame
ENTRIES = {"bundle": str, "settings": dict, "frames_made": int, "clips": list, "digest": str}


def pack(header: Mapping[str, Any], arrays: Mapping[str, np.ndarray], compress: bool = True) -> bytes:
    """Header and arrays as bytes; without `compress` a little larger and many times sooner."""
    buffer = io.BytesIO()
    whole = {"format": FORMAT, **header}
    text = json.dumps(whole | {"digest": digest(whole, arrays)}).encode()
    save = np.savez_compressed if compress else np.savez
    save(buffer, header=np.frombuffer(text, np.uint8), **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def digest(header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> str:
    """sha256 of all that a snapshot says, so that parts of two are told from one."""
    said = {name: value for name, value in header.items() if name != "digest"}
    found = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        found.update(f"\n{name} {array.dtype.str} {arrays[name].shape}\n".encode(errors="replace"))
        found.update(array.reshape(-1).view(np.uint8).data)
    return found.hexdigest()


def write(path: str | Path, data: bytes) -> None:
    """An earlier file is replaced once the whole is written. Raises OutputError."""
    from pyengine.video.target import Target

    if not isinstance(path, str | bytes | os.PathLike):
        raise OutputError(f"expected the name of a file for the snapshot but got {shown(path)}")
    name = os.fsdecode(path)
    try:
        target = Target(Path(name))
        try:
            target.write(data)
            target.check()
            target.publish()
        finally:
            target.close()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OutputError(
            f"cannot write the snapshot '{printable(name[:200])}': {reason}; choose another place"
        ) from error


def read_bytes(state: bytes | str | Path) -> bytes:
    """A snapshot, or the content of its file. Raises InputError."""
    if isinstance(state, bytes | bytearray | memoryview):
        return bytes(state)
    if not isinstance(state, str | os.PathLike):
        raise InputError(f"expected a snapshot as bytes or the name of its file but got {shown(state)}")
    try:
        path = Path(os.fsdecode(state))
        # A pipe or a device may have no end.
        is_other = path.exists() and not path.is_file()
        data = b"" if is_other else path.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot read the snapshot '{printable(str(state)[:200])}': {reason}") from error
    if is_other:
        raise InputError(f"expected the file of a snapshot but '{printable(str(state)[:200])}' is none")
    return data


def state_arrays(
    executor: Executor, state: StreamState, pending: list[Any], video: Video
) -> dict[str, np.ndarray]:
    """All that a stream depends on, beside its settings. `executor` is that of its decoder; `pending` are frames nobody has taken."""
    latents = state.store.state()
    arrays = {CALL: np.array(state.call, np.int64), LATENTS: latents["latents"]}
    arrays |= {INDEX: latents["clean_index"], CLEAN: latents["clean"]}
    arrays |= {RINGS + name: ring.copy() for name, ring in state.rings.items()}
    arrays |= {STATE + name: value for name, value in executor.state().items()}
    # A resumed stream makes the prepared ones again.
    kept = {name: value for name, value in state.kept.items() if value is not state.prepared.get(name)}
    arrays |= {KEPT + name: value for name, value in kept.items()}
    nothing = np.zeros((0, video.height, video.width, 3), np.uint8)
    arrays[PENDING] = np.stack([np.asarray(frame) for frame in pending]) if pending else nothing
    return arrays


def read_header(data: bytes) -> dict[str, Any]:
    """The header of a snapshot. Raises InputError for bytes that are none, or of another format."""
    try:
        found = read_archive(data, max_bytes=MOST_HEADER, only={HEADER})[HEADER]
        header = json.loads(found.tobytes(), parse_constant=_refuse_constant)
    except KeyError:
        raise InputError("expected a snapshot that Stream.snapshot made but it has no header") from None
    except RecursionError as error:
        raise InputError("expected a snapshot but its header is nested too deep; make it again") from error
    except (InputError, ValueError) as error:
        raise InputError(
            f"expected a snapshot that Stream.snapshot made but cannot read this one ({error})"
        ) from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        got = header.get("format") if isinstance(header, dict) else header
        raise InputError(f"expected a snapshot of format {FORMAT} but got {shown(got)}; make it again")
    for name, kind in ENTRIES.items():
        if type(header.get(name)) is not kind:
            raise InputError(
                f"expected '{name}' of the snapshot's header as {kind.__name__} but got {shown(header.get(name))}; make it again"
            )
    if not 0 <= header["frames_made"] <= MOST_NUMBER:
        raise InputError(
            f"expected 'frames_made' of the snapshot's header from 0 to {MOST_NUMBER} but got {shown(header['frames_made'])}"
        )
    if any(type(length) is not int or not 1 <= length <= MOST_NUMBER for length in header["clips"]):
        raise InputError(
            f"expected 'clips' of the snapshot's header as lengths of clips but got {shown(header['clips'])}"
        )
    return header


def check_bundle(header: Mapping[str, Any], bundle: Bundle) -> None:
    """Raises InputError for the snapshot of another bundle."""
    if header["bundle"] != bundle.digest:
        raise InputError(
            f"the snapshot is of another bundle than '{bundle.name}' as loaded; load the one it was made with"
        )


def load(
    driver: Driver,
    executor: Executor,
    state: StreamState,
    video: Video,
    data: bytes,
    frames: int | None,
    given: int | None = None,
    others: Collection[str] = (),
) -> np.ndarray:
    """Puts what a snapshot holds into a stream that has just been opened, and returns its pending frames. `frames` is the stream's
    length; `given` are the latents that it has got from a stage before, whose others are still to come; `others` are arrays that the
    caller has read. Raises InputError, before anything is used, where something does not fit.
    """
    header = read_header(data)
    call = _call(data, state)
    if "switched" in header:
        state.switch(_switched(header["switched"], state, call))
    fit = fit_of(driver, executor, state, video, call)
    arrays = _arrays(data, header, fit, others)
    fit.check(arrays)
    _check_progress(header, state, call, arrays, frames, given)
    kept = _under(KEPT, arrays)
    rings = {name: arrays[RINGS + name] for name in state.rings}
    own = {name: arrays[STATE + name] for name in executor.state()}
    try:
        executor.load_state(own)
        state.store.load_state(
            {"latents": arrays[LATENTS], "clean_index": arrays[INDEX], "clean": arrays[CLEAN]}
        )
    except ShapeError as error:
        raise InputError(f"the snapshot does not fit this plan: {error}") from error
    for name, ring in state.rings.items():
        ring[...] = rings[name]
    state.kept |= kept
    state.call = call
    return arrays[PENDING]


def _call(data: bytes, state: StreamState) -> int:
    """The number of the call that comes next."""
    found = read_archive(data, max_bytes=MOST_HEADER, only={CALL}).get(CALL)
    if found is None or found.shape != () or found.dtype != np.int64:
        raise InputError(f"expected a snapshot with {CALL} as one whole number; make it again")
    call, first, last = int(found), state.schedule.first_call, state.schedule.calls
    if not first <= call <= (MOST_NUMBER if last is None else last):
        raise InputError(
            f"expected a snapshot at a call from {first} to {last} but it is at {call}; make it again"
        )
    return call


def _switched(given: Any, state: StreamState, call: int) -> int:
    """The call before which the prompt last changed what stays visible."""
    if type(given) is not int or not state.schedule.first_call <= given <= call:
        raise InputError(
            f"expected 'switched' of the snapshot's header as a call up to {call} but got {shown(given)}; make it again"
        )
    return given


def read_inner(data: bytes, name: str) -> bytes:
    """A snapshot that is an array of another one. Raises InputError."""
    # It was compressed already, so it takes no more than the whole.
    found = read_archive(data, max_bytes=len(data) + MOST_HEADER, only={name}).get(name)
    if found is None or found.ndim != 1 or found.dtype != np.uint8:
        raise InputError(f"expected a snapshot with the array '{name}' of bytes; make it again")
    return found.tobytes()


def _arrays(
    data: bytes, header: Mapping[str, Any], fit: Fit, others: Collection[str]
) -> dict[str, np.ndarray]:
    room = len(data) if others else 0
    try:
        arrays = read_archive(data, max_bytes=fit.max_bytes + MOST_HEADER + room)
    except InputError as error:
        raise InputError(f"the snapshot does not fit this plan ({error}); make it again") from error
    arrays.pop(HEADER)
    if header["digest"] != digest(header, arrays):
        raise InputError(
            "expected a snapshot as Stream.snapshot made it but it was changed since; make it again"
        )
    return {name: array for name, array in arrays.items() if name not in others}


def _check_progress(
    header: Mapping[str, Any],
    state: StreamState,
    call: int,
    arrays: Mapping[str, np.ndarray],
    frames: int | None,
    given: int | None,
) -> None:
    """Raises InputError where the stream could not go on from there."""
    pending, made, clips = len(arrays[PENDING]), header["frames_made"], header["clips"]
    if sum(clips) > pending:
        raise InputError(
            f"expected clips of {pending} pending frames in the snapshot but they have {sum(clips)}; make it again"
        )
    if frames is not None and made > frames:
        raise InputError(f"expected at most {frames} frames made but the snapshot says {made}; make it again")
    is_ended = state.schedule.calls is not None and call >= state.schedule.calls
    if is_ended and frames is not None and made + pending < frames:
        raise InputError(
            f"expected a snapshot with the rest of {frames} frames, since every call is made, but it has {made} and {pending} pending"
        )
    if missing := missing_latents(state.schedule, call, arrays[INDEX], given):
        raise InputError(
            f"expected a snapshot with the clean latents that the next calls read but it has none of frame {missing[0]}; make it again"
        )
    if lacking := missing_values(state, call, _under(KEPT, arrays).keys()):
        raise InputError(
            f"expected a snapshot with the values that the next calls read but it has no '{lacking[0]}'; make it again"
        )


def _under(prefix: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name[len(prefix) :]: array for name, array in arrays.items() if name.startswith(prefix)}


def _refuse_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number")
