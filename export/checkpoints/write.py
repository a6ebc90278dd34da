"""Writes .safetensors one tensor at a time: names, shapes and dtypes are known before the first is read."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path

import torch

from .named import Source

_NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_safetensors(path: Path, sources: Mapping[str, Source]) -> None:
    """The tensors under these names, each in the dtype that its file has it in."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, source in sources.items():
        place = source.file.tensors[source.name]
        start, end = end, end + math.prod(place.shape) * place.dtype.itemsize
        header[name] = {
            "dtype": _NAMES[place.dtype],
            "shape": list(place.shape),
            "data_offsets": [start, end],
        }
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        for source in sources.values():
            file.write(source.read().flatten().view(torch.uint8).numpy().data)
