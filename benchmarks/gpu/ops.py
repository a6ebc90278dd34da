"""The CUDA kernels on a GPU: every op case against float64, then timings beside what the GPU can do at most.

    python benchmarks/gpu/ops.py [--json FILE] [--check-only] [--small] [--seconds S]

Every record is printed and kept as it comes. The kernel for warpgroups, which can cost the process its context, comes
last and in a process of its own. Exit code 1 if a case is wrong or a kernel of ours raised.

Needs a GPU, PyTorch with CUDA and pyengine built with CUDA; it says what it skips and why. Every time is of a single
cold run (the L2 cache is overwritten before it), median of many. `of roof` is the share of the larger of two bounds:
bytes that must cross memory at the measured copy bandwidth, operations at the measured matrix rate. Peers get inputs
that are already normalised, rotated, concatenated and transposed, and no mask where their kernel takes none: less
work than ours.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from op_checks import (
    PLAIN,
    CudaOps,
    TensorArray,
    check,
    check_warpgroups,
    context_lives,
    in_precision,
    one_line,
    warpgroups,
)
from roofline import Roofline, measure, time_cold, write
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from pyengine.export.ops import OpSpec
from pyengine.export.ops.frame_window_attention import BENCH_CASES, visible
from pyengine.export.ops.frame_window_attention_cases import AttentionCase

OURS = ("pyengine", "warpgroups")  # how contenders of ours begin
PEERS = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
}

FRAME = {"scope": "frame", "mask": "bidirectional"}
GPU_CASES: tuple[AttentionCase, ...] = (
    # Scope temporal: many short sequences of 20 to 64 frames.
    *(AttentionCase(f"temporal_{f}_{d}", frames=f, ring=8, tokens=1024, heads=16, head_dim=d, chunk_frames=5,
                    attributes={"rotary_dim": d}) for f in (20, 35, 56) for d in (64, 72, 128)),
    # Scope frame, query = key, as libraries are measured: 4k, 8k, 16k tokens.
    *(AttentionCase(f"self_{n // 1024}k_{d}", branches=1, frames=1, ring=0, tokens=n, heads=h, head_dim=d, gains=False,
                    attributes=FRAME) for n in (4096, 8192, 16384) for d, h in ((64, 32), (128, 16))),
    # A chunk of queries over a ring: 3 frames of 1,560 tokens see 4k to 33k keys.
    *(AttentionCase(f"chunk_{(r + 3) * 1560 // 1000}k_128", branches=1, frames=3, ring=r, tokens=1560, heads=12,
                    head_dim=128, chunk_frames=3, attributes={"scope": "frame", "rotary_dim": 128}) for r in (0, 6, 18)),
    # One small frame over a long ring: too few blocks unless keys are split.
    AttentionCase("few_33k_128", branches=1, frames=1, ring=127, tokens=256, heads=12, head_dim=128,
                  attributes={"scope": "frame", "rotary_dim": 128}),
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One contender on one case."""

    op: str
    case: str
    dtype: str
    contender: str
    milliseconds: float
    p95: float
    bytes: float
    operations: float
    of_roof: float


def seen_pairs(case: AttentionCase, inputs: dict[str, Any]) -> int:
    """(query, key) pairs over the whole batch, all heads and tokens."""
    attributes = {"mask": "noise_causal", "scope": "temporal", **case.attributes}
    names = ("level", "frame_index", "ring_index", "reach")
    frames = case.branches * int(visible(*(inputs[name] for name in names), attributes["mask"]).sum())
    per_frame = case.tokens**2 if attributes["scope"] == "frame" else case.tokens
    return frames * per_frame * case.heads


def moved_bytes(case: AttentionCase, size: int) -> int:
    """qkv and ring read once, out written once."""
    return case.batch * case.tokens * case.heads * case.head_dim * size * (4 * case.frames + 2 * case.ring)


def timing_inputs(case: AttentionCase, dtype: torch.dtype, device: str) -> dict[str, torch.Tensor | None]:
    """Inputs of the case with noise made on the device: that of the largest takes a processor ten seconds."""
    inputs = replace(case, tokens=1, heads=1).make_inputs(dtype=torch.float32)  # indices, levels and gains
    made = {name: None if value is None else value.to(device) for name, value in inputs.items()}
    rows = (case.tokens, 3, case.heads, case.head_dim)
    made["qkv"] = torch.randn(case.batch, case.frames, *rows, dtype=dtype, device=device)
    for name in ("ring_key", "ring_value"):
        made[name] = torch.randn(case.batch, case.ring, rows[0], *rows[2:], dtype=dtype, device=device)
    return made


def current_stream(ops: CudaOps) -> int:
    return torch.cuda.current_stream().cuda_stream if ops.device == "cuda" else 0


def attention_contenders(
    ops: CudaOps, case: AttentionCase, dtype: torch.dtype, groups: bool
) -> Iterator[tuple[str, Callable[[], object], float | None]]:
    """(name, run, operations where they differ from the op's own). `groups`: the kernel for warpgroups alone, where it fits."""
    inputs = timing_inputs(case, dtype, ops.device)
    attributes = {"mask": "noise_causal", "scope": "temporal", **case.attributes}
    arrays: dict[str, Any] = {k: None if v is None else TensorArray(v) for k, v in inputs.items()}
    shape = (case.batch, case.frames, case.tokens, case.heads * case.head_dim)
    arrays["out"] = TensorArray(torch.empty(shape, dtype=dtype, device=ops.device))
    module, stream = ops.module, current_stream(ops)

    def ours(name: str) -> Iterator[tuple[str, Callable[[], object], None]]:
        """Without a workspace, and with one where it is of use."""
        yield name, lambda: module.frame_window_attention(**arrays, **attributes, stream=stream), None
        if size := module.frame_window_attention_workspace(**arrays, **attributes):
            room = arrays | {
                "workspace": TensorArray(torch.empty(size, dtype=torch.uint8, device=ops.device))
            }
            yield (
                f"{name} split",
                lambda: module.frame_window_attention(**room, **attributes, stream=stream),
                None,
            )

    if groups:
        if attributes["scope"] == "frame" and case.head_dim % 64 == 0:
            with warpgroups(ops):  # while the caller times what it was given
                yield from ours("warpgroups")
        return
    yield from ours("pyengine")
    keys = case.ring + case.frames
    if attributes["scope"] == "temporal":
        rows = (case.batch * case.tokens, case.heads)
        lengths, sequences = (case.frames, keys), case.batch * case.tokens * case.heads
    else:
        rows = (case.batch, case.heads)
        lengths, sequences = (case.frames * case.tokens, keys * case.tokens), case.batch * case.heads
    place: dict[str, Any] = {"dtype": dtype, "device": ops.device}
    query = torch.randn(*rows, lengths[0], case.head_dim, **place)
    key, value = (torch.randn(*rows, lengths[1], case.head_dim, **place) for _ in range(2))
    operations = 4.0 * lengths[0] * lengths[1] * case.head_dim * sequences

    def sdpa(backend: SDPBackend) -> Callable[[], object]:
        def run() -> object:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(query, key, value)

        return run

    for name, backend in PEERS.items():
        yield name, sdpa(backend), operations


def plain_run(ops: CudaOps, spec: OpSpec, case: Any) -> tuple[Callable[[], object], int]:
    """A call of an op, what is in the working precision in bfloat16; bytes of inputs and output, once each."""
    inputs = in_precision(spec, case.make_inputs(), torch.bfloat16)
    attributes = getattr(case, "attributes", {})
    shapes = {k: None if v is None else torch.empty_like(v, device="meta") for k, v in inputs.items()}
    shapes = {k: v.float() if v is not None and v.is_floating_point() else v for k, v in shapes.items()}
    shape = spec.reference(**shapes, **attributes)[0].shape
    out = torch.empty(shape, dtype=inputs[spec.inputs[0]].dtype, device=ops.device)
    arrays = {name: ops.put(tensor) for name, tensor in inputs.items()}
    size = out.nbytes + sum(array.tensor.nbytes for array in arrays.values() if array is not None)
    kernel, stream = getattr(ops.module, spec.kernel), current_stream(ops)
    return lambda: kernel(**arrays, out=TensorArray(out), **attributes, stream=stream), size


class Failed(Exception):
    """A kernel of ours raised while it was timed: (case, contender, what it said)."""


def rows_of(op: str, case: str, dtype: str, contenders: Any, size: float, operations: float, roof: Roofline,
            seconds: float) -> Iterator[Row]:  # fmt: skip
    for name, run, own_operations in contenders:
        try:
            run()
            first = statistics.median(time_cold(run, 3))
            times = time_cold(run, max(5, min(200, int(seconds * 1e3 / max(first, 0.02)))))
        except RuntimeError as problem:
            if name.startswith(OURS) and not isinstance(problem, torch.OutOfMemoryError):
                raise Failed(case, name, one_line(problem)) from problem
            print(f"skipped {name} on {case}: {one_line(problem)}", file=sys.stderr)
            continue
        milliseconds = statistics.median(times)
        work = operations if own_operations is None else own_operations
        bound = max(size / roof.copy_bytes_per_second, work / roof.matrix_bf16_per_second)
        p95 = sorted(times)[int(0.95 * (len(times) - 1))]
        yield Row(op, case, dtype, name, milliseconds, p95, size, work, 1e3 * bound / milliseconds)


def time_all(
    ops: CudaOps,
    roof: Roofline,
    seconds: float,
    only: str,
    keep: Callable[[str, dict[str, Any]], None],
    groups: bool = False,
) -> None:
    """Keeps a record of "timings" for every contender, and of "failures" for each case on which a kernel of ours raised.
    `groups`: the kernel for warpgroups alone. Ends early where a failure has cost the context."""

    def timed(case: str, rows: Callable[[], Iterator[Row]]) -> bool:
        """False where nothing more can be timed."""
        try:
            for row in rows():
                keep("timings", asdict(row))
                rate = f"{row.bytes / row.milliseconds / 1e6:7.0f} GB/s {row.operations / row.milliseconds / 1e9:7.1f} TFLOP/s"
                print(f"{row.case:18}{row.contender:16}{row.milliseconds:9.4f} ms {rate} {100 * row.of_roof:5.1f} % of roof",
                      flush=True)  # fmt: skip
        except torch.OutOfMemoryError as problem:  # what a peer reads, say
            print(f"skipped the rest of {case}: {one_line(problem)}", file=sys.stderr)
        except (Failed, RuntimeError, ValueError) as problem:
            found = problem.args if isinstance(problem, Failed) else (case, "pyengine", one_line(problem))
            keep("failures", dict(zip(("case", "contender", "failed"), found, strict=True)))
            print(f"FAILED {found[1]} on {found[0]}: {found[2]}", flush=True)
            return context_lives(ops)
        return True

    def attention_rows(case: AttentionCase) -> Iterator[Row]:
        operations = 4.0 * case.head_dim * seen_pairs(case, replace(case, tokens=1, heads=1).make_inputs())
        contenders = attention_contenders(ops, case, torch.bfloat16, groups)
        yield from rows_of("FrameWindowAttention", case.name, "bfloat16", contenders, moved_bytes(case, 2), operations, roof,
                           seconds)  # fmt: skip

    def plain_rows(spec: OpSpec, one: Any) -> Iterator[Row]:
        run, size = plain_run(ops, spec, one)
        contenders = [("pyengine", run, None)]
        yield from rows_of(spec.name, one.name, "bfloat16", contenders, size, getattr(one, "operations", 0.0), roof,
                           seconds)  # fmt: skip

    jobs = [(case.name, partial(attention_rows, case)) for case in (*BENCH_CASES, *GPU_CASES)]
    if not groups:
        jobs += [(one.name, partial(plain_rows, spec, one)) for spec in PLAIN for one in spec.bench_cases]
    for name, rows in jobs:
        if only in name and not timed(name, rows):
            print("the context of the GPU is lost: nothing more can be timed in this process", flush=True)
            return


class Results:
    """What is known so far: printed, and written after every record, since the time may run out or the context be lost."""

    def __init__(self, path: Path, found: dict[str, Any] | None = None) -> None:
        self.path = path
        self.found: dict[str, Any] = found or {"checks": [], "failures": []}

    def keep(self, kind: str, record: dict[str, Any]) -> None:
        self.found.setdefault(kind, []).append(record)
        write(self.path, self.found)

    def check(self, records: Iterator[dict[str, Any]]) -> None:
        for one in records:
            self.keep("checks", one)
            what = f"{one['op']} {one['case']} {one['dtype']}"
            if "failed" in one:
                print(f"FAILED {what}: {one['failed']}", flush=True)
                if not one["context"]:
                    print(
                        "the context of the GPU is lost: nothing more can be checked in this process",
                        flush=True,
                    )
                    return
            else:
                verdict = "checked" if one["good"] else "WRONG"
                print(
                    f"{verdict} {what}: error {one['error']:.3g}, torch {one['torch_error']:.3g}", flush=True
                )

    def code(self) -> int:
        """Of the process: 1 if a case is wrong or a kernel of ours raised."""
        return int(bool(self.found["failures"]) or not all(one["good"] for one in self.found["checks"]))


def measure_into(results: Results, ops: CudaOps, options: argparse.Namespace) -> None:
    """What this process is for: the kernel for warpgroups, or all that is on without being asked for."""
    if not options.time_only:
        results.check(check_warpgroups(ops) if options.warpgroups else check(ops, options.small))
    if options.check_only or not context_lives(ops):
        return
    if "roofline" in results.found:
        roof = Roofline(**results.found["roofline"])
    else:
        roof = measure()
        results.found |= {"roofline": asdict(roof), "torch": torch.__version__, "timings": []}
    print(f"{roof.gpu}, driver {roof.driver}: copy {roof.copy_bytes_per_second / 1e9:.0f} GB/s, "
          f"bf16 {roof.matrix_bf16_per_second / 1e12:.0f} TFLOP/s")  # fmt: skip
    time_all(ops, roof, options.seconds, options.case, results.keep, options.warpgroups)


def in_own_process(results: Results, command: list[str]) -> None:
    """Runs the rest of the kernels, whose process adds to the file of `results`."""
    code = subprocess.run(command, check=False).returncode
    results.found = json.loads(results.path.read_text())
    if code not in (0, 1):
        failed = f"the process for warpgroups ended with {code}"
        results.keep("failures", {"case": "", "contender": "warpgroups", "failed": failed})
        print(f"FAILED {failed}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="also write everything there")
    parser.add_argument("--check-only", action="store_true", help="no timings")
    parser.add_argument("--time-only", action="store_true", help="no checks")
    parser.add_argument("--small", action="store_true", help="a third of the cases, for compute-sanitizer")
    parser.add_argument(
        "--seconds", type=float, default=0.3, help="measuring time per contender (default 0.3)"
    )
    parser.add_argument("--case", default="", help="time only cases whose name contains this")
    parser.add_argument(
        "--warpgroups", action="store_true", help="only the kernel for warpgroups, added to what FILE has"
    )
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    try:
        from pyengine import _cuda
    except ImportError:
        print(
            "ops.py: skipped, pyengine was built without CUDA: pip install . --config-settings=cmake.define.PYENGINE_CUDA=on"
        )
        return 0
    if not torch.cuda.is_available() or not _cuda.device_count():
        print("ops.py: skipped, no GPU or a PyTorch without CUDA")
        return 0
    ops, start = CudaOps(_cuda, "cuda"), time.perf_counter()
    has_warpgroups = _cuda.has_warpgroups()  # asked while the context lives
    with tempfile.TemporaryDirectory() as scratch:
        path = options.json or Path(scratch) / "ops.json"
        before = json.loads(path.read_text()) if options.warpgroups and path.exists() else None
        results = Results(path, before)
        measure_into(results, ops, options)
        write(path, results.found)
        if not options.warpgroups and has_warpgroups:
            if context_lives(ops):
                torch.cuda.empty_cache()
            own = [sys.executable, __file__, *sys.argv[1:], "--warpgroups", "--json", str(path)]
            in_own_process(results, own)
        results.found["seconds"] = time.perf_counter() - start
        write(path, results.found)
        checks = results.found["checks"]
        good = sum(one["good"] for one in checks)
        print(
            f"{good} of {len(checks)} cases within twice torch's own error, {len(results.found['failures'])} failures in timings"
        )
        return results.code()


if __name__ == "__main__":
    sys.exit(main())
