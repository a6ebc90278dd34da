"""Whether one more session fits: by seconds per call that were measured, and by bytes that are reserved before it starts."""

from __future__ import annotations

import threading
from collections.abc import Mapping

from pyengine.errors import PyEngineError

__all__ = ["Admission", "Busy", "real_time_capacity"]

USABLE = 0.85  # of the time


class Busy(PyEngineError):
    """There is no room now; it may be asked again after `retry_after` seconds."""

    def __init__(self, message: str, reason: str, retry_after: float = 5.0) -> None:
        super().__init__(message)
        self.reason, self.retry_after = reason, retry_after


def real_time_capacity(seconds: Mapping[int, float], calls_per_second: float, most: int) -> int:
    """How many streams can be kept in real time. `seconds` are those of a call of so many streams, as measured; between measured
    numbers the next larger one counts. At least 1: a server that is too slow still serves, late.
    """
    fits = 1
    for streams in range(1, most + 1):
        cost = next((seconds[size] for size in sorted(seconds) if size >= streams), None)
        if cost is not None and cost * calls_per_second <= USABLE:
            fits = streams
    return fits


class Admission:
    """Reserves a place and bytes for each session. Safe to share between threads; what is reserved is given back by `release`."""

    def __init__(self, most_streams: int, most_bytes: int | None) -> None:
        self.most_streams, self.most_bytes = most_streams, most_bytes
        self._live = most_streams
        self._lock = threading.Lock()
        self._held: dict[str, tuple[int, bool]] = {}

    @property
    def bytes(self) -> int:
        """Bytes that are reserved now."""
        with self._lock:
            return sum(size for size, _ in self._held.values())

    @property
    def streams(self) -> int:
        with self._lock:
            return len(self._held)

    def allow_live(self, streams: int) -> None:
        """So many live sessions can be kept in real time."""
        self._live = min(streams, self.most_streams)

    def reserve(self, name: str, size: int, live: bool) -> None:
        """Takes a place and so many bytes. Asking again for the same name changes nothing. Raises Busy."""
        with self._lock:
            if name in self._held:
                return
            held = sum(one for one, _ in self._held.values())
            if self.most_bytes is not None and held + size > self.most_bytes:
                raise Busy(
                    f"expected a session within {self.most_bytes} bytes but {held} are reserved and it needs {size}; "
                    "try again later",
                    "memory",
                )
            if len(self._held) >= self.most_streams or (
                live and sum(is_live for _, is_live in self._held.values()) >= self._live
            ):
                raise Busy(
                    f"this server keeps at most {self._live} live sessions and {self.most_streams} streams going; try again later",
                    "streams",
                )
            self._held[name] = (size, live)

    def release(self, name: str) -> None:
        """Gives back what a session had; nothing happens where it had nothing."""
        with self._lock:
            self._held.pop(name, None)
