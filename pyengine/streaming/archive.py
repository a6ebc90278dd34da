"""Arrays out of untrusted bytes: a npz as `numpy.savez` makes it, every size checked before anything is unpacked, and no pickles."""

from __future__ import annotations

import ast
import io
import math
import re
import struct
import zipfile
import zlib
from collections.abc import Collection
from typing import Any

import numpy as np

from pyengine.errors import InputError

__all__ = ["read_archive"]

MOST_ARRAYS = 10_000
MOST_DIMS = 16
MOST_NAME = 300
MOST_HEADER = 10_000  # bytes of an array's description
DTYPE = re.compile(r"[<>|=]?([biufc])(\d{1,2})|[<>|=]?\?")
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
ENCRYPTED = 1


def read_archive(
    data: bytes, *, max_bytes: int, only: Collection[str] | None = None
) -> dict[str, np.ndarray]:
    """The arrays of a npz by name, which take at most `max_bytes` together; of those named in `only`, the ones that are there.

    Raises InputError, before it unpacks anything, for what is no npz, is damaged or cut, holds more than it may or other than numbers,
    or names an array twice.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = _checked(archive.infolist(), max_bytes, only)
            return {name: _array(archive, entry) for name, entry in entries.items()}
    except InputError:
        raise
    # What `zipfile` raises for damaged bytes.
    except (
        zipfile.BadZipFile,
        zlib.error,
        struct.error,
        EOFError,
        OSError,
        ValueError,
        KeyError,
        IndexError,
        NotImplementedError,
        RuntimeError,
        OverflowError,
    ) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"expected an archive of arrays but it is damaged ({reason})") from error


def _checked(
    infos: list[zipfile.ZipInfo], max_bytes: int, only: Collection[str] | None
) -> dict[str, zipfile.ZipInfo]:
    """The entries by the names of their arrays. Their declared sizes are kept, since an entry is read no further than that."""
    if len(infos) > MOST_ARRAYS:
        raise InputError(f"expected an archive of at most {MOST_ARRAYS} arrays but got {len(infos)}")
    entries: dict[str, zipfile.ZipInfo] = {}
    for info in infos:
        name = info.filename.removesuffix(".npy")
        if name == info.filename or not name or len(name) > MOST_NAME:
            raise InputError(f"expected arrays in the archive but got the file {info.filename[:40]!r}")
        if name in entries:
            raise InputError(f"expected arrays with names of their own but the archive has {name!r} twice")
        if info.compress_type not in METHODS or info.flag_bits & ENCRYPTED:
            raise InputError(f"expected {name!r} as numpy compresses it but it is packed otherwise")
        entries[name] = info
    if only is not None:
        entries = {name: info for name, info in entries.items() if name in only}
    total = sum(info.file_size for info in entries.values())
    if total > max_bytes:
        raise InputError(f"expected an archive of at most {max_bytes} bytes but it unpacks to {total}")
    return entries


def _array(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    name = info.filename.removesuffix(".npy")
    with archive.open(info) as file:
        shape, is_fortran, dtype = _description(file, name)
        count = math.prod(shape)
        start = file.tell()
        if start + count * dtype.itemsize != info.file_size:
            raise InputError(
                f"expected {name!r} to hold {dtype} {list(shape)} but it has {info.file_size - start} bytes"
            )
        content = file.read(info.file_size)  # to the end, where its checksum is compared
    if len(content) != count * dtype.itemsize:
        raise InputError(
            f"expected {count * dtype.itemsize} bytes of {name!r} but it ends after {len(content)}"
        )
    array = np.frombuffer(content, dtype, count).reshape(shape, order="F" if is_fortran else "C")
    return array.copy()  # writable


def _description(file: Any, name: str) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, order and dtype by the head of a npy file."""
    if file.read(6) != b"\x93NUMPY":
        raise InputError(f"expected {name!r} to be an array but it is none")
    version = file.read(2)
    size_format = {b"\x01\x00": "<H", b"\x02\x00": "<I", b"\x03\x00": "<I"}.get(version)
    if size_format is None:
        raise InputError(f"expected {name!r} in version 1 to 3 of numpy's format but it is in another")
    (length,) = struct.unpack(size_format, file.read(struct.calcsize(size_format)))
    if length > MOST_HEADER:
        raise InputError(f"expected {name!r} with a short description but it has {length} bytes")
    text = file.read(length).decode("latin1")
    try:
        described = ast.literal_eval(text.strip())
        shape, is_fortran, kind = described["shape"], described["fortran_order"], described["descr"]
    except (SyntaxError, TypeError, MemoryError, RecursionError, ValueError, KeyError) as error:
        raise InputError(f"expected {name!r} with shape and dtype but its description is damaged") from error
    is_shape = isinstance(shape, tuple) and len(shape) <= MOST_DIMS
    if not is_shape or not all(type(size) is int and 0 <= size < 2**48 for size in shape):
        raise InputError(f"expected {name!r} with a shape of whole numbers but got {str(shape)[:60]}")
    if not isinstance(kind, str) or not DTYPE.fullmatch(kind):
        raise InputError(f"expected numbers in {name!r} but got the dtype {str(kind)[:60]}")
    try:
        return shape, bool(is_fortran), np.dtype(kind)
    except TypeError as error:  # such as a float of 3 bytes
        raise InputError(f"expected numbers in {name!r} but got the dtype {kind}") from error
