"""How many users does one machine carry? `python benchmarks/streams.py [--counts 1,2,4,8]` makes as many streams at once in three ways.

batch      one `engine.batch`: a run of the network advances them all
threads    streams of their own, each in a thread
in turn    streams of their own, one after the other

Frames per second of all streams together, after every window is full; the three take turns, round by round, so that a disturbance
meets all of them. Then the memory that each further stream of a batch takes. Goal on a CPU: batch at least as fast as the faster of
the others at every count. Writes streams.json; exit code 1 where the goal is missed. Run it while nothing else runs. Linux only.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import sys
import threading
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

import pyengine
from pyengine.measure.probe import machine, memory_mb
from pyengine.streaming.stream import Stream

WAYS = ("batch", "threads", "in turn")
NOISE = 0.03  # of a ratio of medians of a few rounds on two cores


def in_lockstep(streams: Sequence[Stream], frames: int, chunk: int) -> None:
    """Frames of streams that share calls, a chunk of each at a time."""
    for _ in range(frames // chunk):
        for stream in streams:
            take(stream, chunk)


def in_threads(streams: Sequence[Stream], frames: int, chunk: int) -> None:
    threads = [threading.Thread(target=take, args=(stream, frames)) for stream in streams]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def one_by_one(streams: Sequence[Stream], frames: int, chunk: int) -> None:
    for stream in streams:
        take(stream, frames)


def take(stream: Stream, frames: int) -> None:
    for _ in islice(stream, frames):
        pass


RUNS: dict[str, Callable[[Sequence[Stream], int, int], None]] = {
    "batch": in_lockstep,
    "threads": in_threads,
    "in turn": one_by_one,
}


def speeds(engine: pyengine.Engine, count: int, rounds: int, frames: int) -> dict[str, Any]:
    """Frames per second of `count` streams together, each way: the median of the rounds, and all of them."""
    prompt = prompt_of(engine)
    with engine.batch(max_streams=count) as batch:
        together = [batch.stream(prompt, seed=seed) for seed in range(count)]
        apart = [engine.stream(prompt, seed=seed) for seed in range(count)]
        chunk = len(next(apart[0].clips()))
        each = max(1, frames // chunk) * chunk
        members = {"batch": together, "threads": apart, "in turn": apart}
        for streams, run in ((together, in_lockstep), (apart, in_threads)):
            run(streams, each, chunk)  # until every window is full
        found: dict[str, list[float]] = {way: [] for way in WAYS}
        for _ in range(rounds):
            for way in WAYS:
                start = time.perf_counter()
                RUNS[way](members[way], each, chunk)
                found[way].append(count * each / (time.perf_counter() - start))
        exact = batch.exact
        for stream in apart:
            stream.close()
    median = {way: float(np.median(values)) for way, values in found.items()}
    return {
        "streams": count,
        "exact": exact,
        "frames_per_second": {way: round(value, 2) for way, value in median.items()},
        "over_threads": round(median["batch"] / median["threads"], 3),
        "over_in_turn": round(median["batch"] / median["in turn"], 3),
        "rounds": {way: [round(value, 1) for value in values] for way, values in found.items()},
    }


def memory(engine: pyengine.Engine, most: int) -> dict[str, Any]:
    """Resident MB of 10^6 bytes of a batch as streams join, each with a full window, and what each one takes."""
    held = []
    with engine.batch(max_streams=most) as batch:
        warm = batch.stream(prompt_of(engine))  # so that what every batch needs once is there
        take(warm, 64)
        streams = [warm]
        held.append(resident())
        for seed in range(1, most):
            streams.append(batch.stream(prompt_of(engine), seed=seed))
            for stream in streams:
                take(stream, 32)
            held.append(resident())
    each = (held[-1] - held[0]) / (most - 1) if most > 1 else None
    return {"resident_mb": [round(value, 1) for value in held], "each_stream_mb": each and round(each, 2)}


def resident() -> float:
    """Resident MB of 10^6 bytes, after what was freed has been given back to the system."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc alone has it
        ctypes.CDLL(None).malloc_trim(0)
    return memory_mb()


def prompt_of(engine: pyengine.Engine) -> str:
    text = engine.bundle.text
    return "" if text is None else text.example


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", nargs="?", default="shapes")
    parser.add_argument("--counts", default="1,2,4,8", help="numbers of streams (default 1,2,4,8)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--frames", type=int, default=96, help="frames of each stream in a round (default 96)"
    )
    parser.add_argument("--backend", default="openvino")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    counts = [int(count) for count in arguments.counts.split(",")]
    result: dict[str, Any] = {
        "machine": machine(),
        "bundle": arguments.bundle,
        "backend": arguments.backend,
        "counts": [],
    }
    with pyengine.load(arguments.bundle, backend=arguments.backend) as engine:
        # First, while no memory that was freed is there to be used again.
        result["memory"] = memory(engine, max(counts))
        print(f"memory of each further stream: {result['memory']['each_stream_mb']} MB")
        for count in counts:
            row = speeds(engine, count, arguments.rounds, arguments.frames)
            result["counts"].append(row)
            shown = "  ".join(f"{way} {value:7.1f}" for way, value in row["frames_per_second"].items())
            print(
                f"{count} streams: {shown} frames/s; batch over threads {row['over_threads']:.2f}, over in turn {row['over_in_turn']:.2f}"
                f"{', exact' if row['exact'] else ''}",
                flush=True,
            )
    met = all(min(row["over_threads"], row["over_in_turn"]) >= 1 - NOISE for row in result["counts"])
    result["goal_met"] = met
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "streams.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"batch at least as fast as both, within {NOISE:.0%}: {'met' if met else 'missed'}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
