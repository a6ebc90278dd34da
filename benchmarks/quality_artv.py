"""Videos frame by frame: `python benchmarks/quality_artv.py` makes 60-second videos with `shapes-artv` and reads them by their captions.

Beside the model as shipped it runs what the paper says ART-V owes to: the mask (by the same network, whose prediction alone was trained as
well; and, with `--trained DIR`, by networks that were trained without mask, without noise on references, without anchor, by
`training.artv.train --without`), the anchor, and noise on references at inference. Another video has four prompts, 15 seconds each, every
segment read by its own caption. Reports quality_artv.{md,json,png} and quality_artv_strip.png; results are kept and a run that was
interrupted goes on, as in benchmarks/quality.py. `--quick`: 8 seconds, two videos.
"""

from __future__ import annotations

import argparse
import json
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
from training.shapes.reader import WINDOW, parse_caption, read

PROMPTS = (
    "a red circle bounces over a blue background",
    "a white star drifts over a purple background",
    "a large yellow square orbits over a black background",
    "a cyan triangle spins over a grey background",
)
SEGMENTS = 4  # prompts of the video whose prompt changes
# What a stream of the shipped network changes.
SETTINGS: dict[str, dict[str, Any]] = {
    "artv": {},
    "artv_no_mask": {"mask": False},
    "artv_no_anchor": {"anchor": False},
    "artv_augmentation_50": {"augmentation": 50},
    "artv_guidance_1": {"guidance": 1.0},
}
TRAINED = ("trained_without_mask", "trained_without_noise", "trained_without_anchor")


class EngineSource:
    """Videos of each variant's bundle. One per process; the plans are found in the cache that `prepare` filled."""

    def __init__(self, bundles: dict[str, str], steps: int | None) -> None:
        import pyengine

        loaded = {folder: pyengine.load(folder, threads=1) for folder in set(bundles.values())}
        self.engines = {variant: loaded[folder] for variant, folder in bundles.items()}
        self.steps = steps

    def settings(self, variant: str) -> dict[str, Any]:
        changes = dict(SETTINGS.get(variant, {}))
        if variant == "trained_without_mask":
            changes["mask"] = False
        if variant == "trained_without_anchor":
            changes["anchor"] = False
        options = {"guidance": changes.pop("guidance")} if "guidance" in changes else {}
        if self.steps is not None:
            changes["steps"] = self.steps
        return {**options, "method": changes}

    def identity(self, variant: str) -> Any:
        """All that a result depends on beside the job."""
        bundle = self.engines[variant].bundle
        return [bundle.digest, dict(bundle.method), self.settings(variant), "kinds, first second"]

    def prepare(self, variants: list[str]) -> None:
        """Build every plan once, before several processes look for them."""
        for variant in variants:
            with self.stream(Job(variant, PROMPTS[0], 0, 1)) as stream:
                next(stream)

    def stream(self, job: Job) -> Any:
        settings = self.settings(job.variant)
        return self.engines[job.variant].stream(job.prompt, seed=job.seed, frames=job.frames, **settings)

    def __call__(self, job: Job) -> Video:
        start = time.perf_counter()
        with self.stream(job) as stream:
            frames = np.concatenate(list(stream.clips()))
            return Video(frames, stream.calls_made, time.perf_counter() - start)

    def measure(self, job: Job, video: Video) -> dict[str, Any]:
        """By the caption; the kind second by second, whatever its colour; and whether it is what the first second showed (`kept`)."""
        found = measure(job, video, job.prompt)
        caption = parse_caption(job.prompt)
        starts = np.arange(0, job.frames - FPS + 1, FPS)
        same = np.array([kind_of(video.frames[start:][:FPS]) == caption.shapes[0].kind for start in starts])
        for part in ("quarters", "course"):
            place = (starts + FPS // 2) * len(found[part]) // job.frames
            for index, rates in enumerate(found[part]):
                rates["kind"] = 100 * float(np.mean(same[place == index])) if index in place else float("nan")
        found["whole"]["kind"] = 100 * float(same.mean())
        kept = read(describe(video.frames[:FPS]), video.frames)
        found["kept"] = {"colour": kept.rates()["colour"], "shape": kept.rates()["shape"]}
        return found


def segments(bundle: str, seed: int, seconds: float) -> dict[str, Any]:
    """A video whose prompt changes: each segment read by its own caption, a second after the change as well as from it on."""
    import pyengine

    frames = round(seconds * FPS)
    prompts = PROMPTS[seed % SEGMENTS :] + PROMPTS[: seed % SEGMENTS]
    with pyengine.load(bundle, threads=1).stream(prompts[0], seed=seed, frames=SEGMENTS * frames) as stream:
        made = []
        for prompt in prompts:
            if prompt != stream.prompt:
                stream.prompt = prompt
            made.append(np.stack([next(stream) for _ in range(frames)]))
    found = []
    for prompt, part in zip(prompts, made, strict=True):
        reading = read(parse_caption(prompt), part)
        found.append({"prompt": prompt, "from_the_change": reading.rates(), "later": reading.rates(FPS)})
    return {"seed": seed, "segments": found}


def table(made: list[dict[str, Any]]) -> str:
    """Markdown of the videos whose prompt changes."""
    lines = [
        "",
        "## Four prompts, one after the other",
        "",
        "Each segment read by its own caption, from one second after its prompt was set.",
        "",
        "| video | segment | colour % | shape % | moving % | background % |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for video in made:
        for part in video["segments"]:
            rates = part["later"]
            cells = " | ".join(f"{rates[name]:.1f}" for name in ("colour", "shape", "moving", "background"))
            lines.append(f"| {video['seed']} | {part['prompt']} | {cells} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Parse options, run, report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", default="shapes-artv", help="a bundled name or a folder")
    parser.add_argument(
        "--trained",
        type=Path,
        default=None,
        help=f"folder with bundles {', '.join(TRAINED)}, of networks trained so",
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="length of each video (default: 60)")
    parser.add_argument(
        "--videos", type=int, default=len(PROMPTS), help="per seed and variant, at most 4 (default: 4)"
    )
    parser.add_argument("--seeds", type=int, default=2, help="videos per prompt and variant (default: 2)")
    parser.add_argument("--steps", type=int, default=None, help="of DDIM (default: the bundle's)")
    parser.add_argument("--variants", default=None, help="comma-separated (default: all that there are)")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="videos made at a time")
    parser.add_argument(
        "--work", type=Path, default=Path("build/quality_artv"), help="where results are collected"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("benchmarks/results"), help="folder of the report"
    )
    parser.add_argument("--quick", action="store_true", help="8 seconds, two videos of one seed")
    options = parser.parse_args()
    if options.quick:
        options.seconds, options.videos, options.seeds = 8.0, 2, 1
    bundles = dict.fromkeys(SETTINGS, options.bundle)
    if options.trained is not None:
        bundles |= {
            name: str(options.trained / name) for name in TRAINED if (options.trained / name).is_dir()
        }
    variants = options.variants.split(",") if options.variants else list(bundles)
    for variant in variants:
        if variant not in bundles:
            parser.error(f"expected variants out of {', '.join(bundles)} but got {variant!r}")
    frames = round(options.seconds * FPS)
    if frames < 4 * WINDOW:
        parser.error(f"expected at least {4 * WINDOW / FPS:g} seconds but got {options.seconds:g}")
    jobs = [
        Job(variant, prompt, seed, frames)
        for seed in range(options.seeds)
        for prompt in PROMPTS[: options.videos]
        for variant in variants
    ]
    source = partial(EngineSource, {variant: bundles[variant] for variant in variants}, options.steps)
    results = run(source, jobs, options.work, options.processes)
    changed = [
        segments(options.bundle, seed, options.seconds / SEGMENTS)
        for seed in range(1 if options.quick else 2)
    ]
    strips = {result["key"]: strip_path(options.work, result["key"]) for result in results}
    text = quality_report.write(results, strips, options.output, "quality_artv") + table(changed)
    (options.output / "quality_artv.md").write_text(text)
    path = options.output / "quality_artv.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"segments": changed}, indent=1) + "\n")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
