"""How Open-Sora is sampled: PA-VDM's published settings and those it is compared with (arXiv:2410.08151, tables 1 and 2)."""

from __future__ import annotations

from typing import Any

from pyengine.bundle.bundle import Cleaning
from pyengine.errors import ConfigError
from pyengine.schedule.warp import Arithmetic

STEPS, NOISY_FRAMES, CHUNK, CHUNK_VIDEO, GUIDANCE = 30, 30, 5, 17, 7.0
FRAMES_PER_LATENT = CHUNK_VIDEO / CHUNK
CLIP, OVERLAP = 15, 5  # latent frames of an ordinary clip, and of the clip before that RN keeps
RW_CLIP, RW_STEPS = 20, 150
# Captions of the training carried a score, and were cleaned twice.
CLEANING = Cleaning(" aesthetic score: 6.5.", unless="aesthetic score:", rules="captions", passes=2)
ABLATION_FRAMES = 50  # the window of table 2


def method(
    size: tuple[int, int],
    *,
    arithmetic: Arithmetic = "released",
    steps: int = STEPS,
    noisy_frames: int = NOISY_FRAMES,
    chunk: int = CHUNK,
    context: str = "recompute",
) -> dict[str, Any]:
    """The manifest's `method`: PA-O as published unless told otherwise, and the presets by name."""
    ring = {"kind": context, "sink_frames": 0, "recent_frames": chunk}

    def warp(latents: int | None) -> dict[str, Any]:
        frames = None if latents is None else latents // CHUNK * CHUNK_VIDEO
        return {
            "rule": "rflow",
            "height": size[0],
            "width": size[1],
            "arithmetic": arithmetic,
            "frames": frames,
        }

    def progressive(steps: int, noisy: int) -> dict[str, Any]:
        if noisy % chunk or noisy < chunk or steps * chunk % noisy:
            raise ConfigError(
                f"expected a window of whole chunks of {chunk} whose number divides the {steps} steps but got {noisy} latent frames"
            )
        return {
            "name": "progressive",
            "steps": steps,
            "chunk_frames": chunk,
            "cadence": steps * chunk // noisy,
            "warp": warp(noisy + chunk),
            "opening": "rflow",
            "opening_warp": warp(chunk),
            "context": ring,
        }

    # The ring of a bundle that has one stays empty here, but it is part of its plan.
    slots = chunk if context == "ring" else 0
    clip = {
        "name": "rflow",
        "steps": steps,
        "clip_frames": CLIP,
        "frames_per_latent": FRAMES_PER_LATENT,
        "warp": warp(None),
    }
    replacement = {"name": "replacement", "overlap_frames": OVERLAP, "ring_frames": slots}
    presets: dict[str, dict[str, Any]] = {
        "pa-o": progressive(STEPS, NOISY_FRAMES),
        "rflow": clip,
        "rn": {**replacement, "steps": STEPS, "clip_frames": CLIP, "renoised": False, "warp": warp(CLIP)},
        "rw": {
            **replacement,
            "steps": RW_STEPS,
            "clip_frames": RW_CLIP,
            "renoised": True,
            "warp": warp(RW_CLIP),
        },
    }
    for count in (50, 100, 150):
        presets[f"s{count}"] = progressive(count, ABLATION_FRAMES)
    return {
        **progressive(steps, noisy_frames),
        "guidance": GUIDANCE,
        "sampler": "euler",
        "positions": "local",
        "presets": presets,
    }
