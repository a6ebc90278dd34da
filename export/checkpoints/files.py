"""Tensors by name in one file: .safetensors, or the zip archive that torch.save writes.

    file = open_tensors("streaming_t2v.ckpt")      # reads names, shapes and places alone
    file.tensors["unet.conv_in.weight"].shape
    file.read("unet.conv_in.weight")               # that tensor, in the file's dtype, straight from its place

Of an archive the tensors under the first entry that it has of `entries` are meant, or without one those of the archive itself; what else
it holds is never read.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyengine.errors import InputError

from .archive import Archive, cut_off, is_archive, unreadable
from .pickle_data import Strided, read_pickle

_KINDS = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_SAFE = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: first byte in the file, and strides in elements."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    strides: tuple[int, ...]

    @property
    def elements(self) -> int:
        """From the first element to the last, those between included."""
        if 0 in self.shape:
            return 0
        return 1 + sum((size - 1) * step for size, step in zip(self.shape, self.strides, strict=True))

    @property
    def end(self) -> int:
        return self.start + self.elements * self.dtype.itemsize


@dataclass(frozen=True)
class TensorFile:
    path: Path
    tensors: Mapping[str, Place]

    def read(self, name: str) -> Tensor:
        """One tensor in the file's dtype, contiguous, in memory of its own. Raises InputError."""
        place = self.tensors[name]
        if place.elements == 0:
            return torch.empty(place.shape, dtype=place.dtype)
        data = bytearray(place.end - place.start)
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(place.start)
                view, got = memoryview(data), 0
                while got < len(data) and (count := file.readinto(view[got:])):
                    got += count
        except OSError as error:
            raise unreadable(self.path, str(error)) from error
        if got < len(data):
            raise cut_off(self.path, name, len(data), got)
        flat = torch.frombuffer(data, dtype=place.dtype)
        return flat.as_strided(place.shape, place.strides).contiguous()


def open_tensors(path: str | Path, entries: Sequence[str] = ("state_dict",)) -> TensorFile:
    """Names, shapes and places of the tensors of a file. Raises InputError that says what is wrong with it."""
    source = Path(path)
    try:
        size = source.stat().st_size
        with source.open("rb") as file:
            head = file.read(8)
    except OSError as error:
        raise unreadable(source, error.strerror or str(error)) from error
    if is_archive(head):
        return TensorFile(source, _of_archive(source, entries))
    if source.suffix == ".safetensors":
        return TensorFile(source, _of_safetensors(source, size, head))
    raise unreadable(source, "it is neither safetensors nor the zip archive of torch.save")


def _of_archive(source: Path, entries: Sequence[str]) -> dict[str, Place]:
    archive = Archive.open(source)
    loaded = read_pickle(archive.pickle)
    state = loaded if isinstance(loaded, dict) else None
    if state is not None:
        state = next((state[entry] for entry in entries if isinstance(state.get(entry), dict)), state)
    if not isinstance(state, dict) or not any(isinstance(value, Strided) for value in state.values()):
        raise InputError(
            f"[checkpoint] expected tensors by name in {source} but got something else; download it again"
        )
    found = {}
    for name, value in state.items():
        if not isinstance(value, Strided):
            continue  # counters and settings beside the tensors
        kind = _KINDS.get(value.storage.kind)
        if kind is None:
            raise unreadable(source, f"{name} is of {value.storage.kind}, which is not read here")
        place = Place(kind, value.shape, 0, value.strides)
        needed = (value.offset + place.elements) * kind.itemsize
        length = value.storage.length * kind.itemsize
        if needed > length:
            raise unreadable(source, f"{name} goes beyond its {length} bytes")
        start = archive.start(value.storage.key, length, str(name))
        found[str(name)] = Place(kind, value.shape, start + value.offset * kind.itemsize, value.strides)
    return found


def _of_safetensors(source: Path, size: int, head: bytes) -> dict[str, Place]:
    length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
    if not 2 <= length <= size - 8:
        raise unreadable(source, f"its header would have {length} bytes and the file has {size}")
    try:
        with source.open("rb") as file:
            file.seek(8)
            entries: dict[str, Any] = json.loads(file.read(length))
        entries.pop("__metadata__", None)
        found = {}
        for name, entry in entries.items():
            shape = tuple(int(extent) for extent in entry["shape"])
            strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
            start, end = (int(offset) for offset in entry["data_offsets"])
            place = Place(_SAFE[entry["dtype"]], shape, 8 + length + start, strides)
            if start < 0 or any(extent < 0 for extent in shape) or place.end != 8 + length + end:
                raise ValueError(f"{name} is not of the size that its shape has")
            found[name] = place
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise unreadable(source, f"its header makes no sense ({error})") from error
    for name, place in sorted(found.items(), key=lambda item: item[1].start):
        if place.end > size:
            raise cut_off(source, name, place.end - place.start, size - place.start)
    return found
