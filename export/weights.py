"""The weights of a bundle: one `weights.bin` that every ONNX file of the folder points into, each distinct
tensor stored once.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from pyengine.bundle import Constant

FILE = "weights.bin"
ALIGNMENT = 64
# Scalars and shapes stay in the graph: a compiler folds them while it parses, and a reader of the graph sees
# them.
INLINE_BYTES = 512


class WeightStore:
    """Collects tensors in the order they come; equal bytes share one place. `write` makes the file."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._places: dict[bytes, int] = {}

    def add(self, data: bytes) -> int:
        """The offset of `data` in the file."""
        digest = hashlib.sha256(data).digest()
        if digest not in self._places:
            self._data += bytes(-len(self._data) % ALIGNMENT)
            self._places[digest] = len(self._data)
            self._data += data
        return self._places[digest]

    def constant(self, array: np.ndarray) -> Constant:
        return Constant(array.shape, str(array.dtype), FILE, self.add(array.tobytes()))

    def write(self, folder: Path) -> None:
        (folder / FILE).write_bytes(self._data)


def store_weights(model: onnx.ModelProto, store: WeightStore) -> None:
    """Moves initialisers into `store`. float32 values that fp16 holds exactly become fp16 and a Cast, so
    nothing is lost.
    """
    kept, casts = [], []
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.nbytes < INLINE_BYTES:
            kept.append(numpy_helper.from_array(array, tensor.name))
            continue
        name = tensor.name
        if array.dtype == np.float32 and (half := _exact_half(array)) is not None:
            array, name = half, f"{tensor.name}.fp16"
            casts.append(
                helper.make_node("Cast", [name], [tensor.name], f"cast.{tensor.name}", to=TensorProto.FLOAT)
            )
        kept.append(_external(name, array, store.add(array.tobytes())))
    nodes = [*casts, *model.graph.node]
    del model.graph.initializer[:], model.graph.node[:]
    model.graph.initializer.extend(kept)
    model.graph.node.extend(nodes)


def read_initializer(tensor: onnx.TensorProto, store: WeightStore) -> np.ndarray:
    """The values of an initialiser that `store_weights` has moved."""
    if tensor.data_location != TensorProto.EXTERNAL:
        return numpy_helper.to_array(tensor)
    place = {entry.key: entry.value for entry in tensor.external_data}
    offset, length = int(place["offset"]), int(place["length"])
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    return np.frombuffer(store._data[offset : offset + length], dtype).reshape(tuple(tensor.dims))


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
