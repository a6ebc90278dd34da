"""The `shapes` stream on a GPU: checked against the CPU plan, and timed.

    python benchmarks/gpu/stream.py check tensorrt --json FILE     # also onnxruntime, torch (see torch_segments.py)
    python benchmarks/gpu/stream.py bench tensorrt --json FILE     # also torch_eager, torch_compile: the peers
    python benchmarks/gpu/stream.py first tensorrt --json FILE     # new processes: first frame from a cached plan

`check` makes the same frames as a float32 plan of the CPU. Rounding changes frames, so the error allowed is twice that of
PyTorch eager in the same precision, plus a tenth of a level. `bench` reports what a call costs, the shares of it in which the
GPU is idle, and what bounds it.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from roofline import write

import pyengine
from pyengine.export.peers import TorchOptions, TorchStream, load_modules
from pyengine.streaming.driver import sized
from pyengine.streaming.stream import Stream

PROMPT, OTHER = "a red circle bounces over a blue background", "a green star orbits over a grey background"
SEED = 7
FRAMES = 96  # the window fills, is full, and the ring wraps around
FLOOR = 0.1  # levels of 255
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PRECISIONS = {
    "tensorrt": ("bf16", "fp16", "fp32"),  # what is used most comes first: time may run out
    "onnxruntime": ("fp16", "fp32"),
    "torch": ("bf16", "fp16", "fp32"),
}
PEERS = {"torch_eager": None, "torch_compile": "max-autotune"}
ROUNDS, WARM_CLIPS, PROFILED_CLIPS, REPLAYS = 5, 8, 12, 30


def load(backend: str, precision: str, cache: str | None, choice: str = "cut") -> pyengine.Engine:
    if backend == "torch":
        import torch_segments

        torch_segments.register()
    return pyengine.load(
        "shapes", backend=backend, device="cuda", precision=precision, choice=choice, cache_dir=cache
    )


def known_roof(path: Path | None) -> dict[str, float] | None:
    """What roofline.py wrote, if it did."""
    return json.loads(path.read_text()) if path is not None and path.exists() else None


def made(stream: Stream, count: int | None = None) -> np.ndarray:
    """The next frames, FRAMES of them unless told otherwise."""
    return np.stack([np.asarray(next(stream)) for _ in range(FRAMES if count is None else count)])


def reference(cache: str | None) -> tuple[np.ndarray, str]:
    """Frames of the float32 plan on the CPU, by whichever backend is here; without one, of the model in PyTorch there."""
    for backend in ("openvino", "onnxruntime"):
        try:
            engine = pyengine.load("shapes", backend=backend, precision="fp32", choice="cut", cache_dir=cache)
        except pyengine.BackendUnavailable:
            continue
        with engine.stream(PROMPT, seed=SEED, frames=FRAMES) as stream:
            return made(stream), backend
    return torch_clips("fp32", device="cpu"), "torch"


def torch_frames(precision: str, compiled: str | None = None, device: str = "cuda") -> Iterator[np.ndarray]:
    """Endless clips of the peer."""
    torch.backends.cudnn.allow_tf32 = False  # what is said to be float32 is meant
    bundle = pyengine.Bundle.load("shapes")
    options = TorchOptions(DTYPES[precision], compiled, device=device)
    return TorchStream(bundle, copy.deepcopy(load_modules(bundle)), options, prompt=PROMPT, seed=SEED).clips()


def torch_clips(precision: str, device: str = "cuda") -> np.ndarray:
    """The peer's first FRAMES frames."""
    clips: list[np.ndarray] = []
    for clip in torch_frames(precision, device=device):
        clips.append(clip)
        if sum(map(len, clips)) >= FRAMES:
            break
    return np.concatenate(clips)[:FRAMES]


def mean_error(frames: np.ndarray, exact: np.ndarray) -> float:
    """Mean absolute difference in levels of 255."""
    return float(np.abs(frames.astype(np.float64) - exact).mean())


def check_stream(engine: pyengine.Engine, exact: np.ndarray, allowed: float) -> dict[str, Any]:
    """Frames against `exact`; then what must be the same to the bit: the stream resumed, and its frames on the GPU."""
    with engine.stream(PROMPT, seed=SEED) as stream:
        frames = made(stream)
        state = stream.snapshot()
        stream.prompt = OTHER
        following = made(stream, 8)
        graphs = list(getattr(stream._open(), "graphs", ()))
    with engine.resume(state) as resumed:
        resumed.prompt = OTHER
        same = bool(np.array_equal(made(resumed, 8), following))
    found = {"error": mean_error(frames, exact), "allowed": allowed, "graphs": graphs, "resumes": same}
    found["good"] = bool(found["error"] <= allowed and same)
    return found


def frames_on_gpu(engine: pyengine.Engine, frames: np.ndarray) -> bool:
    """Whether frames that stay on the GPU, read by PyTorch where they lie, are the frames delivered."""
    with engine.stream(PROMPT, seed=SEED, frames=len(frames), device_frames=True) as stream:
        seen = [torch.from_dlpack(frame).cpu().numpy() for frame in stream]
    return bool(np.array_equal(np.stack(seen), frames))


def check(
    backend: str, cache: str | None, keep: Callable[[Any], None], device: str = "cuda"
) -> dict[str, Any]:
    """`keep` gets what is known after every stream: a compiler may take all the time there is."""
    exact, source = reference(cache)
    records: list[dict[str, Any]] = []
    result = {"reference": source, "frames": FRAMES, "streams": records}
    for precision in PRECISIONS[backend]:
        torch_error = mean_error(torch_clips(precision, device), exact)
        for choice in ("cut", "inline"):
            record: dict[str, Any] = {"backend": backend, "precision": precision, "choice": choice}
            try:
                engine = load(backend, precision, cache, choice)
                record |= check_stream(engine, exact, 2 * torch_error + FLOOR) | {"torch_error": torch_error}
                if choice == "cut":
                    with engine.stream(PROMPT, seed=SEED, frames=24) as stream:
                        record["device_frames"] = frames_on_gpu(engine, made(stream, 24))
                    record["good"] &= record["device_frames"]
                engine.close()
            except Exception as error:  # of a library, too: the other streams are still of interest
                said = str(error).splitlines() or [type(error).__name__]
                record |= {"good": False, "failed": said[0]}
                traceback.print_exc()
            records.append(record)
            keep(result)
            print({k: v for k, v in record.items() if k != "graphs"}, flush=True)
    return result


def fast(backend: str) -> str:
    """The precision in which a backend is timed."""
    return "fp16" if backend == "onnxruntime" else "bf16"


def bench(contender: str, seconds: float, cache: str | None, roof: dict[str, float] | None) -> dict[str, Any]:
    """Steady speed of one contender, and where the GPU's time goes."""
    if contender in PEERS:
        return {"contender": contender, "precision": "bf16"} | measure(
            torch_frames("bf16", PEERS[contender]), seconds
        )
    precision = fast(contender)
    with load(contender, precision, cache).stream(PROMPT, seed=SEED) as stream:
        found = measure(stream.clips(), seconds) | network(stream, roof)
    return {"contender": contender, "precision": precision} | found


def measure(clips: Iterator[np.ndarray], seconds: float) -> dict[str, Any]:
    """Of an endless video."""
    start = time.perf_counter()
    for _ in range(WARM_CLIPS):
        next(clips)
    warm = time.perf_counter() - start
    rates = []
    for _ in range(ROUNDS):
        frames, start = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - start) < seconds / ROUNDS or not frames:
            frames += len(next(clips))
        rates.append(frames / elapsed)
    bundle = pyengine.Bundle.load("shapes")
    per_clip = bundle.video.frames(bundle.method["chunk_frames"])  # type: ignore[union-attr]
    return {
        "frames_per_second": median(rates),
        "rounds": rates,
        "warm_seconds": warm,
        "call_ms": 1e3 * per_clip / bundle.method["cadence"] / median(rates),
        "stream_on_gpu": gpu_time(lambda: [next(clips) for _ in range(PROFILED_CLIPS)]),
    }


def network(stream: Stream, roof: dict[str, float] | None) -> dict[str, Any]:
    """Of one run of the denoiser at its largest size, again and again: what a call costs the GPU at least. The stream is
    of no use afterwards.
    """
    executor = stream._open()
    branches = len(stream._state.weights)
    variants = [sized(variant, lanes, branches) for variant, lanes in stream._schedule.denoisers()]
    variant = max(variants, key=lambda v: sum(v.symbols.values()))

    def replay(times: int = REPLAYS) -> None:
        for _ in range(times):
            executor.run(variant)
        executor.synchronize()

    replay(2)  # captured by now
    start = time.perf_counter()
    replay()
    milliseconds = 1e3 * (time.perf_counter() - start) / REPLAYS
    found: dict[str, Any] = {
        "network": str(variant),
        "network_ms": milliseconds,
        "network_on_gpu": gpu_time(replay),
    }
    if roof is not None:
        found["network_bound"] = bound(variant.symbols, roof)
        found["of_roof"] = found["network_bound"]["ms"] / milliseconds
    return found | {"graphs": list(getattr(executor, "graphs", ()))}


def gpu_time(work: Any) -> dict[str, float] | None:
    """Milliseconds in which the GPU computes or copies while `work` runs, and the share of its span in which it does
    neither; by CUPTI through PyTorch's profiler. None where that sees nothing.
    """
    from torch.profiler import ProfilerActivity, profile

    if not torch.cuda.is_available():
        return None
    try:
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            work()
            torch.cuda.synchronize()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(path))
            events = json.loads(path.read_text())["traceEvents"]
    except (RuntimeError, OSError, ValueError, KeyError) as error:
        print(f"no profile: {error}", file=sys.stderr)
        return None
    kinds = ("kernel", "gpu_memcpy", "gpu_memset")
    return idle_share(
        [(float(e["ts"]), float(e["ts"]) + float(e["dur"])) for e in events if e.get("cat") in kinds]
    )


def idle_share(spans: list[tuple[float, float]]) -> dict[str, float] | None:
    """Of intervals in microseconds, which may overlap."""
    if len(spans) < 2:
        return None
    spans = sorted(spans)
    busy, end = 0.0, spans[0][0]
    for first, last in spans:
        busy += max(0.0, last - max(first, end))
        end = max(end, last)
    whole = end - spans[0][0]
    return {
        "busy_ms": busy / 1e3,
        "span_ms": whole / 1e3,
        "pieces": len(spans),
        "gap_share": 1 - busy / whole,
    }


def bound(symbols: dict[str, int], roof: dict[str, float]) -> dict[str, float]:
    """The least milliseconds of one run of the denoiser: its products at the measured matrix rate, or its weights and
    ring, in bf16, at the measured copy bandwidth; whichever is more.
    """
    from torch.utils.flop_counter import FlopCounterMode

    bundle = pyengine.Bundle.load("shapes")
    peer = TorchStream(bundle, load_modules(bundle), TorchOptions(torch.float32), prompt=PROMPT, seed=SEED)
    network, rows = peer._network, symbols["frames"]
    head = peer._config.head_size
    angles = torch.ones(rows, head // 2)
    mask = torch.zeros(rows, symbols["ring"] + rows)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(torch.zeros(rows, *peer._shape), torch.ones(rows), angles, angles, mask, peer._text)
    operations = counter.get_total_flops()
    weights = 2 * sum(parameter.numel() for parameter in network.parameters())
    ring = 2 * sum(
        buffer.numel() * symbols["ring"] // buffer.shape[2]
        for buffer in network.buffers()
        if buffer.ndim == 4
    )
    by_matrix = operations / roof["matrix_bf16_per_second"]
    by_memory = (weights + ring) / roof["copy_bytes_per_second"]
    return {"operations": operations, "bytes": weights + ring, "ms": 1e3 * max(by_matrix, by_memory)}


def first(backend: str, cache: str | None, keep: Callable[[Any], None]) -> dict[str, Any]:
    """Seconds from the start of a new process to its first frame: with its plan in `cache` (the first of four makes it, if nobody
    has), then with an empty cache, which a compiler may take minutes for.
    """
    with tempfile.TemporaryDirectory() as folder:
        _, *warm = [_first_frame(backend, cache or folder) for _ in range(4)]
    result = {
        "backend": backend,
        "warm_seconds": median(t["seconds"] for t in warm),
        "warm_after_import_seconds": median(t["seconds"] - t["import"] for t in warm),
    }
    keep(result)
    with tempfile.TemporaryDirectory() as folder:
        return result | {"cold_seconds": _first_frame(backend, folder)["seconds"]}


def _first_frame(backend: str, cache: str) -> dict[str, float]:
    command = [sys.executable, str(Path(__file__).with_name("first_frame.py")), backend, fast(backend), cache]
    start = time.time()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"stream.py: no first frame: {done.stderr.strip().splitlines()[-1:]}")
    record = json.loads(done.stdout.strip().splitlines()[-1])
    return {**record, "seconds": record["at"] - start}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("check", "bench", "first"))
    parser.add_argument("contender", choices=(*PRECISIONS, *PEERS))
    parser.add_argument("--json", type=Path, help="also write the result there")
    parser.add_argument("--seconds", type=float, default=10.0, help="measuring time of `bench` (default 10)")
    parser.add_argument("--cache", default=os.environ.get("PYENGINE_CACHE"), help="where plans are kept")
    parser.add_argument("--roofline", type=Path, help="JSON of roofline.py, for the bound beside the figures")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("stream.py: skipped, no GPU or a PyTorch without CUDA")
        return 0
    keep = partial(write, options.json)
    if options.what == "check":
        result = check(options.contender, options.cache, keep)
    elif options.what == "bench":
        result = bench(options.contender, options.seconds, options.cache, known_roof(options.roofline))
    else:
        result = first(options.contender, options.cache, keep)
    print(json.dumps(result))
    keep(result)
    return 0 if all(record["good"] for record in result.get("streams", ())) else 1


if __name__ == "__main__":
    sys.exit(main())
