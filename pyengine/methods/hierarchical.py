"""Two-level generation (LVDM): key latents by a prediction model, then the intervals between them, batched. `clip` is its first half
alone: one clip of a short or a text-to-video model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pyengine.errors import ConfigError
from pyengine.plans.plan import Variant
from pyengine.schedule.hierarchy import HierarchyConfig
from pyengine.schedule.samplers import Prediction

__all__ = ["Hierarchical"]

GUIDANCE_FORMS = ("original", "text")


@dataclass(frozen=True)
class Hierarchical:
    """The schedule of one stream, and which compiled networks it runs.

    guidance      "original": p_cond + w (p_cond - p_null), neutral at 0, as the long-video script; "text": p_null + g (p_cond -
                  p_null), neutral at 1
    perturbation  noise level s of the conditioning latents, a timestep; None: clean ones and no label
    predicts      what the networks name, as in `samplers.ddim`: "epsilon", as all released ones, or "velocity"
    """

    config: HierarchyConfig
    guidance: str
    perturbation: int | None
    eta: float
    betas: tuple[float, float]  # first and last; linear in the square root between them
    predicts: Prediction = "epsilon"

    @classmethod
    def from_settings(
        cls, settings: Mapping[str, Any], chunks: int | None, given_chunks: int
    ) -> Hierarchical:
        del given_chunks  # such a model cannot continue given frames
        form, level = settings.get("guidance_form", "original"), settings.get("perturbation")
        if form not in GUIDANCE_FORMS:
            raise ConfigError(f"guidance_form must be one of {', '.join(GUIDANCE_FORMS)} but is {form!r}")
        levels = settings.get("levels") or settings["timesteps"]  # rows of the table that embeds them
        if level is not None and not (isinstance(level, int) and 0 <= level < levels):
            raise ConfigError(
                f"perturbation must be a timestep in 0..{levels - 1}, or none, but is {level!r}"
            )
        return cls(
            HierarchyConfig(
                steps=settings["steps"],
                timesteps=settings["timesteps"],
                clip_frames=settings["clip_frames"],
                known=settings.get("known", 1),
                stride=settings.get("stride", 1),
                intervals=1 if settings["name"] == "clip" and chunks is None else chunks,
                clips_per_round=settings.get("clips_per_round", 1),
                left_context=settings.get("left_context", 2),
                decode=settings.get("decode", "windowed"),
                behaviour=settings.get("behaviour", "intended"),
            ),
            guidance=form,
            perturbation=level,
            eta=settings["eta"],
            betas=tuple(settings["betas"]),
            predicts=settings.get("predicts", "epsilon"),
        )

    @property
    def chunk_frames(self) -> int:
        """Latents that one interval adds."""
        return self.config.stride if self.config.interpolates else self.config.clip_frames

    @property
    def first_call(self) -> int:
        return 0

    @property
    def calls(self) -> int | None:
        return self.config.calls

    @property
    def networks(self) -> tuple[str, ...]:
        return ("prediction", "interpolation") if self.config.interpolates else ("prediction",)

    def guidance_weights(self, scale: float) -> tuple[float, ...]:
        """Weights of the branches (conditional, null); one branch alone where guidance is neutral."""
        if self.guidance == "original":
            # The released DDIM loop compares with 1 in either form, and skips guidance there too.
            neutral = scale == 0 or (self.config.behaviour == "released" and scale == 1)
            return (1.0,) if neutral else (1 + scale, -scale)
        return (1.0,) if scale == 1 else (scale, 1 - scale)

    def denoiser_variants(self, branches: int) -> dict[tuple[str, int], Variant]:
        """Compiled networks by (network, clips in the batch)."""
        sizes = {("prediction", 1)}
        if self.config.interpolates:
            sizes |= {("interpolation", len(self.config.intervals_of(r))) for r in (0, 1)}
        return {
            (network, clips): Variant.of(network, rows=branches * clips) for network, clips in sorted(sizes)
        }

    def embedding_variants(self) -> dict[str, Variant]:
        steps = len(self.config.ladder)
        return {name: Variant.of(f"{name}_embedding", steps=steps) for name in self.networks}

    @property
    def decoder_sizes(self) -> tuple[int, ...]:
        """Latents in a decoder's window: of windowed decoding the first round's, and that of the others with what they see to the left."""
        config = self.config
        if not config.interpolates:
            return (config.clip_frames,)
        if config.decode == "whole":
            assert config.made_intervals is not None  # HierarchyConfig refuses others
            return (config.made_intervals * config.stride + 1,)
        if config.decode == "streamed":
            return (config.stride,)
        first, later = (len(config.intervals_of(r)) * config.stride + 1 for r in (0, 1))
        return (first, later + config.left_context)

    def shortened(self, frames: int | None, frames_per_latent: float) -> int | None:
        """The length that is really made of the one asked for: less with the bug of the released loop."""
        config = self.config
        if frames is None or not config.interpolates or config.made_intervals is None:
            return frames
        latents = config.made_intervals * config.stride + (config.decode == "whole")
        return min(frames, round(latents * frames_per_latent))

    def kept(self, size: int, is_first: bool) -> slice:
        """Latents of a decoder's window whose frames are shown: neither the context nor the key that opens the next window."""
        if not self.config.interpolates or self.config.decode != "windowed":
            return slice(0, size)
        return slice(0 if is_first else self.config.left_context, size - 1)
