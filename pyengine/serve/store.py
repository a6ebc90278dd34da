"""Where sessions and jobs are kept: six operations on bytes under keys, in a folder or in memory.

Keys are parts joined by slashes, which this package makes from ids and numbers. What is put is there whole or not at all; what is appended
is handed to the operating system before `append` returns, so that a process killed afterwards has lost nothing. A machine that loses its
power may: there is no fsync.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from pyengine.errors import ConfigError, OutputError

__all__ = ["FileStore", "MemoryStore", "Store"]

KEY = re.compile(r"[0-9a-z]+(?:[-.][0-9a-z]+)*(?:/[0-9a-z]+(?:[-.][0-9a-z]+)*)*")


class Store(Protocol):
    """Bytes under keys."""

    def get(self, key: str) -> bytes | None:
        """What lies under a key, or None."""
        ...

    def put(self, key: str, data: bytes) -> None:
        """Replaces what lies there."""
        ...

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Whether there was nothing, and now is this."""
        ...

    def append(self, key: str, data: bytes) -> None:
        """Adds to the end."""
        ...

    def list(self, prefix: str) -> list[str]:
        """The keys under a folder, sorted."""
        ...

    def delete(self, key: str) -> None:
        """Removes a key, or a folder with all its keys; nothing happens where there is none."""
        ...


class FileStore:
    """A folder of the local machine, for its owner alone. Raises OutputError where it cannot be written."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).resolve()
        try:
            self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise OutputError(
                f"cannot keep sessions in '{root}': {error.strerror}; choose another with --store"
            ) from error

    def claim(self) -> None:
        """Keeps other processes from the folder until this one ends, however it does. Raises ConfigError where one has it."""
        with contextlib.suppress(ModuleNotFoundError):  # not on Windows
            import fcntl

            self._lock = (self.root / "_lock").open("w")
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                self._lock.close()
                raise ConfigError(
                    f"another server keeps its sessions in '{self.root}'; choose another folder with --store"
                ) from None

    def path(self, key: str) -> Path:
        """The file of a key. Raises ConfigError for a key that this package did not make."""
        path = self.root / key
        if not KEY.fullmatch(key) or not path.resolve().is_relative_to(self.root):
            raise ConfigError(f"expected a key of digits and small letters but got {key[:80]!r}")
        return path

    def get(self, key: str) -> bytes | None:
        try:
            return self.path(key).read_bytes()
        except (FileNotFoundError, IsADirectoryError):
            return None

    def put(self, key: str, data: bytes) -> None:
        part = self._written(key, data)
        os.replace(part, self.path(key))

    def put_if_absent(self, key: str, data: bytes) -> bool:
        part = self._written(key, data)
        try:
            os.link(part, self.path(key))
        except FileExistsError:
            return False
        finally:
            part.unlink()
        return True

    def append(self, key: str, data: bytes) -> None:
        path = self.path(key)
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with path.open("ab", buffering=0) as file:
            file.write(data)

    def list(self, prefix: str) -> list[str]:
        return sorted(self._keys(self.path(prefix)))

    def delete(self, key: str) -> None:
        path = self.path(key)
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

    def _written(self, key: str, data: bytes) -> Path:
        """The bytes in a file beside their place, under a name that is no key."""
        path = self.path(key)
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        part = path.with_name(f"_{secrets.token_hex(8)}.part")
        try:
            part.write_bytes(data)
        except OSError:
            part.unlink(missing_ok=True)
            raise
        return part

    def _keys(self, folder: Path) -> Iterator[str]:
        for path in folder.rglob("*"):
            key = path.relative_to(self.root).as_posix()
            if KEY.fullmatch(key) and path.is_file():
                yield key


class MemoryStore:
    """A store that is gone with the process."""

    def __init__(self) -> None:
        self._data: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def get(self, key: str) -> bytes | None:
        return self._data.get(key)

    def put(self, key: str, data: bytes) -> None:
        self._data[key] = data

    def put_if_absent(self, key: str, data: bytes) -> bool:
        return self._data.setdefault(key, data) is data

    def append(self, key: str, data: bytes) -> None:
        with self._lock:
            self._data[key] = self._data.get(key, b"") + data

    def list(self, prefix: str) -> list[str]:
        with self._lock:
            return sorted(key for key in self._data if key.startswith(f"{prefix}/"))

    def delete(self, key: str) -> None:
        with self._lock:
            for found in [known for known in self._data if known == key or known.startswith(f"{key}/")]:
                del self._data[found]
