"""The table of a run of run.sh: `python benchmarks/gpu/report.py FILE.json` prints it again."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

PEERS = ("torch_eager", "torch_compile")
NETWORKS = {
    "wide": "1152-wide network, two guidance branches",
    "opensora": "STDiT3, a full window of PA-VDM at 240x426, prompt and null text, blocks in pairs",
}
GOALS = {"temporal": 0.70, "faster": 1.5, "gaps": 0.03, "first": 1.0}


def table(record: dict[str, Any]) -> str:
    """Markdown: what was checked, what was measured beside its bound and goal, what was skipped and why."""
    results = {name: step["result"] for name, step in record["steps"].items() if step["result"]}
    lines = [*_head(record, results), "", *_checks(record, results), ""]
    networks = [_networks(kind, title, results) for kind, title in NETWORKS.items()]
    for part in (_ops(results), _streams(results), *networks, _steps(record)):
        lines += [*part, ""] if part else []
    return "\n".join(lines).rstrip() + "\n"


def _head(record: dict[str, Any], results: dict[str, Any]) -> list[str]:
    gpu, found = record["gpu"], results.get("roofline")
    capability = ".".join(map(str, gpu["capability"]))
    driver = f"driver {found['driver']}" if found else f"driver for CUDA {gpu['driver_cuda']}"
    lines = [
        f"# {gpu['name']}",
        "",
        f"Compute capability {capability}, {driver}. "
        + ", ".join(f"{name} {version}" for name, version in record["versions"].items())
        + f". `benchmarks/gpu/run.sh`, {record['seconds']:.0f} s.",
    ]
    if found:
        copy, matrix = found["copy_bytes_per_second"] / 1e9, found["matrix_bf16_per_second"] / 1e12
        lines += [
            "",
            f"Measured roofline: copy {copy:.0f} GB/s (read plus written), bf16 products {matrix:.0f} TFLOP/s.",
        ]
    return lines


def _checks(record: dict[str, Any], results: dict[str, Any]) -> list[str]:
    lines = ["| checked | result |", "|---|---|"]
    if "ops" in results:
        checks = results["ops"]["checks"]
        good = sum(check["good"] for check in checks)
        lines.append(
            f"| op cases against float64 | {good} of {len(checks)} within twice PyTorch's own error |"
        )
    for name in ("kernel tests", "sanitizer"):
        if name in record["steps"]:
            step = record["steps"][name]
            lines.append(f"| {name} | {step['status']}{': ' + step['reason'] if step['reason'] else ''} |")
    for name, result in results.items():
        for stream in result["streams"] if name.startswith("check:") else ():
            what = f"`shapes` on {stream['backend']}, {stream['precision']}, {stream['choice']}"
            if "failed" in stream:
                lines.append(f"| {what} | failed: {stream['failed']} |")
                continue
            lines.append(
                f"| {what} | {'good' if stream['good'] else 'WRONG'}: error {stream['error']:.3f} levels, allowed "
                f"{stream['allowed']:.3f}; {len(stream['graphs'])} graphs; resumed "
                f"{'to the bit' if stream['resumes'] else 'DIFFERENTLY'} |"
            )
    return lines


def _ops(results: dict[str, Any]) -> list[str]:
    timings = results.get("op timings", {}).get("timings", ())
    if not timings:
        return []
    lines = ["| op, bf16, cold L2 | by | ms | GB/s | TFLOP/s | of roof |", "|---|---|---:|---:|---:|---:|"]
    for row in timings:
        seconds = row["milliseconds"] / 1e3
        lines.append(
            f"| {row['case']} | {row['contender']} | {row['milliseconds']:.4f} | {row['bytes'] / seconds / 1e9:.0f} | "
            f"{row['operations'] / seconds / 1e12:.1f} | {100 * row['of_roof']:.0f} % |"
        )
    ours = [
        row["of_roof"]
        for row in timings
        if row["contender"] == "pyengine" and row["case"].startswith("temporal")
    ]
    if ours:
        lines += ["", f"Scope temporal: {100 * min(ours):.0f} to {100 * max(ours):.0f} % of the roof; "
                      f"goal {100 * GOALS['temporal']:.0f} %."]  # fmt: skip
    return lines


def _streams(results: dict[str, Any]) -> list[str]:
    benches = {name[6:]: result for name, result in results.items() if name.startswith("bench:")}
    if not benches:
        return []
    lines = [
        "| `shapes` stream, batch 1 | frames/s | ms per call | GPU idle in a stream | network alone, ms | its bound, ms | "
        "gaps in it |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, result in benches.items():
        alone, bound = result.get("network_ms"), result.get("network_bound")
        cells = [
            f"{result['frames_per_second']:.0f}",
            f"{result['call_ms']:.3f}",
            _share(result.get("stream_on_gpu")),
            "" if alone is None else f"{alone:.3f}",
            "" if bound is None else f"{bound['ms']:.4f}",
            _share(result.get("network_on_gpu")),
        ]
        lines.append(f"| {name}, {result['precision']} | " + " | ".join(cells) + " |")
    rates = {name: result["frames_per_second"] for name, result in benches.items()}
    lines += [
        "",
        *_compared(rates, "frames"),
    ]
    lines += [
        f"First frame on {name[6:]} from a cached plan: {result['warm_seconds']:.2f} s, "
        f"{result['warm_after_import_seconds']:.2f} s without imports of the benchmark; goal {GOALS['first']:.0f} s. Without a "
        + (f"plan {result['cold_seconds']:.2f} s." if "cold_seconds" in result else "plan: not measured.")
        for name, result in results.items()
        if name.startswith("first:")
    ]
    lines.append(f"Goal for gaps in a call: below {100 * GOALS['gaps']:.0f} %.")
    return lines


def _networks(kind: str, title: str, results: dict[str, Any]) -> list[str]:
    """Calls of one network, by network.py."""
    benches = {n.removeprefix(f"{kind}:"): r for n, r in results.items() if n.startswith(f"{kind}:")}
    if not benches:
        return []
    lines = [
        f"| {title} | blocks | ms | TFLOP/s | of the matrix rate | its bound, ms | of roof | gaps in it | error (allowed) |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, result in benches.items():
        cells = [
            f"{result['depth']}",
            f"{result['ms']:.3f}",
            f"{result['operations'] / result['ms'] / 1e9:.1f}",
            f"{100 * result['of_matrix_rate']:.0f} %" if "of_matrix_rate" in result else "",
            f"{result['bound_ms']:.3f}" if "bound_ms" in result else "",
            f"{100 * result['of_roof']:.0f} %" if "of_roof" in result else "",
            _share(result["on_gpu"]),
            f"{result['error']:.2g} ({result['allowed']:.2g}){'' if result['good'] else ' WRONG'}",
        ]
        lines.append(f"| {name}, {result['precision']} | " + " | ".join(cells) + " |")
    rates = {name: 1 / result["ms"] for name, result in benches.items()}
    return [*lines, "", *_compared(rates, "calls")]


def _compared(rates: dict[str, float], what: str) -> list[str]:
    """The best of ours beside the best peer, and which peer is missing."""
    peers = {name: rate for name, rate in rates.items() if name in PEERS}
    ours = {name: rate for name, rate in rates.items() if name not in (*PEERS, "torch")}
    # Nothing to ship was there.
    ours = ours or {name: rate for name, rate in rates.items() if name == "torch"}
    if not peers or not ours:
        return []
    best, peer = max(ours, key=lambda n: ours[n]), max(peers, key=lambda n: peers[n])
    absent = "".join(f" Without {name}, which was not measured." for name in PEERS if name not in peers)
    return [
        f"{best} makes {ours[best] / peers[peer]:.2f}x the {what} of {peer}; goal {GOALS['faster']}x of the best peer.{absent}"
    ]


def _share(found: dict[str, float] | None) -> str:
    return "" if found is None else f"{100 * found['gap_share']:.1f} %"


def _steps(record: dict[str, Any]) -> list[str]:
    lines = ["| step | | s | |", "|---|---|---:|---|"]
    lines += [
        f"| {name} | {step['status']} | {step['seconds']:.0f} | {step['reason']} |"
        for name, step in record["steps"].items()
    ]
    return lines


if __name__ == "__main__":
    print(table(json.loads(Path(sys.argv[1]).read_text())), end="")
