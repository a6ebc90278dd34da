"""Table, plot and picture of benchmarks/quality.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

Result = dict[str, Any]
FULL = "progressive"
GOALS = {"colour": 97.0, "shape": 92.0, "moving": 97.0}  # percent, at least
MOST_TELEPORTS = 0.3  # per 100 frames
MOST_DRIFT = 2.0  # points, last quarter against the first
MEASURES = {
    "colour": "colour %",
    "shape": "shape %",
    "moving": "moving %",
    "teleports": "teleports / 100 frames",
    "sharpness": "sharpness",
    "background": "background %",
    "kind": "kind, in any colour %",  # where videos have no caption
}
TITLES = {
    "progressive": "progressive (full method)",
    "no_overlap": "without overlapped context",
    "no_chunking": "without chunking",
    "replacement_noise": "replacement with noise",
    "replacement_clean": "replacement without noise",
    "hierarchical": "hierarchical (as shipped)",
    "perturbation_0": "hierarchical, perturbation level 0",
    "guidance_1": "hierarchical, unconditional guidance 1",
    "as_released": "hierarchical, released guidance and one known key",
    "shipped": "as shipped, by the engine",
    "cam": "conditional attention and anchor",
    "concat": "condition beside the latents",
    "add": "features added",
    "no_anchor": "without the anchor",
    "enhanced_independent": "enhanced, chunks independent",
    "enhanced_shared": "enhanced, shared noise",
    "enhanced_randomized": "enhanced, randomized blending",
    "artv": "ART-V (as shipped)",
    "artv_no_mask": "ART-V, mask left out",
    "artv_no_anchor": "ART-V, anchor left out",
    "artv_augmentation_50": "ART-V, references noised to timestep 50",
    "artv_guidance_1": "ART-V, guidance 1",
    "trained_without_mask": "ART-V trained without mask",
    "trained_without_noise": "ART-V trained without noise on references",
    "trained_without_anchor": "ART-V trained without anchor",
}


def write(results: list[Result], strips: dict[str, Path], folder: Path, stem: str = "quality") -> str:
    """Write <stem>.md, .json, .png and <stem>_strip.png; returns the markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    summary = summarise(results)
    (folder / f"{stem}.json").write_text(json.dumps({"summary": summary, "videos": results}, indent=1) + "\n")
    text = markdown(results, summary)
    (folder / f"{stem}.md").write_text(text)
    plot(results, folder / f"{stem}.png")
    picture(results, strips, folder / f"{stem}_strip.png")
    return text


def summarise(results: list[Result]) -> dict[str, Any]:
    """Means over videos, per variant: the whole, each quarter, calls and seconds per video."""
    summary = {}
    for variant in dict.fromkeys(result["variant"] for result in results):
        videos = [result for result in results if result["variant"] == variant]
        summary[variant] = {
            "videos": len(videos),
            "calls": float(np.mean([video["calls"] for video in videos])),
            "seconds": float(np.mean([video["seconds"] for video in videos])),
            "whole": _mean([video["whole"] for video in videos]),
            "quarters": [
                _mean(list(parts)) for parts in zip(*(video["quarters"] for video in videos), strict=True)
            ],
        }
    return summary


def _mean(rates: list[dict[str, float]]) -> dict[str, float]:
    return {name: float(np.nanmean([rate[name] for rate in rates])) for name in measures(rates[0])}


def measures(rates: dict[str, float]) -> dict[str, str]:
    """Those that were taken, with their titles."""
    return {name: title for name, title in MEASURES.items() if name in rates}


def verdicts(summary: dict[str, Any]) -> list[tuple[str, str, str, bool]]:
    """(what, goal, measured, reached) for the full method."""
    if FULL not in summary:
        return []
    whole, quarters = summary[FULL]["whole"], summary[FULL]["quarters"]
    rows = [
        (MEASURES[name], f">= {goal:g}", f"{whole[name]:.2f}", whole[name] >= goal)
        for name, goal in GOALS.items()
    ]
    rows.append(
        (
            MEASURES["teleports"],
            f"<= {MOST_TELEPORTS:g}",
            f"{whole['teleports']:.3f}",
            whole["teleports"] <= MOST_TELEPORTS,
        )
    )
    for name in GOALS:
        change = quarters[-1][name] - quarters[0][name]
        rows.append(
            (
                f"{MEASURES[name]}, last quarter less first",
                f">= -{MOST_DRIFT:g}",
                f"{change:+.2f}",
                change >= -MOST_DRIFT,
            )
        )
    return rows


def markdown(results: list[Result], summary: dict[str, Any]) -> str:
    """The report as text."""
    frames = results[0]["frames"]
    prompts = list(dict.fromkeys(result["prompt"] for result in results))
    seeds = len({result["seed"] for result in results})
    shown = measures(results[0]["whole"])
    head = "| variant | part | " + " | ".join(shown.values()) + " |\n|---|---|" + "---:|" * len(shown)
    lines = [
        "# Quality over a long video",
        "",
        f"{len(prompts)} prompts x {seeds} seeds, {frames} frames each; the reader is",
        "`export/families/shapes/reader.py`. Colour and shape: percent of frames in which every captioned",
        "one is there. Moving: percent of half-second windows in which every shape moves. Teleports: jumps,",
        "disappearances and cuts. Sharpness: 1 = edges as narrow as the renderer's, 0.5 = twice as wide.",
        "",
    ]
    if "kind" in shown:
        lines[-1:] = [
            "Kind: percent of seconds that show a shape of the captioned kind, in any colour; without a caption that of the first second.",
            "",
        ]
    rows = verdicts(summary)
    if rows:
        lines += ["## Goals, full method", "", "| | goal | measured | |", "|---|---:|---:|---|"]
        lines += [
            f"| {what} | {goal} | {measured} | {'reached' if good else 'missed'} |"
            for what, goal, measured, good in rows
        ]
        lines.append("")
    lines += ["## Per quarter", "", head]
    for variant, facts in summary.items():
        parts = {"all": facts["whole"]} | {
            f"quarter {place}": rates for place, rates in enumerate(facts["quarters"], 1)
        }
        lines += [
            _row(TITLES[variant] if part == "all" else "", part, rates) for part, rates in parts.items()
        ]
    lines += [
        "",
        "## Cost",
        "",
        "| variant | videos | calls per video | seconds per video (one thread) |",
        "|---|---:|---:|---:|",
    ]
    for variant, facts in summary.items():
        lines.append(
            f"| {TITLES[variant]} | {facts['videos']} | {facts['calls']:.0f} | {facts['seconds']:.0f} |"
        )
    lines += [
        "",
        "## Per prompt, full method, all quarters",
        "",
        head.replace("variant | part", "prompt | seed"),
    ]
    for result in results:
        if result["variant"] == FULL:
            lines.append(_row(result["prompt"], str(result["seed"]), result["whole"]))
    return "\n".join(lines) + "\n"


def _row(name: str, part: str, rates: dict[str, float]) -> str:
    return (
        f"| {name} | {part} | "
        + " | ".join(
            f"{rates[name]:.{2 if name in ('teleports', 'sharpness') else 1}f}" for name in measures(rates)
        )
        + " |"
    )


def plot(results: list[Result], path: Path) -> None:
    """Drift over time: the mean course of every measure, one line per variant."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [name for name in measures(results[0]["whole"]) if name != "background"]
    figure, axes = pyplot.subplots(1, len(shown), figsize=(4 * len(shown), 3.2), layout="constrained")
    for variant in dict.fromkeys(result["variant"] for result in results):
        videos = [result for result in results if result["variant"] == variant]
        seconds = videos[0]["frames"] / 24
        for axis, name in zip(axes, shown, strict=True):
            course = np.nanmean([[rates[name] for rates in video["course"]] for video in videos], axis=0)
            middle = (np.arange(len(course)) + 0.5) * seconds / len(course)
            axis.plot(middle, course, label=TITLES[variant], linewidth=2.2 if variant == FULL else 1.2)
    for axis, name in zip(axes, shown, strict=True):
        axis.set(title=MEASURES[name], xlabel="seconds")
        if name in GOALS:
            axis.axhline(GOALS[name], color="grey", linestyle=":", linewidth=1)
        if name in GOALS or name == "kind":
            axis.set_ylim(0, 103)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7, loc="lower left")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def picture(results: list[Result], strips: dict[str, Path], path: Path) -> None:
    """Frames of the first seed: a block per prompt, rows = variants, columns = times."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    first = [
        result
        for result in results
        if result["seed"] == results[0]["seed"] and strips[result["key"]].exists()
    ]
    chosen = list(dict.fromkeys(result["prompt"] for result in first))[:: max(1, len(first) // 20)][:3]
    rows = [result for prompt in chosen for result in first if result["prompt"] == prompt]
    if not rows:
        return
    columns = len(np.load(strips[rows[0]["key"]]))
    figure, axes = pyplot.subplots(
        len(rows),
        columns,
        figsize=(1.05 * columns + 1.6, 1.1 * len(rows) + 0.4),
        layout="constrained",
        squeeze=False,
    )
    for line, result in zip(axes, rows, strict=True):
        for axis, frame, place in zip(line, np.load(strips[result["key"]]), range(columns), strict=True):
            axis.imshow(frame)
            axis.set(xticks=[], yticks=[])
            if line is axes[0]:
                axis.set_title(f"{result['frames'] / 24 * place / (columns - 1):.1f} s", fontsize=8)
        label = (
            TITLES[result["variant"]]
            .replace(" (", "\n(")
            .replace("without ", "without\n")
            .replace("with ", "with\n")
        )
        line[0].set_ylabel(label, fontsize=6, rotation=0, ha="right", va="center")
        if result is rows[0] or result["prompt"] != rows[rows.index(result) - 1]["prompt"]:
            line[columns // 2].set_xlabel(result["prompt"], fontsize=7)
            line[columns // 2].xaxis.set_label_position("top")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
