"""Makes a thing once for all threads that want it at the same time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future, wait
from typing import Generic, TypeVar

from pyengine.errors import PyEngineError

__all__ = ["Once"]

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Once(Generic[K, V]):
    """A lock per key: threads that want the same key wait for the one that makes it, and nobody else does."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._under_way: dict[K, Future[V]] = {}

    def busy(self, key: K) -> bool:
        """Whether a thread is making it just now."""
        return key in self._under_way

    def get(self, key: K, make: Callable[[], V]) -> V:
        """What `make()` gives, here or in the thread that is making it already.

        A PyEngineError goes to all who wait. Any other way to fail is the maker's own, as an interrupt is: another tries.
        """
        while True:
            with self._lock:
                other = self._under_way.get(key)
                if other is None:
                    own = self._under_way[key] = Future()
            if other is None:
                return self._make(key, make, own)
            wait([other])
            error = other.exception()
            if error is None:
                return other.result()
            if isinstance(error, PyEngineError):
                raise error

    def _make(self, key: K, make: Callable[[], V], future: Future[V]) -> V:
        try:
            value = make()
        except BaseException as error:
            self._forget(key)
            future.set_exception(error)
            raise
        self._forget(key)
        future.set_result(value)
        return value

    def _forget(self, key: K) -> None:
        with self._lock:
            del self._under_way[key]
