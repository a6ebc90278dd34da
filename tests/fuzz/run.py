"""Feeds drawn inputs to the targets for some minutes, each target in turn, and prints what escaped.

    python tests/fuzz/run.py --minutes 60
    python tests/fuzz/run.py --minutes 5 pictures manifests

Exit code 1 if anything but a result or a PyEngineError came out, or an input took 30 seconds of work.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
import traceback
from types import FrameType

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from targets import TARGETS, fed, prepare

LONGEST = 30  # seconds of work on one input
# Ticks until an input that does not even work is given up: many, on a machine that has much else to do. They are counted, since a process
# that is stopped for a while misses all but one.
TICK, TICKS = 10.0, 60
EXAMPLES = 200  # of a target before the next one has its turn


class Hangs(Exception):
    """An input that takes too long."""


ticks = 0


def _alarm(number: int, frame: FrameType | None) -> None:
    global ticks
    ticks += number == signal.SIGALRM
    if number == signal.SIGPROF or ticks >= TICKS:
        raise Hangs(f"an input took {LONGEST} s of work, or nothing came for {TICK * TICKS:g} s")


def turn(name: str, number: int) -> int:
    """Inputs that one target was fed. Raises what escaped, for the smallest input that shows it."""
    count = 0

    @seed(number)
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def feed(data: st.DataObject) -> None:
        global ticks
        nonlocal count
        count, ticks = count + 1, 0
        signal.setitimer(signal.ITIMER_PROF, LONGEST)
        signal.setitimer(signal.ITIMER_REAL, TICK, TICK)
        try:
            fed(name, data)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.setitimer(signal.ITIMER_PROF, 0)

    feed()
    return count


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("targets", nargs="*", choices=[*TARGETS, []], default=[], help="default: all")
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=None, help="of the first turn (default: the time)")
    arguments = parser.parse_args()
    prepare()
    for number in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(number, _alarm)
    number = int(time.time()) if arguments.seed is None else arguments.seed
    end = time.monotonic() + arguments.minutes * 60
    counts = dict.fromkeys(arguments.targets or TARGETS, 0)
    findings: dict[str, int] = {}
    while time.monotonic() < end:
        for name in counts:
            try:
                counts[name] += turn(name, number)
            except Exception as error:
                place = traceback.extract_tb(error.__traceback__)[-1]
                key = f"{name}: {type(error).__name__} at {place.filename}:{place.lineno}"
                if key not in findings:
                    print(f"--- {key} (--seed {number})")
                    traceback.print_exception(error)
                findings[key] = findings.get(key, 0) + 1
            number += 1
    print(", ".join(f"{name} {count}" for name, count in counts.items()))
    print(f"{sum(counts.values())} inputs in turns that found nothing, {len(findings)} findings")
    return int(bool(findings))


if __name__ == "__main__":
    sys.exit(main())
