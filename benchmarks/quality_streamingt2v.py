"""The claims of StreamingT2V in miniature: `python benchmarks/quality_streamingt2v.py` makes long videos and reads them.

The small model in the world of `shapes`, whose reader knows the truth. Asked are, each on the same prompts and seeds:

    conditioning  CAM against condition frames beside the latents (concat) and features that are added (add): jumps at chunk borders
    anchor        with and without it: is the captioned shape, in its colour, still there in the last quarter
    enhancer      chunks that are denoised independently, with shared noise, with randomized blending: how much the shape's speed
                  jumps within the overlaps

`shipped` is the bundle through the engine; the others are sampled in PyTorch from training folders (`--training`), of which those of
concat and add are further trainings of as many steps (training/streamingt2v/train.py); those that are not there are left out. Reports
quality_streamingt2v.{md,json,png} and quality_streamingt2v_strip.png; an interrupted run goes on, as in benchmarks/quality.py.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import quality_report
from quality import Job, Video, measure, run, strip_path
from quality_lvdm import with_kinds

from pyengine.export.families.shapes.recipe import FPS
from training.shapes.reader import WINDOW, parse_caption, read

PROMPTS = (
    "a red circle bounces over a blue background",
    "a white star drifts over a purple background",
    "a large yellow square orbits over a black background",
    "a cyan triangle spins over a grey background",
    "a large green triangle bounces over a white background",
    "an orange square drifts over a cyan background",
    "a purple star orbits over a green background",
    "a large blue circle drifts over a yellow background",
)
ENGINE = "shipped"
# Folder of a stage, its kind of conditioning, and what is changed when sampling.
TRAINED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "cam": ("stream", "cam", {}),
    "concat": ("stream-concat", "concat", {}),
    "add": ("stream-add", "add", {}),
    "no_anchor": ("stream", "cam", {"anchored": False}),
    "enhanced_independent": ("stream", "cam", {"blending": "independent"}),
    "enhanced_shared": ("stream", "cam", {"blending": "shared"}),
    "enhanced_randomized": ("stream", "cam", {"blending": "randomized"}),
}
FRAMES_PER_LATENT, CHUNK, WINDOW_LATENTS = 4, 8, 16
GOALS = {"colour": 95.0, "kind": 95.0, "moving": 95.0}
MOST_DRIFT = 3.0  # points, last quarter against the first


class Source:
    """Videos of the bundle and of training folders. One per process."""

    def __init__(self, bundle: str, training: Path) -> None:
        self.bundle, self.training = bundle, training
        self._engine: Any = None
        self._parts: Any = None

    def engine(self) -> Any:
        if self._engine is None:
            import pyengine

            self._engine = pyengine.load(self.bundle, threads=1)
        return self._engine

    def identity(self, variant: str) -> Any:
        """All that a result depends on beside the job."""
        if variant == ENGINE:
            return [self.engine().bundle.digest, dict(self.engine().bundle.method), "borders"]
        stage, _, changes = TRAINED[variant]
        weights = (self.training / stage / "average.safetensors").read_bytes()
        return [hashlib.sha256(weights).hexdigest(), changes, "borders"]

    def prepare(self, variants: list[str]) -> None:
        """Build every plan once, before several processes look for them."""
        if ENGINE in variants:
            with self.engine().stream(PROMPTS[0], frames=1) as stream:
                next(stream)

    def __call__(self, job: Job) -> Video:
        start = time.perf_counter()
        if job.variant == ENGINE:
            with self.engine().stream(job.prompt, seed=job.seed, frames=job.frames) as stream:
                frames = np.concatenate(list(stream.clips()))
                return Video(frames, stream.calls_made, time.perf_counter() - start)
        frames = self._sampled(job)
        return Video(frames[: job.frames], 0, time.perf_counter() - start)

    def _sampled(self, job: Job) -> np.ndarray:
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel

        from pyengine.bundle.bundle import Bundle
        from pyengine.export.families.shapes.modules import load_modules
        from training.streamingt2v import sample

        torch.set_num_threads(1)
        stage, conditioning, changes = TRAINED[job.variant]
        if self._parts is None:
            self._parts = load_modules(Bundle.load("shapes")).decoder
        model = sample.load(self.training / stage, conditioning)
        tokens = sample.encode([job.prompt])
        latents = -(-job.frames // FRAMES_PER_LATENT)
        latents = WINDOW_LATENTS + CHUNK * -(-max(0, latents - WINDOW_LATENTS) // CHUNK)
        with sdpa_kernel(SDPBackend.MATH):
            sampling = sample.Sampling(anchored=changes.get("anchored", True))
            found = sample.videos(model, tokens, latents, sampling, job.seed)
            if "blending" in changes:
                found = sample.enhance(model, found, tokens, changes["blending"], seed=job.seed)
        return sample.frames_of(self._parts, found[0])

    def measure(self, job: Job, video: Video) -> dict[str, Any]:
        """A line of results; `borders` is what happens where chunks meet."""
        caption = parse_caption(job.prompt)
        found = with_kinds(measure(job, video, caption), video.frames, caption.shapes[0].kind)
        return {**found, "borders": borders(job.prompt, video.frames)}


def borders(prompt: str, frames: np.ndarray) -> dict[str, float]:
    """Jumps per 100 frames at the first frame of a chunk and elsewhere, and by how much the shape's speed changes from frame to frame, in
    pixels: standard deviation within the 8 frames around a border, and elsewhere.
    """
    reading = read(prompt, frames)
    index = np.arange(len(frames))
    first, hop = WINDOW_LATENTS * FRAMES_PER_LATENT, CHUNK * FRAMES_PER_LATENT
    since = (index - first) % hop
    is_border = (since == 0) & (index >= first)
    near = (np.minimum(since, hop - since) <= 4) & (index >= first - 4)
    wraps = "drifts" in prompt
    step = np.diff(reading.centre[0], axis=0)
    if wraps:
        step = np.mod(step + 32, 64) - 32
    seen = (reading.visible[0] > 0.5)[1:] & (reading.visible[0] > 0.5)[:-1]
    change = np.linalg.norm(np.diff(step, axis=0), axis=-1)
    usable = seen[1:] & seen[:-1]
    return {
        "cuts": 100 * float(reading.jump[is_border].mean()),
        "cuts_elsewhere": 100 * float(reading.jump[~is_border].mean()),
        "unsteady": _root_mean_square(change[usable & near[2:]]),
        "unsteady_elsewhere": _root_mean_square(change[usable & ~near[2:]]),
    }


def _root_mean_square(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(values**2))) if len(values) else float("nan")


def claims(results: list[dict[str, Any]]) -> str:
    """The goals and the borders, as markdown."""
    summary = quality_report.summarise(results)
    lines = ["", "## Goals", "", "| variant | | goal | measured | |", "|---|---|---:|---:|---|"]
    for variant in (ENGINE, "cam"):
        if variant not in summary:
            continue
        whole, quarters = summary[variant]["whole"], summary[variant]["quarters"]
        for name, goal in GOALS.items():
            change = quarters[-1][name] - quarters[0][name]
            for what, least, got in (
                (name, goal, whole[name]),
                (f"{name}, last quarter less first", -MOST_DRIFT, change),
            ):
                title, verdict = quality_report.TITLES[variant], "reached" if got >= least else "missed"
                lines.append(f"| {title} | {what} | >= {least:g} | {got:.1f} | {verdict} |")
    names = {
        "cuts": "jumps at borders / 100",
        "cuts_elsewhere": "elsewhere",
        "unsteady": "change of speed near borders, pixels",
        "unsteady_elsewhere": "elsewhere, pixels",
    }
    lines += [
        "",
        "## Where chunks meet",
        "",
        f"| variant | {' | '.join(names.values())} |",
        "|---|" + "---:|" * len(names),
    ]
    for variant in summary:
        videos = [result["borders"] for result in results if result["variant"] == variant]
        cells = [f"{np.nanmean([video[name] for video in videos]):.2f}" for name in names]
        lines.append(f"| {quality_report.TITLES[variant]} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Parse options, run, report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", default="shapes-streamingt2v")
    parser.add_argument(
        "--training", type=Path, default=Path("runs/streamingt2v"), help="with a folder per stage"
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="length of each video (default: 60)")
    parser.add_argument(
        "--prompts", type=int, default=len(PROMPTS), help=f"how many of the {len(PROMPTS)} prompts"
    )
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--variants", default=",".join((ENGINE, *TRAINED)), help="comma-separated")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="videos made at a time")
    parser.add_argument(
        "--work", type=Path, default=Path("build/quality_streamingt2v"), help="where results are collected"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("benchmarks/results"), help="folder of the report"
    )
    options = parser.parse_args()
    variants = options.variants.split(",")
    for variant in variants:
        if variant not in (ENGINE, *TRAINED):
            parser.error(f"expected variants out of {', '.join((ENGINE, *TRAINED))} but got {variant!r}")
    frames = round(options.seconds * FPS)
    if frames < 4 * WINDOW:
        parser.error(f"expected at least {4 * WINDOW / FPS:g} seconds but got {options.seconds:g}")
    there = [
        variant
        for variant in variants
        if variant == ENGINE or (options.training / TRAINED[variant][0] / "average.safetensors").exists()
    ]
    for variant in set(variants) - set(there):
        print(f"{variant}: no weights in {options.training / TRAINED[variant][0]}, left out", file=sys.stderr)
    jobs = [
        Job(variant, prompt, seed, frames)
        for seed in range(options.seeds)
        for prompt in PROMPTS[: options.prompts]
        for variant in there
    ]
    if not jobs:
        parser.error("there is nothing to make")
    results = run(partial(Source, options.bundle, options.training), jobs, options.work, options.processes)
    strips = {result["key"]: strip_path(options.work, result["key"]) for result in results}
    text = quality_report.write(results, strips, options.output, "quality_streamingt2v") + claims(results)
    (options.output / "quality_streamingt2v.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
