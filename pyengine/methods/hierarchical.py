"""Two-level generation (LVDM): key latents by a prediction model, then the intervals between them, batched. `clip` is its first half
alone: one clip of a short or a text-to-video model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pyengine.bundle.variant import Variant
from pyengine.errors import ConfigError, PromptError
from pyengine.methods.shared import Beta, Count, Frames, MethodSettings, Steps
from pyengine.schedule.call import Call, Emit, Key, Lane, Row
from pyengine.schedule.hierarchy import Behaviour, ClipStep, Decode, HierarchyConfig, ddim_timesteps
from pyengine.schedule.samplers import Prediction, Sampler, alphas_cumprod, make_sampler
from pyengine.settings import Range

__all__ = ["Hierarchical", "HierarchicalSettings"]

CONDITION_DRAW = 1 << 20  # perturbs conditions; steps draw under 0, 1, ...
GuidanceForm = Literal["original", "text"]


@dataclass(frozen=True, kw_only=True)
class HierarchicalSettings(MethodSettings):
    """The settings of the method, from a manifest or a caller. Lengths in latent frames.

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

    def schedule(self, chunks: int | None, given_chunks: int) -> Hierarchical:
        return Hierarchical.from_settings(self, chunks, given_chunks)

    def make_sampler(self) -> Sampler:
        table = alphas_cumprod(*self.betas, self.timesteps)
        return make_sampler("ddim", alpha_bar=table, eta=self.eta, predicts=self.predicts)

    @property
    def clip_latents(self) -> int | None:
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
    def given_frames(self) -> int:
        return 0

    @property
    def first_call(self) -> int:
        return 0

    @property
    def calls(self) -> int | None:
        return self.config.calls

    @property
    def places(self) -> int:
        config = self.config
        most = max([len(config.intervals_of(r)) for r in (0, 1)]) if config.interpolates else 0
        return max(config.clip_frames, most * (config.stride + 1))

    @property
    def period(self) -> int:
        return 1

    def weights(self, guidance: float) -> tuple[float, ...]:
        """Weights of the branches (conditional, null); one branch alone where guidance is neutral."""
        if self.guidance == "original":
            # The released DDIM loop compares with 1 in either form, and skips guidance there too.
            neutral = guidance == 0 or (self.config.behaviour == "released" and guidance == 1)
            return (1.0,) if neutral else (1 + guidance, -guidance)
        return (1.0,) if guidance == 1 else (guidance, 1 - guidance)

    def denoisers(self) -> tuple[tuple[Variant, int], ...]:
        sizes = {("prediction", 1)}
        if self.config.interpolates:
            sizes |= {("interpolation", len(self.config.intervals_of(r))) for r in (0, 1)}
        return tuple([(Variant.of(network), lanes) for network, lanes in sorted(sizes)])

    def others(self) -> tuple[Variant, ...]:
        return tuple([call.variant for call in self.prepare() if call.variant is not None])

    def prepare(self) -> Sequence[Call]:
        """The embedding of every timestep, projected for every ResBlock, with and without the level of the perturbation."""
        ladder = self.config.ladder
        networks = ("prediction", "interpolation") if self.config.interpolates else ("prediction",)
        labels = (self.perturbation or 0,) * len(ladder)
        return [
            Call(
                variant=Variant.of(f"{name}_embedding", steps=len(ladder)),
                values={"timesteps": ladder, "level": labels},
                writes={"projected": f"{name}_embedding"},
            )
            for name in networks
        ]

    def recache(self, index: int) -> Iterator[Call]:
        if index:
            raise PromptError("the prompt of a clip cannot change on the way; start another stream")
        return iter(())

    def switched(self, index: int) -> Hierarchical:
        return self

    def call(self, index: int) -> Call:
        step = self.config.step_at(index)
        intervals = self._wanted(step)
        if step.network == "interpolation" and not intervals:
            return Call(variant=None)
        lanes = self._lanes(step)
        emit, oldest = self._emit(step, intervals) if step.is_last else ((), None)
        conditions = step.network == "interpolation" or step.clip > 0
        label = 0 if conditions and self.perturbation is not None else -1
        return Call(
            variant=Variant.of(step.network),
            lanes=tuple(lanes),
            reads={"embedding": Key(f"{step.network}_embedding", ((label, step.index), (-1, step.index)))},
            draw=step.index,
            noised_draw=CONDITION_DRAW,
            emit=emit,
            keeps=None if oldest is None else (0, oldest),
        )

    def _wanted(self, step: ClipStep) -> range:
        """Intervals of the batch that are to be shown. A windowed decoder sees the whole round, also past the end of the video,
        so that a short video is the head of a longer one; otherwise making stops at the end.
        """
        config = self.config
        if config.made_intervals is None or (config.decode == "windowed" and config.behaviour == "intended"):
            return step.intervals
        return range(step.intervals.start, min(step.intervals.stop, config.made_intervals))

    def _lanes(self, step: ClipStep) -> list[Lane]:
        config, stride = self.config, self.config.stride
        if step.network == "interpolation":
            firsts = [interval * stride for interval in step.intervals]
            return [
                self._lane(step, range(first, first + stride + 1), (0, stride), lane * (stride + 1))
                for lane, first in enumerate(firsts)
            ]
        first_key = step.clip * (config.clip_frames - config.known)
        frames = range(first_key * stride, (first_key + config.clip_frames) * stride, stride)
        return [self._lane(step, frames, tuple(range(config.known)) if step.clip else (), 0)]

    def _lane(self, step: ClipStep, frames: range, conditions: tuple[int, ...], place: int) -> Lane:
        """The rows of one clip. Conditions keep the level of their perturbation; a network that has none sees them clean."""
        scale = self.config.timesteps
        held = 0.0 if self.perturbation is None else (self.perturbation + 1) / scale
        now, then = (step.timestep + 1) / scale, (step.timestep_next + 1) / scale
        released = self.config.behaviour == "released" and step.network == "prediction" and bool(conditions)
        rows = []
        for row, frame in enumerate(frames):
            condition = row in conditions
            fresh = ("given" if self.perturbation is None else "noised") if condition else "noise"
            rows.append(
                Row(
                    frame,
                    held if condition else now,
                    held if condition else then,
                    fresh if step.index == 0 else "carried",  # type: ignore[arg-type]
                    place + row,
                    # The published loop forgets how many frames are conditions.
                    mask=float(condition or released),
                    done=step.is_last and not condition,
                )
            )
        return Lane(tuple(rows))

    def _emit(self, step: ClipStep, wanted: range) -> tuple[tuple[Emit, ...], int | None]:
        """What the decoder can take when the last step of a clip is done, and the oldest latent that is needed from then on."""
        config, stride = self.config, self.config.stride
        if not config.interpolates:
            return (Emit(tuple(range(config.clip_frames))),), None
        if step.network == "prediction":
            return (), None
        # Of the keys that the next prediction reads.
        oldest = (step.intervals.stop - config.known + 1) * stride
        frames = range(wanted.start * stride, wanted.stop * stride + 1)
        if config.decode == "streamed":
            chunks = (frames[at : at + stride] for at in range(0, len(frames) - 1, stride))
            return tuple([Emit(tuple(chunk)) for chunk in chunks]), oldest
        if config.decode == "whole":
            last = config.rounds is not None and step.round_index == config.rounds - 1
            return (Emit(tuple(range(frames.stop))),) if last else (), 0
        first = step.round_index == 0
        shown = [*range(frames.start - (0 if first else config.left_context), frames.stop)]
        # A short last round is padded by holding its last latent, so that it fits the compiled size.
        size = self.decoder_sizes[not first]
        shown += [shown[-1]] * (size - len(shown))
        keep = slice(0 if first else config.left_context, size - 1)
        return (Emit(tuple(shown), keep),), min(oldest, frames.stop - 1 - config.left_context)

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

    def length(self, frames: int | None, frames_per_latent: float) -> int | None:
        """The length that is really made of the one asked for: less with the bug of the released loop."""
        config = self.config
        if frames is None or not config.interpolates or config.made_intervals is None:
            return frames
        latents = config.made_intervals * config.stride + (config.decode == "whole")
        return min(frames, round(latents * frames_per_latent))
