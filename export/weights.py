"""The weights of a bundle: one `weights.bin` that every ONNX file of the folder points into, each distinct
tensor stored once.
"""

from __future__ import annotations

import hashlib
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from pyengine.bundle.bundle import Constant

FILE = "weights.bin"
ALIGNMENT = 64
# Scalars and shapes stay in the graph: a compiler folds them while it parses, and a reader of the graph sees
# them.
INLINE_BYTES = 512


class WeightStore:
    """Collects tensors in the order they come; equal bytes share one place. `write` makes the file.

    With a folder the bytes go to its file at once, so that memory holds none of them.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._file: BinaryIO = BytesIO() if folder is None else (folder / FILE).open("w+b")
        self._folder, self._size = folder, 0
        self._places: dict[bytes, int] = {}

    def add(self, data: bytes | memoryview) -> int:
        """The offset of `data` in the file."""
        digest = hashlib.sha256(data).digest()
        if digest not in self._places:
            padding = -self._size % ALIGNMENT
            self._file.seek(self._size)
            self._file.write(bytes(padding))
            self._file.write(data)
            self._places[digest] = self._size + padding
            self._size += padding + len(data)
        return self._places[digest]

    def read(self, offset: int, length: int) -> bytes:
        self._file.seek(offset)
        return self._file.read(length)

    def constant(self, array: np.ndarray) -> Constant:
        return Constant(array.shape, str(array.dtype), FILE, self.add(array.tobytes()))

    def write(self, folder: Path) -> None:
        """Completes the file in `folder`, which is the store's own if it has one."""
        if self._folder is None:
            self._file.seek(0)
            (folder / FILE).write_bytes(self._file.read())
        self._file.flush()


def store_weights(model: onnx.ModelProto, store: WeightStore) -> None:
    """Moves initialisers into `store`. float32 values that fp16 holds exactly become fp16 and a Cast, so
    nothing is lost.
    """
    kept, casts = [], []
    for tensor in model.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            kept.append(tensor)  # it is there already
            continue
        array = numpy_helper.to_array(tensor)
        stored, cast = stored_initializer(tensor.name, array, store)
        kept.append(stored)
        if cast:
            casts.append(
                helper.make_node(
                    "Cast", [stored.name], [tensor.name], f"cast.{tensor.name}", to=TensorProto.FLOAT
                )
            )
    nodes = [*casts, *model.graph.node]
    del model.graph.initializer[:], model.graph.node[:]
    model.graph.initializer.extend(kept)
    model.graph.node.extend(nodes)


def stored_initializer(
    name: str, array: np.ndarray, store: WeightStore, *, bfloat16: bool = False
) -> tuple[TensorProto, bool]:
    """An initialiser for these values, and whether it is of half the size under another name and needs a Cast to be `name`.

    `bfloat16` rounds float32 values; without it only what fp16 holds exactly is halved.
    """
    if array.nbytes < INLINE_BYTES:
        return numpy_helper.from_array(array, name), False
    if array.dtype == np.float32 and bfloat16:
        rounded = array.astype(helper.tensor_dtype_to_np_dtype(TensorProto.BFLOAT16))
        return _external(f"{name}.bf16", rounded, store.add(rounded.tobytes())), True
    if array.dtype == np.float32 and (half := _exact_half(array)) is not None:
        return _external(f"{name}.fp16", half, store.add(half.tobytes())), True
    return _external(
        name, array, store.add(array.data.cast("B") if array.flags.c_contiguous else array.tobytes())
    ), False


def read_initializer(tensor: onnx.TensorProto, store: WeightStore) -> np.ndarray:
    """The values of an initialiser that `store_weights` has moved."""
    if tensor.data_location != TensorProto.EXTERNAL:
        return numpy_helper.to_array(tensor)
    place = {entry.key: entry.value for entry in tensor.external_data}
    offset, length = int(place["offset"]), int(place["length"])
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    return np.frombuffer(store.read(offset, length), dtype).reshape(tuple(tensor.dims))


def _exact_half(array: np.ndarray) -> np.ndarray | None:
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    return half if np.array_equal(half.astype(np.float32), array) else None


def _external(name: str, array: np.ndarray, offset: int) -> TensorProto:
    tensor = TensorProto(name=name, data_type=helper.np_dtype_to_tensor_dtype(array.dtype), dims=array.shape)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", FILE), ("offset", offset), ("length", array.nbytes)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor
