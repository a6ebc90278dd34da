"""Files of weights, read without running anything in them and one tensor at a time. Knows no family."""

from __future__ import annotations

from .files import TensorFile, open_tensors
from .weights import Source, Weights

__all__ = ["Source", "TensorFile", "Weights", "open_tensors"]
