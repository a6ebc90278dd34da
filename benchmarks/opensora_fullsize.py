"""The full-size export of Open-Sora v1.2 with random weights, and its memory: `python benchmarks/opensora_fullsize.py [--json FILE]`.
With `--engines sm89` also the plan of TensorRT for RTX, built without a GPU.

Checkpoints with the released names, shapes and dtypes (4.84 GB and 1.57 GB of float32) are written to a scratch folder, then
`pyengine export opensora` runs in a process of its own whose peak resident memory is measured. Needs about 13 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pyengine.build.builder import build
from pyengine.build.variants import all_variants
from pyengine.bundle.bundle import Bundle
from pyengine.export.families.opensora import STDiT3, VideoAutoencoder
from pyengine.measure.probe import machine

BLOCK = 1 << 24  # random numbers that tensors take turns in
GOAL = 1.3  # peak memory over the size of the checkpoint


def write_random(folder: Path, kind: type[nn.Module], config: dict[str, Any]) -> int:
    """A checkpoint folder, written tensor by tensor. Returns the bytes of its tensors."""
    folder.mkdir(parents=True)
    with torch.device("meta"):
        module = kind(**config)
    (folder / "config.json").write_text(json.dumps(config))
    header: dict[str, Any] = {}
    end = 0
    for name, value in module.state_dict().items():
        start, end = end, end + 4 * value.numel()
        header[name] = {"dtype": "F32", "shape": list(value.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    block = np.random.default_rng(0).standard_normal(BLOCK, np.float32)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for index, (name, value) in enumerate(module.state_dict().items()):
            file.write(_values(name, tuple(value.shape), np.roll(block, 7919 * index)).data)
    return end


def _values(name: str, shape: tuple[int, ...], block: np.ndarray) -> np.ndarray:
    size = int(np.prod(shape))
    if name == "rope.freqs":
        return (10000.0 ** (-np.arange(size) / size)).astype(np.float32)
    values = np.resize(block, size) * np.float32(0.02)
    gain = name == "scale" or (name.endswith(".weight") and "norm" in name.split(".")[-2])
    return values + np.float32(1) if gain else values


def measured(words: list[Any]) -> tuple[float, int]:
    """Runs a command. Seconds of wall time, and bytes of resident memory at its peak."""
    start = time.perf_counter()
    process = subprocess.Popen([str(word) for word in words])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(map(str, words[:6]))} ... failed")
    return time.perf_counter() - start, usage.ru_maxrss * 1024


def export(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Checkpoints, then `pyengine export` on them."""
    sizes = {}
    for name, kind, config in (
        ("stdit3", STDiT3, {"model_type": "STDiT3"}),
        ("vae", VideoAutoencoder, {"micro_frame_size": 17}),
    ):
        if not (folder / name).exists():
            write_random(folder / name, kind, config)
        sizes[name] = (folder / name / "model.safetensors").stat().st_size
    words = [sys.executable, "-m", "pyengine", "export", "opensora"]
    words += ["--checkpoint", folder / "stdit3", "--vae", folder / "vae", "--text-encoder", "t5"]
    words += ["--size", options.size, "--weights", options.weights, "--output", folder / "bundle"]
    seconds, peak = measured(words)
    bundle = {path.name: path.stat().st_size for path in (folder / "bundle").iterdir()}
    return {
        "size": options.size,
        "weights": options.weights,
        "checkpoint_bytes": sizes,
        "bundle_bytes": sum(bundle.values()),
        "files": len(bundle),
        "seconds": round(seconds, 1),
        "peak_bytes": peak,
        "peak_over_checkpoint": round(peak / sizes["stdit3"], 3),
        "goal": GOAL,
    }


def engines(folder: Path, target: str) -> dict[str, Any]:
    """Every part of the plan for a GPU that is not here, each in a process of its own."""
    bundle, cache = folder / "bundle", folder / "plans"
    parts = {}
    for index, variant in enumerate(all_variants(Bundle.load(bundle, verify=False))):
        words = [sys.executable, __file__, "--folder", folder, "--engines", target, "--part", index]
        seconds, peak = measured(words)
        made = list(cache.glob(f"*/{variant}-*/*.engine"))
        size = sum(path.stat().st_size for path in made)
        parts[str(variant)] = {
            "engines": len(made),
            "bytes": size,
            "seconds": round(seconds, 1),
            "peak_bytes": peak,
        }
        print(variant, parts[str(variant)], flush=True)
    totals = {key: sum(part[key] for part in parts.values()) for key in ("engines", "bytes", "seconds")}
    return {
        "target": target,
        **totals,
        "peak_bytes": max(part["peak_bytes"] for part in parts.values()),
        "parts": parts,
    }


def build_part(folder: Path, target: str, index: int) -> None:
    bundle = Bundle.load(folder / "bundle", verify=False)
    variant = all_variants(bundle)[index]
    options: dict[str, Any] = {"backend": "tensorrt", "target": target, "precision": "bf16", "threads": 1}
    build(bundle, variants=[variant], cache_dir=folder / "plans", **options)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers here")
    parser.add_argument(
        "--folder", type=Path, help="keep all files here, and go on from those (default: a scratch folder)"
    )
    parser.add_argument("--size", default="240x426")
    parser.add_argument("--weights", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument(
        "--engines", metavar="SM", help="also build TensorRT for RTX engines for this GPU, such as sm89"
    )
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part is not None:
        build_part(options.folder, options.engines, options.part)
        return
    known = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
    with tempfile.TemporaryDirectory(prefix="pyengine-opensora-") as scratch:
        folder = options.folder or Path(scratch)
        result = {"machine": machine()}
        result |= (
            known if (folder / "bundle" / "manifest.json").exists() and known else export(folder, options)
        )
        if options.engines:
            result["engines"] = engines(folder, options.engines)
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
