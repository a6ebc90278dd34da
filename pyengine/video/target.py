"""The file under a muxer: written beside the place that it is for, until it holds something that can be played."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import uuid
from pathlib import Path
from typing import BinaryIO

__all__ = ["Target"]


class Target:
    """Unbuffered, and deaf after the first error, so that nothing good is spoilt.

    An earlier file at `path` stays until `publish`. A device or a pipe is written at once. Raises OSError.
    """

    def __init__(self, path: Path) -> None:
        self._final = Path(os.path.realpath(path))  # what a link leads to is replaced, not the link
        self._part: Path | None = None
        self._mode: int | None = None
        try:
            found = os.stat(self._final)
        except FileNotFoundError:
            in_place = False
        else:
            if stat.S_ISDIR(found.st_mode):
                raise OSError(errno.EISDIR, "it is a folder")
            if not os.access(self._final, os.W_OK):
                raise OSError(errno.EACCES, os.strerror(errno.EACCES))
            in_place = not stat.S_ISREG(found.st_mode)
            self._mode = stat.S_IMODE(found.st_mode)
        if not in_place:
            self._part = self._final.with_name(f".{uuid.uuid4().hex[:12]}.part")
        self._raw: BinaryIO = open(self._part or self._final, "wb", buffering=0)  # noqa: SIM115
        self.seek, self.tell = self._raw.seek, self._raw.tell
        self.error: BaseException | None = None
        self.good = 0  # bytes up to the end of the last whole fragment

    def write(self, data: bytes) -> int:
        # Errors are kept for `check`: PyAV calls this from C, where an interrupt would be dropped.
        try:
            rest = memoryview(data if self.error is None else b"")
            while rest:
                rest = rest[self._raw.write(rest) :]
        except BaseException as error:
            self.error = error
        return len(data)

    def check(self) -> bool:
        """To be called when the muxer has come back: whether it has written anything. Raises what went wrong."""
        if self.error is not None:
            raise self.error
        before, self.good = self.good, self._raw.tell()
        return self.good > before

    def publish(self) -> None:
        """Put the file in its place, instead of an earlier one. What is written later is written there."""
        if self._part is None:
            return
        if self._mode is not None:
            os.chmod(self._part, self._mode)
        os.replace(self._part, self._final)
        self._part = None

    def close(self) -> None:
        """Close the file; after an error what follows the last whole fragment goes. A file that was not published is removed."""
        if self.error is not None:
            with contextlib.suppress(OSError):  # a device, not a file
                self._raw.truncate(self.good)
        self._raw.close()
        if self._part is not None:
            self._part.unlink(missing_ok=True)
            self._part = None
