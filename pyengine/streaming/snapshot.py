"""Snapshots: a stream as bytes. A npz without pickles: a header in JSON, and arrays that are checked before any is used."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pyengine.bundle.bundle import Bundle, Video
from pyengine.errors import InputError, OutputError, ShapeError
from pyengine.runtime.executor import Executor
from pyengine.streaming.driver import StreamState

__all__ = ["check_bundle", "load", "pack", "unpack", "write"]

FORMAT = 2


def pack(header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> bytes:
    """Header and arrays as bytes."""
    buffer = io.BytesIO()
    text = json.dumps({"format": FORMAT, **header}).encode()
    np.savez_compressed(buffer, header=np.frombuffer(text, np.uint8), **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def write(path: str | Path, data: bytes) -> None:
    """Raises OutputError."""
    try:
        Path(path).write_bytes(data)
    except OSError as error:
        raise OutputError(
            f"cannot write the snapshot '{path}': {error.strerror}; choose another place"
        ) from error


def unpack(data: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Header and arrays of a snapshot. Raises InputError for bytes that are none, or of another format."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        header = json.loads(arrays.pop("header").tobytes())
    except Exception as error:
        raise InputError(
            f"expected a snapshot that Stream.snapshot made but cannot read this one ({error})"
        ) from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        found = header.get("format") if isinstance(header, dict) else header
        raise InputError(f"expected a snapshot of format {FORMAT} but got {found!r}; make it again")
    kinds = {"bundle": str, "settings": dict, "call": int, "frames_made": int}
    for name, kind in kinds.items():
        if type(header.get(name)) is not kind:
            raise InputError(
                f"expected '{name}' of the snapshot's header as {kind.__name__} but got {header.get(name)!r}; make it again"
            )
    if "pending" not in arrays:
        raise InputError("expected a snapshot with the array 'pending' but it has none; make it again")
    return header, arrays


def check_bundle(header: Mapping[str, Any], bundle: Bundle) -> None:
    """Raises InputError for the snapshot of another bundle."""
    if header["bundle"] != bundle.digest:
        raise InputError(
            f"the snapshot is of another bundle than '{bundle.name}' as loaded; load the one it was made with"
        )


def load(
    executor: Executor,
    state: StreamState,
    video: Video,
    header: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray],
) -> None:
    """Puts arrays into a stream that has just been opened. Raises InputError, before anything is used, where one does not fit."""
    schedule, call, pending = state.schedule, header["call"], arrays["pending"]
    last = schedule.calls
    if call < schedule.first_call or (last is not None and call > last):
        raise InputError(
            f"expected a snapshot at a call from {schedule.first_call} to {last} but it is at {call}; make it again"
        )
    shape = (video.height, video.width, 3)
    if pending.shape[1:] != shape or pending.dtype != np.uint8 or header["frames_made"] < 0:
        raise InputError(
            f"expected pending frames as uint8 {['frames', *shape]} but the snapshot has {pending.dtype} {list(pending.shape)}"
        )
    rings = {f"rings/{name}": ring for name, ring in state.rings.items()}
    given = {name for name in arrays if name.startswith("rings/")}
    if given != set(rings):
        raise InputError(
            f"expected the rings {', '.join(sorted(rings)) or 'none'} but the snapshot has {', '.join(sorted(given)) or 'none'}"
        )
    for name, ring in rings.items():
        dtype = getattr(ring, "host_dtype", ring.dtype)
        if arrays[name].shape != tuple(ring.shape) or arrays[name].dtype != dtype:
            raise InputError(
                f"expected {name} as {dtype} {list(ring.shape)} but the snapshot has "
                f"{arrays[name].dtype} {list(arrays[name].shape)}"
            )
    try:
        executor.load_state(_under("state/", arrays))
        state.store.load_state(_under("latents/", arrays))
    except ShapeError as error:
        raise InputError(f"the snapshot does not fit this plan: {error}") from error
    for name, ring in rings.items():
        ring[...] = arrays[name]
    state.call = call


def _under(prefix: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name[len(prefix) :]: array for name, array in arrays.items() if name.startswith(prefix)}
