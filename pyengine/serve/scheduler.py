"""Scheduler: the one thread of a device that makes calls. It advances the sessions that may go on, together, and does what others ask
between two calls.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from pyengine.errors import PyEngineError, StreamClosed
from pyengine.serve.pacing import chosen
from pyengine.serve.session import Session
from pyengine.streaming.batch import Batch

__all__ = ["Scheduler", "sentence"]

log = logging.getLogger("pyengine.serve")
T = TypeVar("T")

IDLE = 0.5  # seconds; a thread that has nothing to do says so that often
STUCK = 10.0  # seconds without a sign of life
MOST_FAILURES = 2


class Scheduler:
    """Owns a batch and the sessions on it.

    on_call  told of each call: how many streams took part, and its seconds
    on_idle  called twice a second in the thread, between calls
    """

    def __init__(
        self,
        batch: Batch,
        on_call: Callable[[int, float], None] = lambda streams, seconds: None,
        on_idle: Callable[[], None] = lambda: None,
    ) -> None:
        self.batch = batch
        self.sessions: dict[str, Session] = {}
        self.call_seconds = 0.01
        self._on_call, self._on_idle = on_call, on_idle
        self._asked: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._pool = ThreadPoolExecutor(1, "pyengine-keep")
        self._suspects: deque[Session] = deque()
        self._tick = 0
        self._idle_since = 0.0
        self._alive = time.monotonic()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="pyengine-serve", daemon=True)

    def start(self) -> None:
        self._alive = time.monotonic()
        self._thread.start()

    @property
    def stuck(self) -> str | None:
        """Why it does not work, or None."""
        if not self._thread.is_alive():
            return "the scheduler's thread has ended"
        silent = time.monotonic() - self._alive
        return f"the scheduler has been silent for {silent:.0f} s" if silent > STUCK else None

    def ask(self, work: Callable[[], T]) -> Future[T]:
        """Does something in the thread, between two calls; of what it returns or raises there is a future."""
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)

        with self._wake:
            if self._stopping:
                future.set_exception(StreamClosed("the server is shutting down; connect again"))
                return future
            self._asked.append(run)
            self._wake.notify()
        return future

    def background(self, make: Callable[[], T], then: Callable[[T], None]) -> None:
        """Makes something in another thread, then does something with it in this one."""

        def run() -> None:
            try:
                data = make()
            except Exception:
                log.exception("work in the background failed")
                return
            self.ask(lambda: then(data))

        self._pool.submit(run)

    def wake(self) -> None:
        """Something has changed that a session waits for."""
        with self._wake:
            self._wake.notify()

    def stop(self) -> None:
        """Parks every session, each with its snapshot in the store, and ends the thread."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join()
        self._pool.shutdown()

    def _run(self) -> None:
        while True:
            self._alive = time.monotonic()
            with self._wake:
                asked = [self._asked.popleft() for _ in range(len(self._asked))]
            for work in asked:
                work()
            if self._alive - self._idle_since >= IDLE:
                self._idle_since = self._alive
                self._guard(self._on_idle)
            if self._stopping:
                break
            wait = self._advance(time.monotonic())
            if wait > 0:
                with self._wake:
                    if not self._asked and not self._stopping:
                        self._wake.wait(min(wait, IDLE))
        for session in list(self.sessions.values()):
            self._guard(partial(session.park, at_once=True))
        with self._wake:
            asked = list(self._asked)
        for work in asked:
            work()

    def _advance(self, now: float) -> float:
        """One call of every session that may go on. Returns the seconds until one may, 0 where a call was made."""
        waits = {session: session.wait(now) for session in self.sessions.values()}
        going = [session for session, wait in waits.items() if wait <= 0]
        live = [session for session in going if session.record.live]
        deadlines = [session.pace.deadline(session.frame, now) for session in live]
        plays_live, plays_jobs = chosen(deadlines, len(going) - len(live), now, self._tick, self.call_seconds)
        taking = [session for session in going if (plays_live if session.record.live else plays_jobs)]
        self._suspects = deque(session for session in self._suspects if session in going and session.failures)
        if self._suspects:
            taking = [self._suspects[0]]
        taking = [session for session in taking if self._tried(session.before_call, session) is not None]
        for session in self._open():
            assert session.stream is not None
            session.stream.paused = session not in taking
        try:
            made = bool(taking) and self._call(len(taking))
        except Exception as error:
            self._failed(taking, error)
            return 0.0
        given = sum(self._tried(partial(session.collect, not made), session) or 0 for session in self._open())
        self._tick += 1
        if made or given:
            return 0.0
        return min((wait for wait in waits.values() if wait > 0), default=IDLE)

    def _call(self, streams: int) -> bool:
        started = time.perf_counter()
        made = self.batch.advance()
        if made:
            took = time.perf_counter() - started
            self.call_seconds += 0.1 * (took - self.call_seconds)
            self._on_call(streams, took)
        return made

    def _tried(self, work: Callable[[], int], session: Session) -> int | None:
        """What concerns one session alone; None where it failed."""
        try:
            return work()
        except Exception as error:
            self._failed([session], error)
            return None

    def _open(self) -> list[Session]:
        return [session for session in self.sessions.values() if session.stream is not None]

    def _failed(self, sessions: list[Session], error: Exception) -> None:
        """A call went wrong. Who took part is made again from the log, then goes on alone until it has given a frame: so the one that
        is to blame is found, and ends.
        """
        number = uuid.uuid4().hex[:12]
        log.error("a call failed", exc_info=error, extra={"error": number})
        for session in sessions:
            session.failures += 1
            if session.failures > MOST_FAILURES:
                session.fail(sentence(error, number))
                continue
            try:
                session.open(session.frame)
                self._suspects.append(session)
            except Exception as again:
                log.error("a session could not be made again", exc_info=again, extra={"error": number})
                session.fail(sentence(again, number))

    def _guard(self, work: Callable[[], Any]) -> None:
        try:
            work()
        except Exception:
            log.exception("work of the scheduler failed")


def sentence(error: BaseException, number: str) -> str:
    """What a client is told: our own sentences as they are, of anything else the number under which the log has it."""
    return str(error) if isinstance(error, PyEngineError) else f"internal error {number}"
