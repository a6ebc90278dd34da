"""Files of weights, read without running anything in them and one tensor at a time. Knows no family."""

from __future__ import annotations

from .files import TensorFile, open_tensors
from .named import NamedTensors, open_all
from .weights import Source, Weights, some

__all__ = ["NamedTensors", "Source", "TensorFile", "Weights", "open_all", "open_tensors", "some"]
