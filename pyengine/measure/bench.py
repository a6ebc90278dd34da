"""Measures a bundle on this machine: steady speed, first frame, calls, memory, overhead, and peers in turns.

    result = bench("shapes", peers=False)      # what `pyengine bench shapes --json --no-peers` prints

The engine and its peers make the same video in turns, round after round in one process, so a busy machine
slows them alike: read the ratios. Nothing here imports torch or onnx unless peers are asked for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from pyengine.build.progress import Progress
from pyengine.bundle.bundle import Bundle
from pyengine.engine import Engine
from pyengine.errors import BackendUnavailable, ConfigError
from pyengine.measure.first_frame import example_start, first_frames
from pyengine.measure.probe import Probe, machine
from pyengine.options import EngineOptions
from pyengine.processor import cores

__all__ = ["bench", "example_prompt", "table"]

ANY_PROMPT = "a ship sails over the sea at night"  # for bundles that take any text
SEED = 7
ENGINE = "pyengine"
ROUNDS = 5
WARM_STARTS = 3
WARM_CLIPS = 8  # until window and ring are full, every shape has run, and a compiler has compiled
BURST_CLIPS = 16  # a schedule of cadence 1 is never without a clip that is ready
PAUSE_SECONDS = 0.2  # between turns: threads of the one before stop spinning


def bench(
    bundle: str | Path = "shapes",
    *,
    seconds: float = 20.0,
    options: EngineOptions | None = None,
    peers: bool | Sequence[str] = True,
    prompt: str | None = None,
    progress: Progress | None = None,
    **given: Any,
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

    `given` are fields of EngineOptions in place of `options`; `peers` may name some out of `pyengine.export.peers.NAMES`; `prompt` None:
    the bundle's own example. Raises BackendUnavailable where peers need packages that are missing, ConfigError for a name or a time
    that cannot be, PromptError.
    """
    if seconds <= 0:
        raise ConfigError(f"expected seconds of measuring above 0 but got {seconds}")
    say = progress or (lambda done, total, what: None)
    options = EngineOptions(**given) if options is None else replace(options, **given)
    loaded = Bundle.load(bundle)
    prompt = example_prompt(loaded) if prompt is None else prompt
    names = _peer_names(loaded, peers)
    total = 2 + ROUNDS + len(names)
    say(0, total, "first frame, cold and warm")
    engine = Engine(loaded, options)  # first, since it refuses what cannot be
    engine.check_prompt(prompt)
    starts = first_frames(bundle, options, prompt, SEED, WARM_STARTS)
    probe = Probe()
    contenders: dict[str, Iterator[np.ndarray]] = {ENGINE: _bursts(engine, prompt, probe)}
    failed: dict[str, str] = {}
    say(1, total, f"warming {ENGINE}")
    _take(contenders[ENGINE], WARM_CLIPS)
    for index, (name, start) in enumerate(_peer_starts(engine, names, prompt)):
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
    engine.close()
    say(total, total, "done")
    faster = {
        name: [a / b for a, b in zip(rounds[ENGINE], rounds[name], strict=True)]
        for name in rounds
        if name != ENGINE
    }
    return {
        "bundle": loaded.name,
        "prompt": prompt,
        "machine": machine(),
        "plan": {
            "backend": options.backend,
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


def example_prompt(bundle: Bundle) -> str:
    """A prompt that the bundle can follow: its own example; any text where it has none; nothing where it takes no text."""
    return "" if bundle.text is None else bundle.text.example or ANY_PROMPT


def _bursts(engine: Engine, prompt: str, probe: Probe) -> Iterator[np.ndarray]:
    """Frames without end, uint8 [frames, height, width, 3]: all that are ready after the same calls together, so that work and frames
    go with each other (a round of two levels gives several clips at once). A method that makes one clip makes it again and again.
    """
    start = example_start(engine.bundle)
    while True:
        with engine.stream(prompt, seed=SEED, start=start) as stream:
            probe.attach(stream)
            burst: list[np.ndarray] = []
            for clip in stream.clips():
                burst.append(clip)
                if len(burst) == BURST_CLIPS or not probe.has_more():
                    yield np.concatenate([np.asarray(clip) for clip in burst])
                    burst = []
            probe.detach()


def _frames_per_second(clips: Iterator[np.ndarray], seconds: float) -> float:
    """Whole clips for at least `seconds`."""
    frames, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds or not frames:
        frames += len(next(clips))
    return frames / elapsed


def _take(clips: Iterator[np.ndarray], count: int) -> None:
    for _ in range(count):
        next(clips)


def _peer_names(bundle: Bundle, peers: bool | Sequence[str]) -> tuple[str, ...]:
    if not peers:
        return ()
    try:
        from pyengine.export.peers import NAMES, names_for
    except ModuleNotFoundError as error:
        raise BackendUnavailable(
            f"peers need the package {error.name}: pip install 'pyengine-video[export]', "
            "or leave them out with --no-peers"
        ) from error
    if peers is True:
        return names_for(bundle)
    names = tuple(peers)
    if unknown := set(names) - set(NAMES):
        raise ConfigError(f"expected peers out of {', '.join(NAMES)} but got {', '.join(sorted(unknown))}")
    return names


def _peer_starts(
    engine: Engine, names: Sequence[str], prompt: str
) -> Iterator[tuple[str, Callable[[], Iterator[np.ndarray]]]]:
    if not names:
        return
    from pyengine.export.peers import Peers

    options = engine.options
    peers = Peers(
        engine.bundle,
        prompt=prompt,
        seed=SEED,
        precision=engine.plans[0].precision,
        threads=options.threads or cores(),
        cache_dir=options.cache_dir,
    )
    for name in names:
        yield name, lambda name=name: peers.clips(name)  # type: ignore[misc]


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
