"""StreamingT2V (Henschel et al. 2024, arXiv:2403.14773): long video in chunks of 8 new frames, each conditioned on the 8 before and on one
anchor frame, and a second stage that enhances the whole.

    build(config)      the networks of a mapping of sizes, by the names of the checkpoint
    build()            those of the release

Naming of the checkpoint that misleads: `base_model` is the denoiser, and `unet` extracts features of the condition frames.
"""

from __future__ import annotations

from .networks import build

__all__ = ["build"]
