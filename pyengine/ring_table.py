"""RingTable: the rings of the streams of a batch on a GPU, found by address."""

from __future__ import annotations

from typing import NamedTuple

from .device_array import DeviceArray

__all__ = ["RingTable"]


class RingTable(NamedTuple):
    """What `ring_key` or `ring_value` of an op may be on a GPU: one ring per stream, each in memory of its own.

    A graph captured with a table survives streams that come and go: only `bases` is written again.
    """

    bases: DeviceArray  # int64 [streams], the address of each stream's ring, at a 16-byte boundary
    shape: tuple[int, ...]  # of each ring: [branches, ring, tokens, heads, head size]
    dtype: str
