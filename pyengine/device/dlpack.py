"""DLPack capsules of memory on a GPU (https://dmlc.github.io/dlpack): the C structure, made with ctypes."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_int32, c_int64, c_uint8, c_uint16, c_uint64, c_void_p, py_object

# kDLCUDA, as the device type of a tensor
CUDA = 2
# dtype -> (type code, bits)
_TYPES = {
    "int32": (0, 32),
    "int64": (0, 64),
    "uint8": (1, 8),
    "float16": (2, 16),
    "float32": (2, 32),
    "bfloat16": (4, 16),
    "bool": (6, 8),
    "float8_e4m3": (10, 8),  # kDLFloat8_e4m3fn
}


class _Tensor(Structure):
    _fields_ = (
        ("data", c_void_p),
        ("device_type", c_int32),
        ("device_id", c_int32),
        ("ndim", c_int32),
        ("code", c_uint8),
        ("bits", c_uint8),
        ("lanes", c_uint16),
        ("shape", POINTER(c_int64)),
        ("strides", POINTER(c_int64)),
        ("byte_offset", c_uint64),
    )


class _Managed(Structure):
    pass


_Deleter = ctypes.CFUNCTYPE(None, POINTER(_Managed))
_Managed._fields_ = (("tensor", _Tensor), ("context", c_void_p), ("deleter", _Deleter))
_Destructor = ctypes.CFUNCTYPE(None, c_void_p)

_new = ctypes.pythonapi.PyCapsule_New
_new.restype, _new.argtypes = py_object, (c_void_p, ctypes.c_char_p, _Destructor)
_is_valid = ctypes.pythonapi.PyCapsule_IsValid
_is_valid.restype, _is_valid.argtypes = ctypes.c_int, (c_void_p, ctypes.c_char_p)
_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = c_void_p, (c_void_p, ctypes.c_char_p)
_NAME = b"dltensor"
# What a reader holds, by the address of its structure.
_alive: dict[int, tuple[object, ...]] = {}


@_Deleter
def _release(managed: ctypes._Pointer) -> None:
    _alive.pop(ctypes.addressof(managed.contents), None)


@_Destructor
def _forget(capsule: int) -> None:
    """A capsule that nobody has consumed takes its tensor along."""
    if _is_valid(capsule, _NAME):
        _alive.pop(_pointer(capsule, _NAME), None)


def capsule(pointer: int, sizes: Sequence[int], dtype: str, device: tuple[int, int], owner: object) -> object:
    """A C-contiguous array as a capsule `dltensor`, which keeps `owner` alive until the reader lets go.

    device: type and number, as `__dlpack_device__` gives them.
    """
    rank = len(sizes)
    shape = (c_int64 * rank)(*sizes)
    steps: list[int] = []
    step = 1
    for size in reversed(sizes):
        steps.insert(0, step)
        step *= size
    strides = (c_int64 * rank)(*steps)
    code, bits = _TYPES[dtype]
    tensor = _Tensor(pointer, *device, rank, code, bits, 1, shape, strides, 0)
    managed = _Managed(tensor, None, _release)
    address = ctypes.addressof(managed)
    _alive[address] = (managed, shape, strides, owner)
    return _new(address, _NAME, _forget)
