"""Session: one viewer's or one job's video, from its timeline. Runs in the scheduler's thread alone."""

from __future__ import annotations

import json
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from pyengine.errors import InputError, PromptError
from pyengine.serve.pacing import Pace
from pyengine.serve.store import Store
from pyengine.serve.timeline import Entry, Keyframe, Timeline
from pyengine.streaming.batch import Batch
from pyengine.streaming.stream import Stream

__all__ = ["Interaction", "Piece", "Record", "Session", "Sink"]

log = logging.getLogger("pyengine.serve")
State = Literal["playing", "paused", "parked", "ended", "failed", "closed"]
# Makes bytes in the background, then hands them to a function in the scheduler's thread.
Background = Callable[[Callable[[], bytes], Callable[[bytes], None]], None]


@dataclass(frozen=True, slots=True)
class Record:
    """What a session was asked for; kept in the store before anything is made.

    secret  fingerprint of the token that resumes it
    owner   fingerprint of the token that it was started with; empty where the server asks for none
    first   number of its first frame: above 0 where it goes on from a snapshot
    """

    id: str
    secret: str
    owner: str
    prompt: str
    seed: int
    frames: int | None
    live: bool
    created: float
    first: int = 0

    @property
    def folder(self) -> str:
        return f"sessions/{self.id}"

    def write(self, store: Store) -> None:
        store.put(f"{self.folder}/record.json", json.dumps(asdict(self)).encode())

    def touch(self, store: Store) -> None:
        """Notes that somebody has it or had it just now."""
        store.put(f"{self.folder}/seen", repr(time.time()).encode())

    def seen(self, store: Store) -> float:
        """When somebody last had it, as `time.time()`."""
        data = store.get(f"{self.folder}/seen")
        return self.created if data is None else float(data)

    @classmethod
    def read(cls, store: Store, name: str) -> Record | None:
        """The record of an id that was checked, or None."""
        data = store.get(f"sessions/{name}/record.json")
        return None if data is None else cls(**json.loads(data))


@dataclass(frozen=True, slots=True)
class Piece:
    """Frames that leave together: uint8 [frames, height, width, 3], the first of them number `first`.

    events    prompts, beside the first one, that had been applied when they were made
    replayed  they had been made before, under an earlier epoch
    """

    epoch: int
    first: int
    frames: np.ndarray
    events: int
    replayed: bool


@dataclass(frozen=True, slots=True)
class Interaction:
    """A prompt that a client sent, and when."""

    event_id: str
    prompt: str
    received: float = field(default_factory=time.monotonic)


class Sink(Protocol):
    """Where a session's frames and news go; called in the scheduler's thread, must not block."""

    def piece(self, piece: Piece) -> None: ...
    def notice(self, kind: str, data: dict[str, Any]) -> None: ...


class Session:
    """A stream that can be lost and made again: every frame follows from the record, the log and the plan.

    `lead` is how many frames may be handed out before the sink has sent them, and `interval` how many lie between two keyframes.
    """

    def __init__(
        self, record: Record, store: Store, batch: Batch, background: Background, pace: Pace, interval: int
    ) -> None:
        self.record, self.pace, self.interval = record, pace, interval
        self.timeline = Timeline(store, record.folder)
        self.state: State = "parked"
        self.stream: Stream | None = None
        self.sink: Sink | None = None
        self.latest = False  # frames may be dropped by the sink, so that nothing waits for it
        self.unsent = 0  # frames that the sink has and has not sent
        self.changed = time.monotonic()
        self.failures = 0
        self.frame = record.first  # the next to be handed out
        self._batch, self._background = batch, background
        self._due: deque[Entry] = deque()
        self._waiting: deque[Interaction] = deque()
        self._known = {entry.event_id for entry in self.timeline.entries if entry.event_id}
        self._target = record.first
        self._head = record.first
        self._is_branching = False
        self._is_view = False
        self._prompt_seq = 0  # entry of the last prompt that was applied
        self._events = 0
        self._kept = record.first

    @property
    def epoch(self) -> int:
        return self.timeline.epoch

    @property
    def prompt(self) -> str:
        """The last that was sent. May be asked from any thread."""
        prompts = [entry.prompt for entry in self.timeline.story()] + [
            one.prompt for one in list(self._waiting)
        ]
        return prompts[-1] if prompts else self.record.prompt

    @property
    def is_silent(self) -> bool:
        """It makes again what its viewer has seen, to get to where the viewer is."""
        return self.stream is not None and self.stream.frames_made < self._target

    def open(self, frame: int, *, branch: bool = False, view: bool = False) -> None:
        """Goes on from a frame under a new epoch: from the last keyframe before it, and through the log. Raises PyEngineError.

        branch  what comes later in the log is dropped, and the video is made anew from there
        view    it shows what was made; a prompt that comes meanwhile branches off there
        """
        self._close_stream()
        found = self.timeline.before(frame)
        if found is None:
            self.stream = self._batch.stream(self.record.prompt, seed=self.record.seed)
            keyframe = None
        else:
            keyframe = found[0]
            self.stream = self._batch.resume(found[1])
        self._prompt_seq = keyframe.prompt if keyframe else 0
        self._due = deque(self.timeline.due(keyframe))
        self._events = len(self.timeline.story()) - len(self._due)
        self._target, self._is_branching, self._is_view = frame, branch, view
        self.frame, self._kept = frame, self.stream.frames_made
        self.timeline.write("epoch", epoch=self.epoch + 1, frame=frame)
        self.pace.restart(frame)
        self.unsent = 0
        self._become("playing")
        log.info("session opened", extra={"session": self.record.id, "frame": frame, "epoch": self.epoch})

    def interact(self, interaction: Interaction) -> bool:
        """Takes a prompt, to be applied before the next call. False where its id was used before."""
        if interaction.event_id in self._known:
            return False
        self._known.add(interaction.event_id)
        self._waiting.append(interaction)
        return True

    def knows(self, event_id: str) -> bool:
        return event_id in self._known

    def sent(self, frames: int, epoch: int) -> None:
        """So many frames of an epoch have left the sink."""
        if epoch == self.epoch:
            self.unsent = max(0, self.unsent - frames)

    def show(self, frame: int) -> None:
        """The viewer has shown this frame; from now on that is what paces the session. Of other epochs' frames nothing follows."""
        if self.pace.base <= frame < self.frame:
            self.pace.shown = max(frame, self.pace.shown or 0)

    def store_now(self) -> None:
        """Makes a keyframe of now, in the store when this returns. Raises InputError for a session that is not on the device."""
        if self.stream is None or self.is_silent or self._is_branching:
            raise InputError("expected a session that is playing or paused; play it first")
        self.keep(at_once=True)

    def pause(self) -> None:
        if self.state == "playing":
            self._become("paused")

    def play(self) -> None:
        if self.state == "paused":
            self.pace.restart(self.frame)
            self._become("playing")
        elif self.state == "parked":
            self.open(self.frame)

    def wait(self, now: float) -> float:
        """Seconds until it may make another call; infinite where that takes somebody to do something."""
        if self.stream is None or self.state != "playing" or self.stream.ended:
            return float("inf")
        if self.is_silent or self._is_branching:
            return 0.0
        if not self.latest and self.unsent >= self.pace.lead:
            return float("inf")
        return self.pace.wait(self.frame, now)

    def before_call(self) -> int:
        """Applies the prompts whose turn it is and returns their number. To be called before each call of the stream, and no more than
        one call apart.
        """
        before = self._events
        stream = self.stream
        assert stream is not None
        if self._is_branching and stream.frames_made >= self._target:
            self._branch()
        while self._due and self._due[0].call <= stream.calls_made:
            self.collect(wait=True)
            if self._due:  # it may have branched off before them
                self._apply(self._due.popleft())
        if not self.is_silent and not self._is_branching and (self._is_view or not self._due):
            while self._waiting:
                self._begin(self._waiting.popleft())
        return self._events - before

    def collect(self, wait: bool) -> int:
        """Hands out the frames that are ready and returns their number; to `wait` is for those that are still being decoded."""
        given, stream = 0, self.stream
        if stream is None:
            return 0
        end = self._end()
        while end is None or stream.frames_made < end:
            frames = stream.ready(wait, None if end is None else end - stream.frames_made)
            if frames is None:
                break
            given += self._give(np.asarray(frames), stream.frames_made)
        if end is not None and self.frame >= end and self.state == "playing":
            self._become("ended")
            self._tell("ended", frame=self.frame)
        elif given and self.frame - self._kept >= self.interval:
            self.keep()
        return given

    def keep(self, at_once: bool = False) -> None:
        """Makes a keyframe of now, in the background or, `at_once`, before it returns."""
        assert self.stream is not None
        keyframe = Keyframe(self.stream.frames_made, self.stream.calls_made, self._prompt_seq)
        make = self.stream.capture(compress=False)
        self._kept = self.frame
        if at_once:
            self.timeline.add(keyframe, make())
        else:
            self._background(make, lambda data: self.timeline.add(keyframe, data))

    def park(self, at_once: bool = False) -> None:
        """Frees its buffers; it goes on with `play` or `open`. `at_once`: its snapshot is in the store when this returns."""
        if self.stream is None:
            return
        if not self.is_silent and not self._is_branching:
            self.keep(at_once)
        self._close_stream()
        self._become("parked")

    def fail(self, message: str) -> None:
        """Ends it with a message for its viewer."""
        self._close_stream()
        self._become("failed")
        self._tell("failed", message=message)

    def close(self) -> None:
        """Frees all that it has. May be called again."""
        self._close_stream()
        self.sink = None
        self._become("closed")

    def _end(self) -> int | None:
        """The number after its last frame."""
        assert self.stream is not None
        asked = None if self.record.frames is None else self.record.first + self.record.frames
        ends = [end for end in (asked, self.stream.frames) if end is not None]
        return min(ends, default=None)

    def _give(self, frames: np.ndarray, after: int) -> int:
        """Hands out frames, the last of which is number `after` - 1; what lies before the frame that was asked for is dropped."""
        if self._is_branching and after >= self._target:
            self._branch()
        first = max(after - len(frames), self.frame)
        if after <= first:
            return 0
        piece = Piece(self.epoch, first, frames[first - after :], self._events, after <= self._head)
        self.frame, self._head, self.failures = after, max(self._head, after), 0
        self.pace.hand_out(time.monotonic())
        self.unsent += after - first
        if self.sink is not None:
            self.sink.piece(piece)
        return after - first

    def _branch(self) -> None:
        assert self.stream is not None
        self._is_branching = False
        self._due.clear()
        self._head = self._target
        self.timeline.write("branch", call=self.stream.calls_made, frame=self._target)

    def _begin(self, interaction: Interaction) -> None:
        """A new prompt: into the log, then into the stream."""
        assert self.stream is not None
        self.collect(wait=True)
        if self._due:
            self._due.clear()
            self.timeline.write("branch", call=self.stream.calls_made, frame=self.frame)
        self._is_view = False
        # Frames from here on are no longer those that were made before.
        self._head = min(self._head, self.frame)
        entry = self.timeline.write(
            "prompt",
            call=self.stream.calls_made,
            frame=self.stream.frames_made,
            complete=self.stream.first_unbegun(),
            event_id=interaction.event_id,
            prompt=interaction.prompt,
        )
        self._apply(entry)
        self._tell("timed", seconds=time.monotonic() - interaction.received)

    def _apply(self, entry: Entry) -> None:
        assert self.stream is not None
        self._prompt_seq, self._events = entry.seq, self._events + 1
        try:
            self.stream.prompt = entry.prompt
        except PromptError as error:
            # The schedule refuses it at this call, now and in every replay, before anything has changed.
            self._tell("refused", event_id=entry.event_id, message=str(error))
            return
        self._tell(
            "applied",
            event_id=entry.event_id,
            frame=entry.frame,
            complete=entry.complete,
            prompt=entry.prompt,
        )

    def _close_stream(self) -> None:
        if self.stream is not None:
            self.stream.close()
            self.stream = None

    def _become(self, state: State) -> None:
        self.changed = time.monotonic()
        if self.state != state:
            self.state = state
            self._tell("state", state=state, frame=self.frame)

    def _tell(self, kind: str, **data: Any) -> None:
        if self.sink is not None:
            self.sink.notice(kind, data)
