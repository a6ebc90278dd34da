"""The zip archive of torch.save: one pickle, and the numbers of each storage under `data/<key>`, stored as they are.

A file that is cut off has lost the directory at its end, and says nothing of itself to a zip reader. Then the entries are followed from the
front, where the pickle is, to find the tensor in whose midst the file ends.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pyengine.errors import InputError

from .pickle_data import Strided, read_pickle

_LOCAL = b"PK\x03\x04"
_HEADER = struct.Struct("<4s5H3I2H")  # 30 bytes, then a name and an extra field of the lengths at the end
PICKLE, DATA = "/data.pkl", "/data/"
_WIDTH = {"Double": 8, "Long": 8, "Float": 4, "Int": 4, "Half": 2, "BFloat16": 2, "Short": 2}


def is_archive(head: bytes) -> bool:
    return head.startswith(_LOCAL)


@dataclass(frozen=True)
class Archive:
    """`places`: first byte and length of each storage by its key."""

    path: Path
    pickle: bytes
    places: Mapping[str, tuple[int, int]]

    @classmethod
    def open(cls, path: Path) -> Archive:
        """Raises InputError for a file that is cut off, compressed, or none of torch.save."""
        try:
            with zipfile.ZipFile(path) as archive, path.open("rb") as file:
                infos = archive.infolist()
                pickles = [info for info in infos if info.filename.endswith(PICKLE)]
                if len(pickles) != 1 or any(info.compress_type != zipfile.ZIP_STORED for info in infos):
                    raise unreadable(path, "it is no archive of torch.save")
                root = pickles[0].filename.removesuffix(PICKLE)
                if (
                    f"{root}/byteorder" in archive.namelist()
                    and archive.read(f"{root}/byteorder") != b"little"
                ):
                    raise unreadable(path, "its numbers are big-endian")
                prefix = root + DATA
                places = {
                    info.filename.removeprefix(prefix): (_start(file, info.header_offset), info.file_size)
                    for info in infos
                    if info.filename.startswith(prefix)
                }
                return cls(path, archive.read(pickles[0]), places)
        except (zipfile.BadZipFile, struct.error, NotImplementedError, EOFError) as error:
            raise _where_it_ends(path) from error
        except OSError as error:
            raise unreadable(path, error.strerror or str(error)) from error

    def start(self, key: str, length: int, name: str) -> int:
        """The first byte of a storage, which has at least so many. Raises InputError that names the tensor."""
        if key not in self.places:
            raise unreadable(self.path, f"it has no data for {name}")
        start, got = self.places[key]
        if got < length:
            raise unreadable(self.path, f"{name} has {got} bytes of {length}")
        return start


def _start(file: BinaryIO, header: int) -> int:
    """The first byte behind the header of an entry."""
    file.seek(header)
    fields = _HEADER.unpack(file.read(_HEADER.size))
    if fields[0] != _LOCAL:
        raise zipfile.BadZipFile("an entry without its header")
    return header + _HEADER.size + int(fields[-2]) + int(fields[-1])


def _where_it_ends(path: Path) -> InputError:
    """What to say of an archive that a zip reader cannot open: the tensor in which it ends, if that can be found."""
    size = path.stat().st_size
    with path.open("rb") as file:
        try:
            start = _start(file, 0)
            file.seek(start)
            state = read_pickle(_up_to_entry(file))
        except (zipfile.BadZipFile, struct.error, InputError):
            return unreadable(path, "it ends before its first tensor, or is no archive of torch.save")
        lengths, names = _storages(state)
        seen = set()
        for at, key in _entries(file, start, size, lengths):
            if at + lengths[key] > size:
                return cut_off(path, names[key], lengths[key], size - at)
            seen.add(key)
    for key, length in lengths.items():
        if key not in seen:
            return cut_off(path, names[key], length, 0)
    return unreadable(path, "the directory at its end is missing")


def _up_to_entry(file: BinaryIO) -> bytes:
    """Bytes from here to the header of the next entry, or to the end of the file."""
    found = bytearray()
    while block := file.read(1 << 20):
        searched = max(0, len(found) - 3)
        found += block
        at = found.find(_LOCAL, searched)
        if at >= 0:
            return bytes(found[:at])
    return bytes(found)


def _entries(file: BinaryIO, at: int, size: int, lengths: Mapping[str, int]) -> Iterator[tuple[int, str]]:
    """First byte and key of each storage whose header the file still has, from `at` on."""
    while (head := _search(file, at)) is not None:
        file.seek(head)
        fields = _HEADER.unpack(file.read(_HEADER.size).ljust(_HEADER.size, b"\0"))
        name = file.read(fields[-2]).decode("utf-8", "replace")
        at = head + _HEADER.size + int(fields[-2]) + int(fields[-1])
        key = name.partition(DATA)[2]
        if at <= size and key in lengths:
            yield at, key
            at += lengths[key]


def _search(file: BinaryIO, at: int) -> int | None:
    """Where the next header of an entry begins."""
    file.seek(at)
    overlap = b""
    while block := file.read(1 << 20):
        found = (overlap + block).find(_LOCAL)
        if found >= 0:
            return at - len(overlap) + found
        overlap = block[-3:]
        at += len(block)
    return None


def _storages(state: Any) -> tuple[dict[str, int], dict[str, str]]:
    """Bytes and a tensor's name of every storage, in the order of the file."""
    lengths: dict[str, int] = {}
    names: dict[str, str] = {}

    def visit(value: Any, name: str) -> None:
        if isinstance(value, Strided):
            key, width = value.storage.key, _WIDTH.get(value.storage.kind.removesuffix("Storage"), 1)
            lengths.setdefault(key, value.storage.length * width)
            names.setdefault(key, name)
        elif isinstance(value, dict):
            for key, part in value.items():
                visit(part, f"{name}.{key}" if name and name != "state_dict" else str(key))

    visit(state, "")
    return lengths, names


def unreadable(path: Path, reason: str) -> InputError:
    return InputError(
        f"[checkpoint] expected a file of plain tensors but cannot read {path} ({reason}); download it again"
    )


def cut_off(path: Path, name: str, wanted: int, got: int) -> InputError:
    return InputError(
        f"[checkpoint] expected {wanted} bytes of {name} in {path} but the file ends after {max(0, got)} of them; download it again"
    )
