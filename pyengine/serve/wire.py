"""The binary message: 32 bytes that say what follows, little endian, then the payload. Messages of one kind pair with no other.

0  "PYE1"        4  u8 kind      5  u8 flags     6  u16 codec    8  u64 frame    16 u32 epoch
20 u32 events applied           24 u16 width    26 u16 height   28 u32 payload bytes
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum, IntFlag

from pyengine.errors import InputError

__all__ = ["Codec", "Flag", "Kind", "Message"]

LAYOUT = struct.Struct("<4sBBHQIIHHI")
MAGIC = b"PYE1"


class Kind(IntEnum):
    FRAME = 1
    SNAPSHOT = 2


class Flag(IntFlag):
    KEY = 1
    LAST_OF_CHUNK = 2
    REPLAYED = 4


class Codec(IntEnum):
    NONE = 0
    JPEG = 1
    WEBP = 2
    RGB24 = 3
    H264 = 4


@dataclass(frozen=True, slots=True)
class Message:
    """One binary message. `frame` counts from 0 in the session's timeline and never restarts; a frame of an older epoch is void."""

    kind: int
    payload: bytes
    flags: int = 0
    codec: int = 0
    frame: int = 0
    epoch: int = 0
    events: int = 0
    width: int = 0
    height: int = 0

    def pack(self) -> bytes:
        return (
            LAYOUT.pack(
                MAGIC,
                self.kind,
                self.flags,
                self.codec,
                self.frame,
                self.epoch,
                self.events,
                self.width,
                self.height,
                len(self.payload),
            )
            + self.payload
        )

    @classmethod
    def read(cls, data: bytes) -> Message:
        """Raises InputError for bytes that are no such message."""
        if len(data) < LAYOUT.size or data[:4] != MAGIC:
            raise InputError(f"expected a message that begins with {MAGIC!r} but got {data[:8]!r}")
        _, kind, flags, codec, frame, epoch, events, width, height, size = LAYOUT.unpack_from(data)
        if len(data) != LAYOUT.size + size:
            raise InputError(f"expected {size} bytes after the head but got {len(data) - LAYOUT.size}")
        return cls(kind, data[LAYOUT.size :], flags, codec, frame, epoch, events, width, height)
