"""The signals that end a command: TERM, INT and HUP unwind it, so that files are closed and nothing half made is left.

    signals.install()              # before anything heavy is imported
    with signals.held():           # a signal that comes in here takes effect at its end
        writer.write(frame)
    signals.exit_code(interrupt)   # 143, 130 or 129, as a shell has it

Only the command line installs this; in a program of yours signals are yours.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from types import FrameType

__all__ = ["Interrupted", "exit_code", "held", "install", "pending", "restore"]

# HUP does not exist on Windows.
NAMES = ("SIGTERM", "SIGINT", "SIGHUP")
PATIENCE = 2.0  # seconds; a signal that is repeated sooner is the same one, as when a terminal closes


class Interrupted(KeyboardInterrupt):
    """A signal that ends the command. `number` says which."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class _State:
    number: int | None = None  # of the last signal
    since = -PATIENCE
    depth = 0  # of `held`
    waits = False  # for the end of `held`


def install() -> None:
    """Signals raise Interrupted in the main thread from now on. One that the parent ignores (nohup) stays ignored."""
    for name in NAMES:
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _handle)


def restore() -> None:
    """Signals end the process at once again, without a traceback: there is nothing left to close."""
    for name in NAMES:
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is _handle:
            signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """A signal that comes inside is raised at the end."""
    _State.depth += 1
    try:
        yield
    finally:
        _State.depth -= 1
        if _State.waits and not _State.depth and _State.number is not None:
            _State.waits = False
            raise Interrupted(_State.number)


def pending() -> int | None:
    """The signal that came, if any did: also where a library has swallowed what it raised."""
    return _State.number


def exit_code(interrupt: BaseException | None = None) -> int:
    """128 + the number of the signal."""
    number = getattr(interrupt, "number", None) or pending() or signal.SIGINT
    return 128 + int(number)


def _handle(number: int, frame: FrameType | None) -> None:
    now = time.monotonic()
    if _State.number is not None and now - _State.since < PATIENCE:
        return
    _State.number, _State.since = number, now
    if _State.depth:
        _State.waits = True
    else:
        raise Interrupted(number)
