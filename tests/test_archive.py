"""Arrays from elsewhere: what numpy saved comes back; whatever else the bytes are, it is an InputError and nothing large is unpacked."""

from __future__ import annotations

import io
import tracemalloc
import zipfile
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

from pyengine.errors import InputError
from pyengine.streaming.archive import read_archive

MOST = 1 << 20


def saved(compressed: bool = True, **arrays: Any) -> bytes:
    buffer = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(buffer, **arrays)
    return buffer.getvalue()


def zipped(*entries: tuple[str, bytes], how: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", how) as archive:
        for name, content in entries:
            archive.writestr(name, content)
    return buffer.getvalue()


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def described(text: str, content: bytes = b"") -> bytes:
    head = text.encode("latin1")
    return b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head + content


def refused(data: bytes, match: str, most: int = MOST) -> None:
    with pytest.raises(InputError, match=match) as caught:
        read_archive(data, max_bytes=most)
    assert "\n" not in str(caught.value)


DTYPES = st.sampled_from(["u1", "i8", "<f4", ">f4", "f8", "f2", "?", "u2", "c8"])
SHAPES = arrays_of.array_shapes(min_dims=0, min_side=0, max_dims=4, max_side=5)


@given(arrays_of.arrays(DTYPES, SHAPES), st.booleans(), st.booleans())
def test_what_numpy_saved_comes_back(array: np.ndarray, compressed: bool, fortran: bool) -> None:
    array = np.asfortranarray(array) if fortran else array
    names = {"a": array, "window/key.0": np.arange(3)}
    found = read_archive(saved(compressed, **names), max_bytes=MOST)
    assert list(found) == list(names)
    assert found["a"].dtype == array.dtype
    assert found["a"].tobytes() == array.tobytes()
    assert found["a"].shape == array.shape
    assert found["a"].flags.writeable


def test_more_than_it_may_hold_is_refused_before_it_is_unpacked() -> None:
    bomb = saved(a=np.zeros(200 << 20, np.uint8))
    assert len(bomb) < MOST
    tracemalloc.start()
    refused(bomb, "at most 1048576 bytes but it unpacks to 2097")
    assert tracemalloc.get_traced_memory()[1] < 2 << 20
    tracemalloc.stop()
    two = saved(a=np.zeros(600_000, np.uint8), b=np.zeros(600_000, np.uint8))
    refused(two, "at most 1048576 bytes")
    assert len(read_archive(two, max_bytes=2 << 20)) == 2


def test_an_entry_that_is_larger_than_it_declares() -> None:
    """Both places of the size are changed, so that only the content tells."""
    true = npy(np.zeros(100_000, np.uint8))
    for size in (len(true) - 50_000, len(true) + 50_000):
        data = zipped(("a.npy", true)).replace(len(true).to_bytes(4, "little"), size.to_bytes(4, "little"))
        refused(data, "expected 'a'|damaged")


def test_pickles_and_other_dtypes_are_refused() -> None:
    objects = io.BytesIO()
    np.savez(objects, a=np.array([{}], object))
    refused(objects.getvalue(), "expected numbers in 'a' but got the dtype")
    refused(saved(a=np.array(["text"])), "expected numbers")
    refused(saved(a=np.zeros(2, [("x", "f4")])), "expected numbers")
    refused(saved(a=np.zeros(2, "M8[s]")), "expected numbers")
    refused(
        zipped(("a.npy", described("{'descr': '<f3', 'fortran_order': False, 'shape': ()}"))), "dtype <f3"
    )


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[" * 5000, "{'shape': (2,)}", "3", "()", "__import__('os').getpid()",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1.5,)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': [2]}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (True,)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (281474976710655, 281474976710655)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1000,)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1,), 'x': " + "9" * 5000 + "}",
    ],
)  # fmt: skip
def test_descriptions_that_cannot_be(text: str) -> None:
    refused(zipped(("a.npy", described(text, b"\0" * 8))), "expected 'a'")


def test_other_archives() -> None:
    for data in (b"", b"PK", b"no archive at all", npy(np.zeros(3))):
        refused(data, "expected an archive of arrays but it is damaged")
    with pytest.warns(UserWarning, match="Duplicate name"):
        twice = zipped(("a.npy", npy(np.zeros(3))), ("a.npy", npy(np.ones(3))))
    refused(twice, "has 'a' twice")
    refused(zipped(("../a.txt", b"x")), r"but got the file '\.\./a\.txt'")
    refused(zipped((".npy", npy(np.zeros(3)))), "but got the file")
    refused(zipped(("a.npy", npy(np.zeros(3))), how=zipfile.ZIP_BZIP2), "packed otherwise")
    refused(zipped(("a.npy", b"no array")), "expected 'a' to be an array")
    refused(zipped(("a.npy", b"\x93NUMPY\x09\x00")), "version 1 to 3")
    refused(zipped(*((f"{index}.npy", b"") for index in range(10_001))), "at most 10000 arrays")
    assert read_archive(zipped(), max_bytes=MOST) == {}


def test_cut_archives() -> None:
    data = saved(a=np.arange(1000), b=np.ones((3, 4), np.float32))
    for size in range(0, len(data), 37):
        refused(data[:size], "damaged")


WHOLE = saved(a=np.arange(200), b=np.ones((3, 4), np.float32), header=np.frombuffer(b'{"a": 1}', np.uint8))


@given(st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), min_size=1, max_size=6))
def test_any_bytes_are_read_or_refused(changes: list[tuple[int, int]]) -> None:
    data = bytearray(WHOLE)
    for place, value in changes:
        data[place] = value
    try:
        found = read_archive(bytes(data), max_bytes=MOST)
    except InputError:
        return
    assert sum(array.nbytes for array in found.values()) <= MOST
