"""Service: one engine, its scheduler and every session. Safe to share between threads; what takes long returns a future."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from pyengine.arguments import check_length, check_seed
from pyengine.engine import Engine
from pyengine.errors import InputError, StreamClosed
from pyengine.serve.admission import Admission, Busy, real_time_capacity
from pyengine.serve.ids import fingerprint, matches, new_id, new_token
from pyengine.serve.metrics import Metrics
from pyengine.serve.pacing import Pace
from pyengine.serve.scheduler import Scheduler
from pyengine.serve.session import Interaction, Record, Session, Sink
from pyengine.serve.store import Store
from pyengine.serve.timeline import Keyframe, Timeline
from pyengine.serve.warmup import Measured, warm_up

__all__ = ["Options", "Service", "Start", "last_keyframe"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Limits of a service.

    streams     sessions and jobs that may be on the device at a time
    live        of them live sessions; None: as many as are measured to be kept in real time
    memory      bytes that they may reserve together; None: no limit
    interval    frames between two keyframes; None: ten seconds
    park_after  seconds that a session may stand paused before its buffers are freed
    keep        seconds that a session nobody watches, or a finished job, stays in the store
    frames      that a job may have
    """

    streams: int = 4
    live: int | None = None
    memory: int | None = None
    interval: int | None = None
    park_after: float = 30.0
    keep: float = 24 * 3600.0
    frames: int = 20_000


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a session is started with."""

    prompt: str = ""
    seed: int = 0
    frames: int | None = None
    lead: int | None = None
    realtime: bool = True
    latest: bool = False
    live: bool = True
    owner: str = ""


class Service:
    """Starts, resumes and ends sessions. Closing it parks them all, so that another process can go on with them."""

    def __init__(self, engine: Engine, store: Store, options: Options | None = None) -> None:
        self.engine, self.store, self.options = engine, store, options or Options()
        self.metrics = Metrics()
        self.admission = Admission(self.options.streams, self.options.memory)
        if self.options.live is not None:
            self.admission.allow_live(self.options.live)
        self.batch = engine.batch(max_streams=self.options.streams)
        self.scheduler = Scheduler(self.batch, self.metrics.call, self._idle)
        self.measured: Measured | None = None
        self.progress = (0, 1)
        self.failure: str | None = None
        self.draining = False
        self._expired_at = 0.0
        video = engine.bundle.video
        assert video is not None
        self.height, self.width, self.fps = video.height, video.width, engine.fps
        self.metrics.watch(self)
        self.scheduler.start()

    def warm_up(self) -> None:
        """Runs every size of call once with a full context, and measures it. Until this is done nothing is admitted."""
        try:
            measured = warm_up(self.engine, self.batch, self._report)
        except StreamClosed:  # the service is closed meanwhile
            return
        except Exception as error:
            self.failure = f"the warm-up failed: {error}"
            raise
        if self.options.live is None:
            self.admission.allow_live(
                real_time_capacity(
                    measured.seconds, measured.calls_per_frame * self.fps, self.options.streams
                )
            )
        self.measured = measured

    def warm_up_beside(self) -> threading.Thread:
        """Warms up in a thread of its own."""
        thread = threading.Thread(target=self.warm_up, name="pyengine-warm-up", daemon=True)
        thread.start()
        return thread

    @property
    def ready(self) -> bool:
        return self.measured is not None and not self.draining

    @property
    def chunk(self) -> int:
        """Frames that leave the decoder together, as measured."""
        return self.measured.chunk if self.measured else 1

    def start(self, start: Start, sink: Sink | None) -> Future[tuple[Session, str]]:
        """A session and the token that resumes it. Raises Busy, PromptError, ConfigError, here or in the future."""
        record, token = self._record(start)
        return self._begin(record, token, start, sink)

    def adopt(self, data: bytes, start: Start, sink: Sink | None) -> Future[tuple[Session, str]]:
        """A session that goes on from a snapshot, which may come from anywhere. With a prompt, under that. Raises as `start`,
        InputError.
        """
        settings, made = self.batch.describe(data)
        own = Start(**{**_fields(start), "prompt": settings["prompt"], "seed": settings["seed"]})
        record, token = self._record(own, first=made)

        def add(session: Session) -> None:
            with self.batch.resume(data) as stream:  # refuses what does not fit, before it is kept
                keyframe = Keyframe(stream.frames_made, stream.calls_made, 0)
            session.timeline.add(keyframe, data)
            if start.prompt and start.prompt != record.prompt:
                session.interact(Interaction("start", start.prompt))

        self.engine.check_prompt(start.prompt or record.prompt)
        return self._begin(record, token, start, sink, add)

    def resume(
        self, name: str, token: str, sink: Sink | None, frame: int | None, start: Start
    ) -> Future[tuple[Session, str]]:
        """Goes on with a session from a frame, or from where it was. Whoever had it before is told that it moved."""
        record = Record.read(self.store, name)
        if record is None or not record.live or not matches(token, record.secret):
            raise InputError("there is no such session, or the token is another's; start a new one")
        if frame is not None and frame < record.first:
            raise InputError(f"expected a frame from {record.first} on but got {frame}")
        self._admit(record)

        def work() -> tuple[Session, str]:
            session = self._session(record, start)
            self._hand_over(session, sink, start)
            self._open(session, session.frame if frame is None else frame)
            self.metrics.recoveries.labels("resume").inc()
            return session, token

        return self.scheduler.ask(work)

    def detach(self, session: Session, sink: Sink | None) -> Future[None]:
        """Its viewer has left: it is parked, unless somebody else has it by now."""

        def work() -> None:
            if session.sink is sink:
                session.sink = None
                session.park()
                session.record.touch(self.store)
                self.admission.release(session.record.id)
                self.scheduler.sessions.pop(session.record.id, None)

        return self.scheduler.ask(work)

    def end(self, name: str, reason: str = "stopped", keep: bool = False) -> Future[None]:
        """Ends a session and, unless it is to be kept, removes all that is stored of it."""

        def work() -> None:
            session = self.scheduler.sessions.pop(name, None)
            if session is not None:
                session.close()
                self.metrics.ended.labels(reason).inc()
            self.admission.release(name)
            if not keep:
                self.store.delete(f"sessions/{name}")

        return self.scheduler.ask(work)

    def snapshot(self, name: str) -> Future[Callable[[], bytes]]:
        """Copies a session's state; calling the result packs it, which takes a while."""

        def work() -> Callable[[], bytes]:
            session = self.scheduler.sessions.get(name)
            if session is None or session.stream is None:
                raise InputError("expected a session that is playing or paused; play it first")
            return session.stream.capture()

        return self.scheduler.ask(work)

    def play(self, session: Session) -> Future[None]:
        """Goes on after a pause; a parked session comes back to the device first. Raises Busy."""
        self._admit(session.record)
        return self.scheduler.ask(session.play)

    def seek(self, session: Session, frame: int, branch: bool) -> Future[None]:
        """Shows what was made from a frame on or, with `branch`, makes it anew from there."""
        if frame < session.record.first:
            raise InputError(f"expected a frame from {session.record.first} on but got {frame}")
        self._admit(session.record)
        return self.scheduler.ask(lambda: self._open(session, frame, branch=branch, view=not branch))

    def close(self) -> None:
        """Parks every session into the store and frees the device."""
        self.draining = True
        self.scheduler.stop()
        self.batch.close()

    def _record(self, start: Start, first: int = 0) -> tuple[Record, str]:
        if self.draining or self.measured is None:
            raise Busy("the server is not ready; try again in a moment", "not_ready", 2.0)
        self.engine.check_prompt(start.prompt)
        length = check_length(start.frames, None, self.fps)
        token = new_token()
        record = Record(
            id=new_id(),
            secret=fingerprint(token),
            owner=start.owner,
            prompt=start.prompt,
            seed=check_seed(start.seed),
            frames=length,
            live=start.live,
            created=time.time(),
            first=first,
        )
        return record, token

    def _begin(
        self,
        record: Record,
        token: str,
        start: Start,
        sink: Sink | None,
        before: Callable[[Session], None] = lambda session: None,
    ) -> Future[tuple[Session, str]]:
        self._admit(record)

        def work() -> tuple[Session, str]:
            record.write(self.store)
            try:
                session = self._session(record, start)
                before(session)
                session.sink, session.latest = sink, start.latest
                self._open(session, record.first)
            except Exception:
                self.scheduler.sessions.pop(record.id, None)
                self.admission.release(record.id)
                self.store.delete(record.folder)
                raise
            self.metrics.started.inc()
            return session, token

        return self.scheduler.ask(work)

    def _admit(self, record: Record) -> None:
        if not self.ready or self.measured is None:
            raise Busy("the server is not ready; try again in a moment", "not_ready", 2.0)
        try:
            self.admission.reserve(record.id, self.measured.bytes_per_stream, record.live)
        except Busy as busy:
            self.metrics.rejected.labels(busy.reason).inc()
            raise

    def _session(self, record: Record, start: Start) -> Session:
        """The session of a record, from memory or from the store."""
        session = self.scheduler.sessions.get(record.id)
        if session is None:
            interval = self.options.interval or round(10 * self.fps)
            session = Session(
                record, self.store, self.batch, self.scheduler.background, self._pace(start), interval
            )
            self.scheduler.sessions[record.id] = session
        return session

    def _hand_over(self, session: Session, sink: Sink | None, start: Start) -> None:
        if session.sink is not None:
            session.sink.notice("moved", {})
        session.sink, session.latest = sink, start.latest
        session.pace = self._pace(start)

    def _pace(self, start: Start) -> Pace:
        return Pace(self.fps, max(1, min(start.lead or self.chunk, 1000)), start.realtime)

    def _open(self, session: Session, frame: int, *, branch: bool = False, view: bool = False) -> None:
        try:
            session.open(frame, branch=branch, view=view)
        except Exception:
            self.admission.release(session.record.id)
            session.park()
            raise

    def _idle(self) -> None:
        """Parks sessions that have stood paused, and forgets those that nobody came back to. In the scheduler's thread."""
        now = time.monotonic()
        for session in list(self.scheduler.sessions.values()):
            if session.state in ("paused", "ended") and now - session.changed > self.options.park_after:
                session.park()
            if session.stream is None and session.state in ("parked", "failed"):
                self.admission.release(session.record.id)
        if now - self._expired_at > 60:
            self._expired_at = now
            self.scheduler.background(self._old, self._remove)

    def _old(self) -> list[Record]:
        """Sessions that nobody has had for long."""
        found = []
        for key in self.store.list("sessions"):
            if key.endswith("/record.json"):
                record = Record.read(self.store, key.split("/")[1])
                if record is not None and time.time() - record.seen(self.store) > self.options.keep:
                    found.append(record)
        return found

    def _remove(self, records: list[Record]) -> None:
        for record in records:
            if record.id not in self.scheduler.sessions:
                self.store.delete(record.folder)

    def _report(self, done: int, total: int) -> None:
        self.progress = (done, total)
        if self.draining:
            raise StreamClosed("the server is shutting down")


def _fields(start: Start) -> dict[str, Any]:
    return {name: getattr(start, name) for name in Start.__dataclass_fields__}


def last_keyframe(store: Store, name: str) -> bytes | None:
    """The newest snapshot of a session that is no longer open."""
    found = Timeline(store, f"sessions/{name}").before(2**53)
    return None if found is None else found[1]
