"""Two-level generation beside the progressive method: `python benchmarks/quality_lvdm.py` makes 60-second videos and reads them.

The model `shapes-lvdm` is unconditional, as the published ones are. So every video, the progressive ones too, is
read by a caption made of its own first second: is that shape still there, in its colour, does it move, does it
jump? And second by second without a caption: is it of the same kind, whatever its colour? Ablations: perturbation
level 0 instead of the shipped one, unconditional guidance 1, and guidance 0.1 with one known key as released. Reports
quality_lvdm.{md,json,png} and quality_lvdm_strip.png; results are kept and a run that was interrupted goes on, as in
benchmarks/quality.py. `--quick`: 8 seconds, one seed, no progressive videos.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import quality_report
from quality import Job, Video, measure, run, strip_path

from pyengine.export.families.shapes.recipe import FPS
from training.shapes.describe import describe, kind_of
from training.shapes.reader import WINDOW

PROGRESSIVE = "progressive"
PROMPTS = (
    "a red circle bounces over a blue background",
    "a white star drifts over a purple background",
    "a large yellow square orbits over a black background",
    "a cyan triangle spins over a grey background",
)
VARIANTS: dict[str, dict[str, Any]] = {
    "hierarchical": {},
    "perturbation_0": {"method": {"perturbation": 0}},
    "guidance_1": {"guidance": 1.0},
    "as_released": {"guidance": 0.1, "method": {"known": 1}},
}


class EngineSource:
    """Videos of either bundle. One per process; the plans are found in the cache that `prepare` filled."""

    def __init__(self, bundles: dict[str, str], steps: int | None) -> None:
        import pyengine

        self.engines = {name: pyengine.load(bundle, threads=1) for name, bundle in bundles.items()}
        self.steps = steps

    def engine(self, variant: str) -> Any:
        return self.engines[PROGRESSIVE if variant == PROGRESSIVE else "hierarchical"]

    def settings(self, variant: str) -> dict[str, Any]:
        changes = VARIANTS.get(variant, {})
        if variant == PROGRESSIVE or self.steps is None:
            return changes
        return {**changes, "method": {**changes.get("method", {}), "steps": self.steps}}

    def identity(self, variant: str) -> Any:
        """All that a result depends on beside the job."""
        bundle = self.engine(variant).bundle
        return [bundle.digest, dict(bundle.method), self.settings(variant), "first second, kinds"]

    def prepare(self, variants: list[str]) -> None:
        """Build every plan once, before several processes look for them."""
        for variant in variants:
            with self.stream(Job(variant, PROMPTS[0], 0, 1)) as stream:
                next(stream)

    def stream(self, job: Job) -> Any:
        # The others take none: it only numbers them.
        prompt = job.prompt if job.variant == PROGRESSIVE else ""
        seed = job.seed if job.variant == PROGRESSIVE else job.seed * len(PROMPTS) + PROMPTS.index(job.prompt)
        settings = self.settings(job.variant)
        return self.engine(job.variant).stream(prompt, seed=seed, frames=job.frames, **settings)

    def __call__(self, job: Job) -> Video:
        start = time.perf_counter()
        with self.stream(job) as stream:
            frames = np.concatenate(list(stream.clips()))
            return Video(frames, stream.calls_made, time.perf_counter() - start)

    def measure(self, job: Job, video: Video) -> dict[str, Any]:
        caption = describe(video.frames[:FPS])
        return with_kinds(measure(job, video, caption), video.frames, caption.shapes[0].kind)


def with_kinds(found: dict[str, Any], frames: np.ndarray, kind: str) -> dict[str, Any]:
    """A line of results, and of each part the percent of seconds that show a shape of this kind in whatever colour."""
    starts = np.arange(0, len(frames) - FPS + 1, FPS)
    same = np.array([kind_of(frames[start:][:FPS]) == kind for start in starts])
    for part in ("quarters", "course"):
        place = (starts + FPS // 2) * len(found[part]) // len(frames)
        for index, rates in enumerate(found[part]):
            rates["kind"] = 100 * float(np.mean(same[place == index])) if index in place else float("nan")
    found["whole"]["kind"] = 100 * float(same.mean())
    return found


def main() -> int:
    """Parse options, run, report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", default="shapes-lvdm", help="the two-level model")
    parser.add_argument("--progressive", default="shapes", help="the bundle beside it")
    parser.add_argument("--seconds", type=float, default=60.0, help="length of each video (default: 60)")
    parser.add_argument(
        "--videos", type=int, default=len(PROMPTS), help="per seed and variant, at most 4 (default: 4)"
    )
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=None, help="DDIM steps (default: the bundle's)")
    parser.add_argument("--variants", default=",".join((PROGRESSIVE, *VARIANTS)), help="comma-separated")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="videos made at a time")
    parser.add_argument(
        "--work", type=Path, default=Path("build/quality_lvdm"), help="where results are collected"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("benchmarks/results"), help="folder of the report"
    )
    parser.add_argument(
        "--quick", action="store_true", help="8 seconds, two videos, 10 steps, only the two-level model"
    )
    options = parser.parse_args()
    variants = options.variants.split(",")
    if options.quick:
        options.seconds, options.videos, options.steps = 8.0, 2, 10
        variants = [variant for variant in variants if variant != PROGRESSIVE]
    for variant in variants:
        if variant not in (PROGRESSIVE, *VARIANTS):
            parser.error(f"expected variants out of {PROGRESSIVE}, {', '.join(VARIANTS)} but got {variant!r}")
    frames = round(options.seconds * FPS)
    if frames < 4 * WINDOW:
        parser.error(f"expected at least {4 * WINDOW / FPS:g} seconds but got {options.seconds:g}")
    bundles = {"hierarchical": options.bundle}
    if PROGRESSIVE in variants:
        bundles[PROGRESSIVE] = options.progressive
    jobs = [
        Job(variant, prompt, seed, frames)
        for seed in range(options.seeds)
        for prompt in PROMPTS[: options.videos]
        for variant in variants
    ]
    results = run(partial(EngineSource, bundles, options.steps), jobs, options.work, options.processes)
    strips = {result["key"]: strip_path(options.work, result["key"]) for result in results}
    print(quality_report.write(results, strips, options.output, "quality_lvdm"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
