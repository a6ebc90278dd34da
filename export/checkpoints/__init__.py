"""Files of weights, read without running anything in them and one tensor at a time. Knows no family."""

from __future__ import annotations

from .files import TensorFile, open_tensors

__all__ = ["TensorFile", "open_tensors"]
