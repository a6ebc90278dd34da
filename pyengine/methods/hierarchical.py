"""Two-level generation (LVDM): key latents by a prediction model, then the intervals between them, batched. `clip` is its first half
alone: one clip of a short or a text-to-video model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pyengine.errors import ConfigError
from pyengine.methods.shared import Count, Frames, Steps
from pyengine.plans.plan import Variant
from pyengine.schedule.hierarchy import Behaviour, Decode, HierarchyConfig, ddim_timesteps
from pyengine.schedule.samplers import Prediction
from pyengine.settings import Range

__all__ = ["Hierarchical", "HierarchicalSettings"]

GuidanceForm = Literal["original", "text"]
Beta = Annotated[float, Range(0, 0.999, above=True)]


@dataclass(frozen=True, kw_only=True)
class HierarchicalSettings:
    """What a manifest or a caller says of the method. Lengths in latent frames.

    steps            of DDIM; as many as `timesteps` are ancestral sampling
    timesteps        T of the training
    chunk_frames     latents that one interval adds: `stride`, or `clip_frames` where there is no second level
    clip_frames      of a prediction clip; `known` of them are given by the clip before
    stride           latents from one key to the next; 1 = no second level
    eta              0 deterministic, 1 as the ancestral sampler
    betas            first and last; linear in the square root between them
    levels           rows of the table that embeds perturbation levels; None = `timesteps`
    guidance, guidance_form, perturbation, predicts   as in `Hierarchical`
    clips_per_round, left_context, decode, behaviour  as in `schedule.hierarchy.HierarchyConfig`
    """

    name: Literal["hierarchical", "clip"]
    steps: Steps
    timesteps: Steps
    chunk_frames: Count
    clip_frames: Count
    known: Count = 1
    stride: Count = 1
    clips_per_round: Count = 1
    left_context: Frames = 2
    decode: Decode = "windowed"
    behaviour: Behaviour = "intended"
    eta: Annotated[float, Range(0, 1)]
    betas: tuple[Beta, Beta]
    predicts: Prediction = "epsilon"
    guidance: float
    guidance_form: GuidanceForm = "original"
    perturbation: Frames | None = None
    levels: Frames | None = None

    def __post_init__(self) -> None:
        ddim_timesteps(self.steps, self.timesteps)  # refuses steps that cannot be
        if self.betas[0] > self.betas[1]:
            raise ConfigError(f"[method.betas] expected two numbers that rise but got {list(self.betas)}")
        adds = self.stride if self.stride > 1 else self.clip_frames
        if self.chunk_frames != adds:
            raise ConfigError(
                f"[method.chunk_frames] expected {adds}, the latents that one interval adds, but got {self.chunk_frames}"
            )
        rows = self.levels or self.timesteps
        if self.perturbation is not None and self.perturbation >= rows:
            raise ConfigError(
                f"[method.perturbation] expected a timestep from 0 to {rows - 1}, or none, but got {self.perturbation}"
            )

    @property
    def start_chunks(self) -> int:
        """Most given chunks that a stream can begin with: none, such a model makes videos from noise alone."""
        return 0

    @property
    def clip_latents(self) -> int | None:
        """Latent frames of a stream without a length; None = it is endless."""
        return self.clip_frames if self.name == "clip" else None


@dataclass(frozen=True)
class Hierarchical:
    """The schedule of one stream, and which compiled networks it runs.

    guidance      "original": p_cond + w (p_cond - p_null), neutral at 0, as the long-video script; "text": p_null + g (p_cond -
                  p_null), neutral at 1
    perturbation  noise level s of the conditioning latents, a timestep; None: clean ones and no label
    predicts      what the networks name, as in `samplers.ddim`: "epsilon", as all released ones, or "velocity"
    """

    config: HierarchyConfig
    guidance: GuidanceForm
    perturbation: int | None
    eta: float
    betas: tuple[float, float]  # first and last; linear in the square root between them
    predicts: Prediction = "epsilon"

    @classmethod
    def from_settings(
        cls, settings: HierarchicalSettings, chunks: int | None, given_chunks: int
    ) -> Hierarchical:
        del given_chunks  # such a model cannot continue given frames
        return cls(
            HierarchyConfig(
                steps=settings.steps,
                timesteps=settings.timesteps,
                clip_frames=settings.clip_frames,
                known=settings.known,
                stride=settings.stride,
                intervals=1 if settings.name == "clip" and chunks is None else chunks,
                clips_per_round=settings.clips_per_round,
                left_context=settings.left_context,
                decode=settings.decode,
                behaviour=settings.behaviour,
            ),
            guidance=settings.guidance_form,
            perturbation=settings.perturbation,
            eta=settings.eta,
            betas=settings.betas,
            predicts=settings.predicts,
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
