"""The CUDA kernels on a GPU: every op case against float64, then timings beside what the GPU can do at most.

    python benchmarks/gpu/ops.py [--json FILE] [--check-only] [--small] [--seconds S]

Needs a GPU, PyTorch with CUDA and pyengine built with CUDA; it says what it skips and why. Every time is of a single
cold run (the L2 cache is overwritten before it), median of many. `of roof` is the share of the larger of two bounds:
bytes that must cross memory at the measured copy bandwidth, operations at the measured matrix rate. Peers get inputs
that are already normalised, rotated, concatenated and transposed, and no mask where their kernel takes none: less
work than ours.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from roofline import Roofline, measure, time_cold, write
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from pyengine.export.ops import OPS, OpSpec
from pyengine.export.ops.frame_window_attention import BENCH_CASES, CASES, reference, visible
from pyengine.export.ops.frame_window_attention_cases import GROUP_CASES, AttentionCase

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "ops"))
from arrays import cast, error, in_precision
from cuda_arrays import CudaOps, TensorArray

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FLOOR = {"float32": 1e-6, "bfloat16": 4e-3, "float16": 5e-4}
PLAIN = tuple(spec for spec in OPS if spec.reference is not reference)  # ring_append is in tests/ops
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


@contextmanager
def warpgroups(ops: CudaOps) -> Iterator[None]:
    """Attention of scope frame by the kernel for Hopper's warpgroups."""
    before = ops.module.use_warpgroups(True)
    try:
        yield
    finally:
        ops.module.use_warpgroups(before)


def check(ops: CudaOps, small: bool) -> Iterator[dict[str, Any]]:
    """Errors of every case of every op against float64, beside torch's own in the same dtype."""
    for name, dtype in DTYPES.items():
        for case in CASES[:: 3 if small else 1]:
            exact = reference(**case.make_inputs(), **case.attributes)
            inputs = cast(case.make_inputs(), dtype)
            torch_got = reference(**inputs, **case.attributes)
            got = ops.attention(
                inputs, [[-1] * case.frames] * case.streams, workspace=True, **case.attributes
            )["out"]
            ours, theirs = error(got, exact[0]), error(torch_got[0], exact[0])
            yield record("FrameWindowAttention", case.name, name, ours, theirs, FLOOR[name])
        for case in GROUP_CASES if ops.module.has_warpgroups() and name != "float32" else ():
            exact = reference(**case.make_inputs(), **case.attributes)
            inputs = cast(case.make_inputs(), dtype)
            theirs = error(reference(**inputs, **case.attributes)[0], exact[0])
            with warpgroups(ops):
                got = ops.attention(
                    inputs, [[-1] * case.frames] * case.streams, workspace=True, **case.attributes
                )["out"]
            ours = error(got, exact[0])
            yield record(
                "FrameWindowAttention", f"{case.name} on warpgroups", name, ours, theirs, FLOOR[name]
            )
        for spec in PLAIN:
            for one in spec.cases[:: 3 if small else 1]:
                attributes = getattr(one, "attributes", {})
                given = in_precision(spec, one.make_inputs(), dtype)
                wide = {
                    k: v.double() if v is not None and v.is_floating_point() else v for k, v in given.items()
                }
                exact = spec.reference(**wide, **attributes)
                working = given[spec.inputs[0]].dtype
                theirs = error(spec.reference(**cast(wide, working), **attributes)[0], exact[0])
                ours = error(ops.run(spec, given, exact[0].shape, **attributes), exact[0])
                yield record(
                    spec.name, one.name, name, ours, theirs, FLOOR[str(working).removeprefix("torch.")]
                )


def record(op: str, case: str, dtype: str, ours: float, torchs: float, floor: float) -> dict[str, Any]:
    good = ours <= 2 * torchs + floor
    return {"op": op, "case": case, "dtype": dtype, "error": ours, "torch_error": torchs, "good": good}


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
    ops: CudaOps, case: AttentionCase, dtype: torch.dtype
) -> Iterator[tuple[str, Callable[[], object], float | None]]:
    """(name, run, operations where they differ from the op's own)."""
    inputs = timing_inputs(case, dtype, ops.device)
    attributes = {"mask": "noise_causal", "scope": "temporal", **case.attributes}
    arrays: dict[str, Any] = {k: None if v is None else TensorArray(v) for k, v in inputs.items()}
    shape = (case.batch, case.frames, case.tokens, case.heads * case.head_dim)
    arrays["out"] = TensorArray(torch.empty(shape, dtype=dtype, device=ops.device))
    module, stream = ops.module, current_stream(ops)
    yield "pyengine", lambda: module.frame_window_attention(**arrays, **attributes, stream=stream), None

    def split() -> Callable[[], object] | None:
        """With a workspace, where one is of use."""
        size = module.frame_window_attention_workspace(**arrays, **attributes)
        if not size:
            return None
        workspace = TensorArray(torch.empty(size, dtype=torch.uint8, device=ops.device))
        return lambda: module.frame_window_attention(
            **arrays, workspace=workspace, **attributes, stream=stream
        )

    if run := split():
        yield "pyengine split", run, None
    if attributes["scope"] == "frame" and case.head_dim % 64 == 0 and module.has_warpgroups():
        with warpgroups(ops):  # while the caller times what it was given
            plain = lambda: module.frame_window_attention(**arrays, **attributes, stream=stream)  # noqa: E731
            yield "warpgroups", plain, None
            if run := split():
                yield "warpgroups split", run, None
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


def rows_of(op: str, case: str, dtype: str, contenders: Any, size: float, operations: float, roof: Roofline,
            seconds: float) -> Iterator[Row]:  # fmt: skip
    for name, run, own_operations in contenders:
        try:
            run()
            first = statistics.median(time_cold(run, 3))
            times = time_cold(run, max(5, min(200, int(seconds * 1e3 / max(first, 0.02)))))
        except RuntimeError as problem:
            print(f"skipped {name} on {case}: {str(problem).splitlines()[0]}", file=sys.stderr)
            continue
        milliseconds = statistics.median(times)
        work = operations if own_operations is None else own_operations
        bound = max(size / roof.copy_bytes_per_second, work / roof.matrix_bf16_per_second)
        p95 = sorted(times)[int(0.95 * (len(times) - 1))]
        yield Row(op, case, dtype, name, milliseconds, p95, size, work, 1e3 * bound / milliseconds)


def time_all(
    ops: CudaOps, roof: Roofline, seconds: float, only: str, keep_row: Callable[[Row], None]
) -> None:
    def keep(rows: Iterator[Row]) -> None:
        try:
            show(rows)
        except RuntimeError as problem:  # no memory for what a peer reads, say
            print(f"skipped the rest of a case: {str(problem).splitlines()[0]}", file=sys.stderr)

    def show(rows: Iterator[Row]) -> None:
        for row in rows:
            keep_row(row)
            rate = f"{row.bytes / row.milliseconds / 1e6:7.0f} GB/s {row.operations / row.milliseconds / 1e9:7.1f} TFLOP/s"
            print(f"{row.case:18}{row.contender:16}{row.milliseconds:9.4f} ms {rate} {100 * row.of_roof:5.1f} % of roof",
                  flush=True)  # fmt: skip

    for case in (*BENCH_CASES, *GPU_CASES):
        if only not in case.name:
            continue
        indices = replace(case, tokens=1, heads=1).make_inputs()
        operations = 4.0 * case.head_dim * seen_pairs(case, indices)
        contenders = attention_contenders(ops, case, torch.bfloat16)
        keep(rows_of("FrameWindowAttention", case.name, "bfloat16", contenders, moved_bytes(case, 2), operations, roof,
                     seconds))  # fmt: skip
    for spec in PLAIN:
        for one in spec.bench_cases:
            if only not in one.name:
                continue
            run, size = plain_run(ops, spec, one)
            operations = getattr(one, "operations", 0.0)
            keep(
                rows_of(
                    spec.name,
                    one.name,
                    "bfloat16",
                    [("pyengine", run, None)],
                    size,
                    operations,
                    roof,
                    seconds,
                )
            )


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
    checks: list[dict[str, Any]] = []
    result: dict[str, Any] = {"checks": checks}

    def keep() -> None:
        """What is known so far, since the time may run out."""
        result["seconds"] = time.perf_counter() - start
        write(options.json, result)

    for one in () if options.time_only else check(ops, options.small):
        checks.append(one)
        if options.small:
            print("case done", flush=True)  # counted by sanitize.sh
    keep()
    wrong = [c for c in checks if not c["good"]]
    print(f"{len(checks) - len(wrong)} of {len(checks)} cases within twice torch's own error")
    for c in wrong:
        print(
            f"WRONG {c['op']} {c['case']} {c['dtype']}: error {c['error']:.3g}, torch {c['torch_error']:.3g}"
        )
    if not options.check_only:
        roof = measure()
        print(f"{roof.gpu}, driver {roof.driver}: copy {roof.copy_bytes_per_second / 1e9:.0f} GB/s, "
              f"bf16 {roof.matrix_bf16_per_second / 1e12:.0f} TFLOP/s")  # fmt: skip
        timings: list[dict[str, Any]] = []
        result |= {"roofline": asdict(roof), "torch": torch.__version__, "timings": timings}

        def keep_row(row: Row) -> None:
            timings.append(asdict(row))
            keep()

        time_all(ops, roof, options.seconds, options.case, keep_row)
    keep()
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
