"""ONNX files of a bundle with their weights. Needs the package `onnx`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx

from pyengine.bundle.schema import is_inside
from pyengine.errors import BundleError

__all__ = ["load_graph"]


def load_graph(path: Path) -> onnx.ModelProto:
    """The model with the weights that lie in other files of its folder. Raises BundleError where one does not lie there.

    `onnx.load` refuses a file with more than one hard link, which is what uv and other installers make of every file of a package.
    """
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's own errors have no common parent
        raise BundleError(
            f"{path} is no readable ONNX file ({error}); copy or export the bundle again"
        ) from error
    for tensor in _tensors(model.graph):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        places = {entry.key: entry.value for entry in tensor.external_data}
        tensor.raw_data = _read(path, tensor.name, places)
        tensor.data_location = onnx.TensorProto.DEFAULT
        del tensor.external_data[:]
    return model


def _read(path: Path, name: str, places: dict[str, str]) -> bytes:
    location = places.get("location", "")
    try:
        if not is_inside(location):
            raise ValueError(f"its file {location!r} lies outside the bundle")
        with (path.parent / location).open("rb") as file:
            offset = int(places.get("offset", 0))
            size = file.seek(0, 2)
            length = int(places.get("length", size - offset))
            if offset < 0 or length < 0 or offset + length > size:
                raise ValueError(f"it ends at byte {offset + length} of {location}, which has {size}")
            file.seek(offset)
            return file.read(length)
    except (OSError, ValueError) as error:
        raise BundleError(
            f"{path} has the weight {name!r} that cannot be read ({error}); copy or export the bundle again"
        ) from error


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Every tensor that may have its data elsewhere, also those of nodes and of graphs within nodes."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for inner in (*((attribute.g,) if attribute.HasField("g") else ()), *attribute.graphs):
                yield from _tensors(inner)
