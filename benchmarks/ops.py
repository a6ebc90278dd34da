"""Times the ops against PyTorch on this machine: `python benchmarks/ops.py [--json]`.

All contenders of a case run in turn, round after round in one process, so that a busy machine slows them
alike; read the ratios. FrameWindowAttention is compared in bfloat16 with
  eager     what a PyTorch model does: RMS norm, rotary embedding, ring concatenation, transposes, SDPA
  compiled  the same through torch.compile (--compile; it takes a minute)
  sdpa      scaled_dot_product_attention alone, on inputs that are already normalised, rotated and transposed
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import rms_norm, scaled_dot_product_attention

from pyengine import _C
from pyengine.export.ops import OPS, OpSpec
from pyengine.export.ops.frame_window_attention import visible
from pyengine.export.ops.frame_window_attention_cases import AttentionCase

Rows = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Contenders = dict[str, Callable[[], Any]]


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call."""

    median: float
    p95: float


def measure(contenders: Contenders, seconds: float) -> dict[str, Timing]:
    """Times contenders in turn for about `seconds` altogether."""
    for run in contenders.values():
        run()
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or min(map(len, samples.values())) < 15:
        for name, run in contenders.items():
            time.sleep(0.01)  # the previous contender's threads stop spinning
            run()
            for _ in range(3):
                start = time.perf_counter()
                run()
                samples[name].append(1e3 * (time.perf_counter() - start))
    return {
        name: Timing(statistics.median(values), float(np.percentile(values, 95)))
        for name, values in samples.items()
    }


def rotate(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """x [B, P, N, H, D] on all of D, interleaved; cosine and sine [P, 1, 1, D / 2]."""
    first, second = x[..., 0::2], x[..., 1::2]
    return torch.stack((first * cosine - second * sine, second * cosine + first * sine), -1).flatten(-2)


def attention(case: AttentionCase, compiled: bool) -> Contenders:
    """The op and its PyTorch equivalents on one case, in bfloat16."""
    inputs: dict[str, Any] = case.make_inputs(dtype=torch.bfloat16)
    arrays: dict[str, Any] = {
        k: None if v is None else (v.view(torch.uint16) if v.dtype == torch.bfloat16 else v).numpy()
        for k, v in inputs.items()
    }
    for gain in ("q_gain", "k_gain"):
        arrays[gain] = inputs[gain].float().numpy()
    shape = (case.batch, case.frames, case.tokens, case.heads, case.head_dim)
    arrays["out"] = np.empty((*shape[:3], case.heads * case.head_dim), np.uint16)
    attributes = {"mask": "noise_causal", "scope": "temporal", **case.attributes}
    temporal = attributes["scope"] == "temporal"

    seen = visible(
        inputs["level"], inputs["frame_index"], inputs["ring_index"], inputs["reach"], attributes["mask"]
    ).expand(case.batch, -1, -1)
    index = torch.cat((inputs["ring_index"], inputs["frame_index"]), 1)[0]  # one stream
    position = (index - index.min()).double()[:, None]
    frequency = 10000.0 ** (-torch.arange(0, case.head_dim, 2).double() / case.head_dim)
    angle = (position * frequency)[:, None, None]
    cosine, sine = angle.cos().bfloat16(), angle.sin().bfloat16()
    mask = seen[:, None, None] if temporal else None
    if not temporal:
        n = case.tokens
        mask = seen.repeat_interleave(n, 1).repeat_interleave(n, 2)[:, None]
    else:
        # [B, N, H, F, P] is 5-D; SDPA's fast path wants 4-D
        mask = seen[:, None].expand(-1, case.tokens, -1, -1).reshape(-1, 1, *seen.shape[1:]).contiguous()
    qkv, ring_key, ring_value = inputs["qkv"], inputs["ring_key"], inputs["ring_value"]
    q_gain, k_gain = inputs["q_gain"], inputs["k_gain"]

    def to_rows(x: torch.Tensor) -> torch.Tensor:
        if temporal:
            return x.permute(0, 2, 3, 1, 4).flatten(0, 1)  # [B * N, H, F, D]
        return x.flatten(1, 2).transpose(1, 2)  # [B, H, F * N, D]

    def rows() -> Rows:
        query, key, value = qkv.unbind(3)
        query = rms_norm(query, (case.head_dim,), q_gain, 1e-6)
        key = torch.cat((ring_key, rms_norm(key, (case.head_dim,), k_gain, 1e-6)), 1)
        value = torch.cat((ring_value, value), 1)
        query, key = rotate(query, cosine[case.ring :], sine[case.ring :]), rotate(key, cosine, sine)
        return to_rows(query), to_rows(key), to_rows(value)

    def sdpa(rows: Rows) -> torch.Tensor:
        return scaled_dot_product_attention(rows[0], rows[1], rows[2], attn_mask=mask)

    def eager() -> torch.Tensor:
        out = sdpa(rows())
        if temporal:
            out = out.unflatten(0, (case.batch, case.tokens)).permute(0, 3, 1, 2, 4)
        else:
            out = out.transpose(1, 2)
        return out.reshape(arrays["out"].shape)

    query, key, value = rows()
    ready = (query.contiguous(), key.contiguous(), value.contiguous())
    contenders: Contenders = {
        "pyengine": lambda: _C.frame_window_attention(**arrays, **attributes),
        "eager": eager,
        "sdpa": lambda: sdpa(ready),
    }
    if compiled:
        contenders["compiled"] = torch.compile(eager, dynamic=False)
    contenders["pyengine"]()
    ours, theirs = torch.from_numpy(arrays["out"]).view(torch.bfloat16).float(), eager().float()
    if (ours - theirs).abs().max() > 0.1:
        raise RuntimeError(f"{case}: pyengine and torch disagree by {(ours - theirs).abs().max()}")
    return contenders


def plain(spec: OpSpec, case: Any, compiled: bool) -> Contenders:
    """An op and its reference in PyTorch, what is in the working precision in bfloat16."""
    attributes = getattr(case, "attributes", {})
    exact = spec.reference(**case.make_inputs(dtype=torch.float32), **attributes)[0]
    inputs = {
        name: None if v is None else v.bfloat16() if name in spec.working else v
        for name, v in case.make_inputs(dtype=torch.float32).items()
    }
    arrays: dict[str, Any] = {
        k: None if v is None else (v.view(torch.uint16) if v.dtype == torch.bfloat16 else v).numpy()
        for k, v in inputs.items()
    }
    first = inputs[spec.inputs[0]]
    assert first is not None
    theirs = {k: v if v is None or k in spec.working else v.to(first.dtype) for k, v in inputs.items()}
    out = torch.empty(exact.shape, dtype=first.dtype)
    written = (out.view(torch.uint16) if out.dtype == torch.bfloat16 else out).numpy()
    kernel = getattr(_C, spec.kernel)
    contenders: Contenders = {
        "pyengine": lambda: kernel(**arrays, out=written, **attributes),
        "eager": lambda: spec.reference(**theirs, **attributes),
    }
    if compiled:
        run = torch.compile(spec.reference, dynamic=False)
        contenders["compiled"] = lambda: run(**theirs, **attributes)
    contenders["pyengine"]()
    if (difference := (out.float() - exact).abs().max()) > 0.1:
        raise RuntimeError(f"{case}: pyengine and torch in float32 disagree by {difference}")
    return contenders


# Ops that have more contenders than their reference.
MAKERS: dict[str, Callable[[Any, bool], Contenders]] = {"FrameWindowAttention": attention}


def contenders_of(spec: OpSpec, case: Any, compiled: bool) -> Contenders:
    maker = MAKERS.get(spec.name)
    return maker(case, compiled) if maker else plain(spec, case, compiled)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--compile", action="store_true", help="also time torch.compile")
    parser.add_argument("--seconds", type=float, default=3.0, help="measuring time per case (default 3)")
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    torch.set_num_threads(_C.threads())
    machine = f"{platform.machine()}, {_C.cpu_isa()}, {_C.threads()} threads, torch {torch.__version__}"
    results = []
    for spec in OPS:
        for case in spec.bench_cases:
            if options.case not in case.name:
                continue
            timings = measure(contenders_of(spec, case, options.compile), options.seconds)
            ours = timings["pyengine"].median
            results.append(
                {
                    "op": spec.name,
                    "case": case.name,
                    "ms": {name: {"median": t.median, "p95": t.p95} for name, t in timings.items()},
                    "times_faster_than": {n: t.median / ours for n, t in timings.items() if n != "pyengine"},
                }
            )
            if not options.json:
                columns = [
                    f"{name} {t.median:8.3f} (p95 {t.p95:8.3f}) x{t.median / ours:5.2f}"
                    for name, t in timings.items()
                ]
                print(f"{spec.name:21}{case.name:14}", "  ".join(columns), flush=True)
    if options.json:
        print(json.dumps({"machine": machine, "results": results}, indent=1))
    else:
        print(f"milliseconds per call, then how many times slower than pyengine; {machine}")


if __name__ == "__main__":
    main()
