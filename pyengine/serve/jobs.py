"""Jobs: videos that nobody watches while they are made. Each is a session without a deadline whose frames go into a file."""

from __future__ import annotations

import contextlib
import json
import logging
import queue
import threading
import time
import uuid
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pyengine.errors import InputError, OutputError, PyEngineError
from pyengine.serve.admission import Busy
from pyengine.serve.ids import new_id
from pyengine.serve.scheduler import sentence
from pyengine.serve.service import Service, Start, last_keyframe
from pyengine.serve.session import Piece, Session
from pyengine.video.writer import VideoWriter

__all__ = ["Job", "Jobs"]

log = logging.getLogger("pyengine.serve")
LEAD = 64  # frames that may wait for the encoder
RETRY = 0.5  # seconds, while there is no room


@dataclass(frozen=True, slots=True)
class Job:
    """A job as it is stored, before anything is made and after each change of its status.

    session  the one that makes it; its last snapshot is where a remix goes on
    """

    prompt: str
    seed: int
    frames: int
    seconds: str
    owner: str = ""
    id: str = field(default_factory=new_id)
    status: str = "queued"
    created_at: int = field(default_factory=lambda: int(time.time()))
    completed_at: int | None = None
    remixed_from: str | None = None
    session: str | None = None
    error: dict[str, str] | None = None
    took: float | None = None
    ignored: tuple[str, ...] = ()

    @property
    def is_over(self) -> bool:
        return self.status in ("completed", "failed")


class Jobs:
    """Every job, and the thread that begins them when there is room. `folder` is where videos go, under names made here."""

    def __init__(self, service: Service, folder: Path) -> None:
        self.service, self._folder = service, folder
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._jobs: dict[str, Job] = {}
        self._runs: dict[str, _Run] = {}
        self._lock = threading.Lock()
        self._changed = threading.Event()
        self._stopping = False
        self._read()
        self._thread = threading.Thread(target=self._begin_all, name="pyengine-jobs", daemon=True)
        self._thread.start()

    def add(self, job: Job) -> Job:
        """Stores a job, then has it made. Raises PromptError, ConfigError."""
        self.service.engine.check_prompt(job.prompt)
        if job.frames > self.service.options.frames:
            raise InputError(f"expected at most {self.service.options.frames} frames but got {job.frames}")
        self._put(job)
        self._changed.set()
        return job

    def get(self, name: str, owner: str) -> Job | None:
        job = self._jobs.get(name)
        return job if job is not None and job.owner == owner else None

    def all(self, owner: str) -> list[Job]:
        """Oldest first."""
        return sorted(
            (job for job in self._jobs.values() if job.owner == owner),
            key=lambda job: (job.created_at, job.id),
        )

    def remix(self, source: Job, prompt: str) -> Job:
        """A new job that goes on where another ended, under a new prompt. Raises InputError unless that one is completed."""
        if source.status != "completed":
            raise InputError(f"expected a video that is completed but this one is {source.status}")
        made = replace(
            source, id=new_id(), prompt=prompt, status="queued", remixed_from=source.id, session=None
        )
        return self.add(replace(made, created_at=int(time.time()), completed_at=None, took=None, ignored=()))

    def progress(self, job: Job) -> int:
        run = self._runs.get(job.id)
        return (
            100
            if job.status == "completed"
            else 0
            if run is None
            else min(99, 100 * run.frames // job.frames)
        )

    def remaining(self, job: Job) -> float:
        """Seconds until it is likely to be done."""
        run = self._runs.get(job.id)
        if run is None or not run.frames:
            return 1.0
        return (job.frames - run.frames) * (time.monotonic() - run.started) / run.frames

    def file(self, job: Job) -> Path:
        return self._folder / f"{job.id}.mp4"

    def delete(self, job: Job) -> None:
        """Stops it between two calls, and removes its record, its file and its session."""
        with self._lock:
            self._jobs.pop(job.id, None)
            run = self._runs.pop(job.id, None)
        self.service.store.delete(f"jobs/{job.id}.json")
        if run is not None:
            run.abort()
        elif job.session is not None:
            self.service.end(job.session, "deleted").result()
        self.file(job).unlink(missing_ok=True)

    def close(self) -> None:
        """Stops what runs; another process makes those anew, the same to the bit."""
        self._stopping = True
        self._changed.set()
        self._thread.join()
        for run in list(self._runs.values()):
            run.abort()

    def _read(self) -> None:
        store = self.service.store
        for key in store.list("jobs"):
            with contextlib.suppress(ValueError, TypeError):
                job = Job(**json.loads(store.get(key) or b""))
                if not job.is_over:
                    if job.session is not None:
                        store.delete(f"sessions/{job.session}")
                    job = replace(job, status="queued", session=None)
                self._jobs[job.id] = replace(job, ignored=tuple(job.ignored))

    def _put(self, job: Job) -> None:
        self.service.store.put(f"jobs/{job.id}.json", json.dumps(asdict(job)).encode())
        self._jobs[job.id] = job

    def _begin_all(self) -> None:
        """In a thread of its own: begins what is queued, oldest first, while there is room; removes what is too old."""
        while not self._stopping:
            self._changed.clear()
            waiting = [job for job in list(self._jobs.values()) if job.status == "queued"]
            for job in sorted(waiting, key=lambda job: (job.created_at, job.id)):
                if not self._begin(job):
                    break
            for job in list(self._jobs.values()):
                if job.is_over and time.time() - job.created_at > self.service.options.keep:
                    self.delete(job)
            self._changed.wait(RETRY if waiting else 60.0)

    def _begin(self, job: Job) -> bool:
        """False where there is no room."""
        run = _Run(self, job)
        try:
            start = Start(
                prompt=job.prompt,
                seed=job.seed,
                frames=job.frames,
                lead=LEAD,
                realtime=False,
                live=False,
                owner=job.owner,
            )
            if job.remixed_from is None:
                future = self.service.start(start, run)
            else:
                source = self._jobs.get(job.remixed_from)
                data = (
                    None
                    if source is None or source.session is None
                    else last_keyframe(self.service.store, source.session)
                )
                if data is None:
                    raise InputError("the video that it goes on from was deleted")
                future = self.service.adopt(data, start, run)
            session, _ = future.result()
        except Busy:
            return False
        except Exception as error:
            self._fail(job, error)
            return True
        with self._lock:
            is_wanted = job.id in self._jobs
            if is_wanted:
                job = replace(job, status="in_progress", session=session.record.id)
                self._put(job)
                self._runs[job.id] = run
            run.begin(session, job)
        if not is_wanted:  # deleted meanwhile
            run.abort()
        return True

    def _over(self, job: Job, took: float, error: BaseException | None) -> None:
        with self._lock:
            self._runs.pop(job.id, None)
            if job.id not in self._jobs or self._stopping:
                return
            if error is None:
                self._put(replace(job, status="completed", completed_at=int(time.time()), took=took))
        if error is None:
            self.service.metrics.jobs.labels("completed").inc()
        else:
            self._fail(job, error)
        self._changed.set()

    def _fail(self, job: Job, error: BaseException) -> None:
        number = uuid.uuid4().hex[:12]
        if not isinstance(error, PyEngineError):
            log.error("a job failed", exc_info=error, extra={"error": number, "job": job.id})
        name = type(error).__name__ if isinstance(error, PyEngineError) else "InternalError"
        code = "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name).lstrip("_")
        self._put(replace(job, status="failed", error={"code": code, "message": sentence(error, number)}))
        self.service.metrics.jobs.labels("failed").inc()


class _Run:
    """The sink of a job's session, and the thread that writes its file."""

    def __init__(self, jobs: Jobs, job: Job) -> None:
        self._jobs, self._job = jobs, job
        self._items: queue.SimpleQueue[Piece | str | PyEngineError] = queue.SimpleQueue()
        self._session: Session | None = None
        self._aborted = False
        self._thread = threading.Thread(target=self._write, name="pyengine-job", daemon=True)
        self.frames, self.started = 0, time.monotonic()

    def piece(self, piece: Piece) -> None:
        self._items.put(piece)

    def notice(self, kind: str, data: dict[str, Any]) -> None:
        if kind == "ended":
            self._items.put("ended")
        elif kind == "failed":
            self._items.put(PyEngineError(data["message"]))

    def begin(self, session: Session, job: Job) -> None:
        self._session, self._job = session, job
        self._thread.start()

    def abort(self) -> None:
        """Ends it and waits until its file is closed."""
        self._aborted = True
        self._items.put("aborted")
        self._thread.join()

    def _write(self) -> None:
        service, session = self._jobs.service, self._session
        assert session is not None
        error: BaseException | None = None
        try:
            self._frames(service, session)
            if not self._aborted:
                service.scheduler.ask(session.store_now).result()
        except Exception as problem:
            error = problem
        with contextlib.suppress(PyEngineError):  # the server is shutting down
            service.end(session.record.id, "failed" if error else "ended", keep=not self._aborted).result()
        self._jobs._over(self._job, time.monotonic() - self.started, error)

    def _frames(self, service: Service, session: Session) -> None:
        path = self._jobs.file(self._job)
        with VideoWriter(path, height=service.height, width=service.width, fps=service.fps) as writer:
            while not self._aborted:
                item = self._items.get()
                if isinstance(item, PyEngineError):
                    raise item
                if isinstance(item, str):
                    break
                for frame in item.frames:
                    writer.write(frame)
                self.frames += len(item.frames)
                service.metrics.frames_written.inc(len(item.frames))
                sent, epoch = len(item.frames), item.epoch
                service.scheduler.ask(lambda sent=sent, epoch=epoch: session.sent(sent, epoch))  # type: ignore[misc]
        if not self._aborted and self.frames < self._job.frames:
            raise OutputError(f"the model made {self.frames} of {self._job.frames} frames")
