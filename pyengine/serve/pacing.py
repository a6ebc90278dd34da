"""When a session may go on, and how urgent that is. Pure: times are given, in seconds of one clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["JOBS_SHARE", "Pace", "chosen"]

# One in so many calls is for jobs, however busy live sessions are.
JOBS_SHARE = 10


@dataclass
class Pace:
    """How far ahead of its viewer a session may be.

    fps       frames per second that are shown
    lead      frames that may be made beyond what was shown
    realtime  False: as fast as they are taken
    """

    fps: float
    lead: int
    realtime: bool = True
    base: int = 0
    started: float | None = None  # when frame `base` was handed out
    shown: int | None = None  # the newest frame that the client says it has shown

    def limit(self, now: float) -> float:
        """The number of the first frame that may not be made yet."""
        if not self.realtime:
            return float("inf")
        if self.started is None:
            return self.base + self.lead
        if self.shown is not None:
            return max(self.shown + 1, self.base) + self.lead
        return self.base + (now - self.started) * self.fps + self.lead

    def deadline(self, frame: int, now: float) -> float:
        """When the viewer runs dry without this frame."""
        if self.started is None:
            return now
        return self.started + (frame - self.base) / self.fps

    def wait(self, frame: int, now: float) -> float:
        """Seconds until this frame may be made; infinite where that takes an `ack`."""
        missing = frame + 1 - self.limit(now)
        if missing <= 0:
            return 0.0
        return float("inf") if self.started is None or self.shown is not None else missing / self.fps

    def hand_out(self, now: float) -> None:
        """Frames leave; the first ones start the clock."""
        if self.started is None:
            self.started = now

    def restart(self, frame: int) -> None:
        """The clock stands until `frame` is handed out: after a pause, a seek or a resume."""
        self.base, self.started, self.shown = frame, None, None


def chosen(
    deadlines: Sequence[float], jobs: int, now: float, tick: int, call_seconds: float
) -> tuple[bool, bool]:
    """Whether live sessions, and whether jobs, take part in the next call. `deadlines` are those of live sessions that may go on.

    Everybody shares the call while live sessions have time for it. Where one would run dry, jobs stand back but for their share.
    """
    if not deadlines:
        return False, jobs > 0
    is_late = min(deadlines) - now < 2 * call_seconds
    return True, jobs > 0 and (not is_late or tick % JOBS_SHARE == 0)
