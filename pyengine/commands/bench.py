"""Measure a bundle on this machine: steady frames per second, first frame cold and warm, calls, memory, overhead, and peers.

Peers run the same weights and the same schedule in PyTorch and in plain ONNX Runtime, in turns with the engine; they need the extra
'export', and --no-peers leaves them out.
"""

from __future__ import annotations

from pyengine.measure.bench import add_arguments, run

__all__ = ["add_arguments", "run"]
