"""The whole training in a given time, from nothing to a bundle: `python -m training.shapes.train --minutes 25`.

Runs the commands that docs/training.md explains, one after the other, and divides the minutes among them. Meant for a GPU, where half an
hour is enough to go far; on a CPU the same command works, with hours in place of minutes. Interrupted, it goes on where it stopped as long
as the same folder is given: a phase that is done is not begun again.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import torch

# Share of the time: the denoiser needs most, but what the autoencoder blurs, no denoiser brings back.
SHARES = {"autoencoder": 0.34, "denoiser": 0.50, "decoder": 0.10}
PACKAGE = "training.shapes"
SHARD_CLIPS = 512


def run(folder: Path, phase: str, module: str, *options: object) -> None:
    """One command to its end, unless a run before this one finished it."""
    done = folder / f"{phase}.done"
    if done.exists():
        return
    print(f"--- {phase}", flush=True)
    subprocess.run([sys.executable, "-m", f"{PACKAGE}.{module}", *map(str, options)], check=True)
    done.touch()


def encode_corpus(folder: Path, clips: int, device: str) -> None:
    """The corpus by one process per core: drawing the scenes is what takes the time."""
    done = folder / "corpus.done"
    if done.exists():
        return
    print("--- corpus", flush=True)
    shards = -(-clips // SHARD_CLIPS)
    workers = min(shards, os.cpu_count() or 1)
    bounds = [shards * i // workers for i in range(workers + 1)]
    command = [sys.executable, "-m", f"{PACKAGE}.corpus", "--autoencoder", str(folder / "autoencoder")]
    command += ["--folder", str(folder / "corpus"), "--device", device]
    processes = [
        subprocess.Popen(
            [*command, "--first-shard", str(first), "--clips", str((last - first) * SHARD_CLIPS)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for first, last in pairwise(bounds)
    ]
    failed = [process.args for process in processes if process.wait() != 0]
    if failed:
        raise SystemExit(
            f"[train] expected the corpus to be written but {len(failed)} of {workers} processes failed"
        )
    done.touch()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("runs"))
    parser.add_argument("--minutes", type=float, default=25.0, help="for all phases together")
    parser.add_argument("--clips", type=int, default=32768, help="clips of 20 latents in the corpus")
    parser.add_argument("--batch", type=int, default=128 if torch.cuda.is_available() else 32)
    parser.add_argument("--output", type=Path, default=None, help="also export a bundle to this folder")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    folder = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)

    def budget(phase: str) -> tuple[object, ...]:
        minutes = arguments.minutes * SHARES[phase]
        return (
            "--folder",
            folder / phase,
            "--minutes",
            minutes,
            "--steps",
            10**9,
            "--device",
            arguments.device,
        )

    clips_per_step = max(8, arguments.batch // 4)
    run(folder, "autoencoder", "train_autoencoder", *budget("autoencoder"), "--batch", clips_per_step)
    encode_corpus(folder, arguments.clips, arguments.device)
    corpus = ("--corpus", folder / "corpus", "--batch", arguments.batch)
    run(folder, "denoiser", "train_denoiser", *budget("denoiser"), *corpus)
    frozen = ("--encoder", folder / "autoencoder", "--batch", clips_per_step)
    run(folder, "decoder", "train_autoencoder", *budget("decoder"), *frozen)
    if arguments.output is not None:
        options = [
            "--autoencoder",
            folder / "decoder",
            "--denoiser",
            folder / "denoiser",
            "--output",
            arguments.output,
        ]
        subprocess.run([sys.executable, "-m", "pyengine", "export", "shapes", *map(str, options)], check=True)


if __name__ == "__main__":
    main()
