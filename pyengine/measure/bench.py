"""Measures a bundle on this machine: steady speed, first frame, calls, memory, overhead, and peers in turns.

    result = bench("shapes", peers=False)      # what `pyengine bench shapes --json --no-peers` prints

The engine and its peers make the same video in turns, round after round in one process, so a busy machine
slows them alike: read the ratios. Nothing here imports torch or onnx unless peers are asked for.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from pyengine.build.builder import Progress
from pyengine.engine import Engine, load
from pyengine.errors import BackendUnavailable, ConfigError, PyEngineError
from pyengine.measure.probe import Probe, cores, machine

__all__ = ["add_arguments", "bench", "run", "table"]

PROMPT = "a red circle bounces over a blue background"
SEED = 7
ENGINE = "pyengine"
ROUNDS = 5
WARM_STARTS = 3
WARM_CLIPS = 8  # until window and ring are full, every shape has run, and a compiler has compiled
PAUSE_SECONDS = 0.2  # between turns: threads of the one before stop spinning
# A new process, from its start to its first frame. Its peak memory is read after a few seconds of video more.
CHILD = """
import json, sys, time
before = time.perf_counter()
import pyengine
imported = time.perf_counter() - before
options = json.loads(sys.argv[1])
engine = pyengine.load(options["bundle"], **options["load"])
with engine.stream(options["prompt"], seed=options["seed"]) as stream:
    next(stream)
    first = time.time()
    from pyengine.measure.probe import peak_memory_mb
    building = peak_memory_mb()
    for _ in range(options["frames"]):
        next(stream)
record = {"first": first, "import": imported, "first_frame_mb": building, "peak_mb": peak_memory_mb()}
print(json.dumps(record))
"""


def bench(
    bundle: str | Path = "shapes",
    *,
    seconds: float = 20.0,
    backend: str = "openvino",
    device: str = "auto",
    precision: str = "auto",
    choice: str = "auto",
    threads: int | None = None,
    cache_dir: str | Path | None = None,
    peers: bool | Sequence[str] = True,
    prompt: str = PROMPT,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Numbers as plain data, ready for JSON. `seconds` of measuring for the engine and for every peer.

    frames_per_second    steady, the median of rounds; `rounds` has each of them, for every contender
    first_frame_seconds  from the start of a new process, import and load included: `cold` with an empty plan
                         cache, `warm` with a plan
    call_ms              one call of the network as the stream makes it, with guidance and sampler: p50, p95
    peak_memory_mb       of a process that does nothing else, on a cached plan
    overhead_percent     of a run of the plan: time outside compiled segments and kernels. `overhead` adds the
                         share of whole calls (with schedule, sampler, noise), and the stream's time between
                         calls, which is waiting for the decoder
                         Both are empty on device cuda: see benchmarks/gpu
    peers                name -> frames per second; `times_faster`: name -> engine over peer, median of rounds

    `peers` may name some out of `pyengine.export.peers.NAMES`. Raises BackendUnavailable where they need
    packages that are missing, ConfigError for a name or a time that cannot be.
    """
    if seconds <= 0:
        raise ConfigError(f"expected seconds of measuring above 0 but got {seconds}")
    say = progress or (lambda done, total, what: None)
    options: dict[str, Any] = {
        "backend": backend,
        "device": device,
        "precision": precision,
        "choice": choice,
        "threads": threads,
    }
    names = _peer_names(peers)
    total = 2 + ROUNDS + len(names)
    say(0, total, "first frame, cold and warm")
    starts = _first_frames(bundle, options, prompt)
    engine = load(bundle, cache_dir=cache_dir, **options)
    with engine.stream(prompt, seed=SEED) as stream:
        probe = Probe(stream)
        contenders: dict[str, Iterator[np.ndarray]] = {ENGINE: stream.clips()}
        failed: dict[str, str] = {}
        say(1, total, f"warming {ENGINE}")
        _take(contenders[ENGINE], WARM_CLIPS)
        for index, (name, start) in enumerate(_peer_starts(engine, names, prompt, threads, cache_dir)):
            say(2 + index, total, f"warming {name}")
            try:
                clips = start()
                _take(clips, WARM_CLIPS)
                contenders[name] = clips
            except Exception as error:  # a compiler that is missing, say: the others still count
                reason = str(error).strip() or "no reason given"
                failed[name] = f"{type(error).__name__}: {reason.splitlines()[0]}"
        rounds: dict[str, list[float]] = {name: [] for name in contenders}
        for turn in range(ROUNDS):
            say(2 + len(names) + turn, total, f"round {turn + 1} of {ROUNDS}")
            for name, clips in contenders.items():
                time.sleep(PAUSE_SECONDS)
                next(clips)
                with probe if name == ENGINE else nullcontext():
                    rounds[name].append(_frames_per_second(clips, seconds / ROUNDS))
    say(total, total, "done")
    faster = {
        name: [a / b for a, b in zip(rounds[ENGINE], rounds[name], strict=True)]
        for name in rounds
        if name != ENGINE
    }
    return {
        "bundle": engine.bundle.name,
        "machine": machine(),
        "plan": {
            "backend": backend,
            "precision": engine.plans[0].precision,
            "choices": {
                str(part.variant): part.choice for plan in engine.plans for part in plan.parts.values()
            },
        },
        "frames_per_second": round(median(rounds[ENGINE]), 2),
        **starts,
        "call_ms": probe.call_ms(),
        "overhead_percent": probe.overhead().get("executor"),
        "overhead": probe.overhead(),
        "peers": {name: round(median(rounds[name]), 2) for name in faster},
        "times_faster": {name: round(median(values), 3) for name, values in faster.items()},
        "times_faster_spread": {
            name: [round(min(values), 3), round(max(values), 3)] for name, values in faster.items()
        },
        "rounds": {name: [round(value, 2) for value in values] for name, values in rounds.items()},
        "peers_failed": failed,
    }


def _frames_per_second(clips: Iterator[np.ndarray], seconds: float) -> float:
    """Whole clips for at least `seconds`."""
    frames, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds or not frames:
        frames += len(next(clips))
    return frames / elapsed


def _take(clips: Iterator[np.ndarray], count: int) -> None:
    for _ in range(count):
        next(clips)


def _peer_names(peers: bool | Sequence[str]) -> tuple[str, ...]:
    if not peers:
        return ()
    try:
        from pyengine.export.peers import DEFAULT, NAMES
    except ModuleNotFoundError as error:
        raise BackendUnavailable(
            f"peers need the package {error.name}: pip install 'pyengine-video[export]', "
            "or leave them out with --no-peers"
        ) from error
    names = DEFAULT if peers is True else tuple(peers)
    if unknown := set(names) - set(NAMES):
        raise ConfigError(f"expected peers out of {', '.join(NAMES)} but got {', '.join(sorted(unknown))}")
    return names


def _peer_starts(
    engine: Engine, names: Sequence[str], prompt: str, threads: int | None, cache_dir: str | Path | None
) -> Iterator[tuple[str, Callable[[], Iterator[np.ndarray]]]]:
    if not names:
        return
    from pyengine.export.peers import Peers

    precision = engine.plans[0].precision
    cache = Path(cache_dir) if cache_dir else None
    peers = Peers(
        engine.bundle,
        prompt=prompt,
        seed=SEED,
        precision=precision,
        threads=threads or cores(),
        cache_dir=cache,
    )
    for name in names:
        yield name, lambda name=name: peers.clips(name)  # type: ignore[misc]


def _first_frames(bundle: str | Path, options: dict[str, Any], prompt: str) -> dict[str, Any]:
    """New processes: one with an empty plan cache, then some that find its plan."""
    source = str(Path(bundle).resolve()) if Path(bundle).is_dir() else str(bundle)
    with tempfile.TemporaryDirectory(prefix="pyengine-bench-") as cache:
        given = {
            "bundle": source,
            "load": {**options, "cache_dir": cache},
            "prompt": prompt,
            "seed": SEED,
            "frames": 96,
        }
        cold, *warm = (_start(given) for _ in range(1 + WARM_STARTS))
    return {
        "first_frame_seconds": {
            "cold": round(cold["seconds"], 3),
            "warm": round(median(start["seconds"] for start in warm), 3),
        },
        "import_seconds": round(median(start["import"] for start in warm), 4),
        "peak_memory_mb": round(median(start["peak_mb"] for start in warm), 1),
        "peak_memory_building_mb": round(cold["first_frame_mb"], 1),
    }


def _start(given: dict[str, Any]) -> dict[str, float]:
    start = time.time()
    done = subprocess.run(
        [sys.executable, "-P", "-c", CHILD, json.dumps(given)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise PyEngineError(f"a new process could not make its first frame: {lines[-1]}")
    record: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return {**record, "seconds": record["first"] - start}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from pyengine.commands.engine_options import add_engine_options

    parser.add_argument(
        "bundle", nargs="?", default="shapes", help="a bundled name or a folder (default: shapes)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--no-peers", action="store_true", help="measure the engine alone; needs neither torch nor onnx"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=20.0,
        help="measuring time of the engine and of every peer (default: 20)",
    )
    parser.add_argument("--prompt", default=PROMPT, help="what the video shows; does not change the speed")
    add_engine_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """The command's work: measure, then print JSON or a short table."""

    def report(done: int, total: int, what: str) -> None:
        print(f"[{done}/{total}] {what}", file=sys.stderr, flush=True)

    result = bench(
        arguments.bundle,
        seconds=arguments.seconds,
        backend=arguments.backend,
        device=arguments.device,
        precision=arguments.precision,
        choice=arguments.choice,
        threads=arguments.threads,
        cache_dir=arguments.cache,
        peers=not arguments.no_peers,
        prompt=arguments.prompt,
        progress=report if sys.stderr.isatty() or not arguments.json else None,
    )
    print(json.dumps(result, indent=1) if arguments.json else table(result))
    return 0


def table(result: dict[str, Any]) -> str:
    """The numbers for a reader."""
    first, call, overhead = result["first_frame_seconds"], result["call_ms"], result["overhead"]
    where, plan = result["machine"], result["plan"]
    lines = [
        f"{where['cpu']}, {where['cores']} cores, {where['isa']}; {plan['backend']} {plan['precision']}",
        f"steady         {result['frames_per_second']:8.1f} frames/s",
        f"first frame    {first['warm']:8.2f} s warm, {first['cold']:.2f} s cold",
        f"call           {call['p50']:8.2f} ms p50, {call['p95']:.2f} ms p95",
        f"peak memory    {result['peak_memory_mb']:8.0f} MB",
    ]
    if overhead:
        lines.append(
            f"overhead       {overhead['executor']:8.2f} % of a run, {overhead['call']:.2f} % of a call"
        )
    lines += [
        f"{name:<24}{fps:8.1f} frames/s   {result['times_faster'][name]:.2f}x"
        for name, fps in result["peers"].items()
    ]
    lines += [f"{name:<24}  failed: {why}" for name, why in result["peers_failed"].items()]
    return "\n".join(lines)
