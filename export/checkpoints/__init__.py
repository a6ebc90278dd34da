"""Files of weights, read without running anything in them and one tensor at a time. Knows no family."""

from __future__ import annotations

from .files import TensorFile, open_tensors
from .named import NamedTensors, Source, open_all, some

__all__ = ["NamedTensors", "Source", "TensorFile", "open_all", "open_tensors", "some"]
