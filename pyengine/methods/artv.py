"""ART-V (arXiv:2311.18834): strict autoregression, one latent frame per diffusion run.

C = 1 and m = S of the one formula, with two calls in front of the S steps of a frame:

    anchor       keys and values of the first frame, once per stream; zeros until there is one
    references   the adapter's features of the K newest frames, once per frame
    step 1 .. S  the denoiser on two rows: the newest frame, clean, which its mask copies from, and the frame that is made

Anchor and references are clean latents of the store, never pixels. Where a stream is given frames, the first of them is the anchor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from pyengine.bundle.variant import Variant
from pyengine.errors import ConfigError
from pyengine.methods.shared import Beta, Count, Frames, MethodSettings, Steps
from pyengine.schedule.call import Call, Emit, Key, Lane, Row
from pyengine.schedule.samplers import Prediction, Sampler, alphas_cumprod, cfg, make_sampler
from pyengine.settings import Range

__all__ = ["Artv", "ArtvSettings", "Spacing", "timesteps_of"]

DENOISER, REFERENCES, ANCHOR = (Variant.of(name) for name in ("denoiser", "references", "anchor"))
BEFORE_STEPS = 2  # calls of a frame before its first step
AUGMENTED = 1 << 20  # noise on references is drawn under numbers from here on
PRESENT, MASKED, AUGMENTATION, CONDITION = "present", "masked", "augmentation", "condition"
Spacing = Literal["trailing", "leading"]


@dataclass(frozen=True, kw_only=True)
class ArtvSettings(MethodSettings):
    """The settings of the method, from a manifest or a caller. Lengths in latent frames.

    steps         S, of DDIM
    timesteps     T of the training
    chunk_frames  1: frames leave one by one
    references    K, earlier frames that a frame is conditioned on
    layers        cross-attentions of the network, which read the anchor
    features      feature maps of the adapter
    spacing       "trailing" steps begin at the noisiest timestep (Lin et al. 2023, arXiv:2305.08891), "leading" ones end at timestep 1,
                  as Stable Diffusion is configured
    eta           0 deterministic, 1 as the ancestral sampler
    betas         first and last; linear in the square root between them
    predicts      as in `samplers.ddim`
    guidance      scale of classifier-free guidance where a stream gives none; 1 = no guidance
    augmentation  timestep to which references are noised; 0 = not at all
    mask          whether the network's mask copies from the newest reference
    anchor        whether frames see the first one
    """

    name: Literal["artv"]
    steps: Steps
    timesteps: Steps
    chunk_frames: Count = 1
    references: Count
    layers: Count
    features: Count
    spacing: Spacing = "trailing"
    eta: Annotated[float, Range(0, 1)] = 0.0
    betas: tuple[Beta, Beta]
    predicts: Prediction = "epsilon"
    guidance: float = 1.0
    augmentation: Frames = 0
    mask: bool = True
    anchor: bool = True

    def __post_init__(self) -> None:
        timesteps_of(self.steps, self.timesteps, self.spacing)  # refuses steps that cannot be
        if self.chunk_frames != 1:
            raise ConfigError(
                f"[method.chunk_frames] expected 1, since frames are made one by one, but got {self.chunk_frames}"
            )
        if self.betas[0] > self.betas[1]:
            raise ConfigError(f"[method.betas] expected two numbers that rise but got {list(self.betas)}")
        if self.augmentation >= self.timesteps:
            raise ConfigError(
                f"[method.augmentation] expected a timestep from 0 to {self.timesteps - 1} but got {self.augmentation}"
            )

    def schedule(self, chunks: int | None, given_chunks: int) -> Artv:
        return Artv.from_settings(self, chunks, given_chunks)

    def make_sampler(self) -> Sampler:
        table = alphas_cumprod(*self.betas, self.timesteps)
        return make_sampler("ddim", alpha_bar=table, eta=self.eta, predicts=self.predicts)

    @property
    def start_chunks(self) -> int:
        """Most given frames that a stream can begin with: as many as a frame is conditioned on."""
        return self.references


def timesteps_of(steps: int, timesteps: int, spacing: Spacing) -> tuple[int, ...]:
    """Timesteps that the steps of a frame stand at, the noisiest first. Raises ConfigError."""
    if spacing not in get_args(Spacing):
        raise ConfigError(f"spacing must be one of {', '.join(get_args(Spacing))} but is {spacing!r}")
    if not 1 <= steps <= timesteps:
        raise ConfigError(f"steps must lie in 1..{timesteps} but is {steps}")
    if spacing == "trailing":
        visited = [round(timesteps * (steps - index) / steps) - 1 for index in range(steps)]
    else:
        visited = [index * (timesteps // steps) + 1 for index in reversed(range(steps))]
    if visited[0] >= timesteps:
        raise ConfigError(
            f"{steps} steps of {timesteps} would visit timestep {visited[0]}; choose another number"
        )
    return tuple(visited)


@dataclass(frozen=True)
class Artv:
    """The schedule of one stream. `made` frames after the `given` ones; None = endless.

    levels  of a frame before each of its steps, and 0
    """

    levels: tuple[float, ...]
    references: int
    layers: int
    features: int
    augmentation: float = 0.0  # the level to which references are noised; 0 = not at all
    augmentation_timestep: int = 0
    mask: bool = True
    anchor: bool = True
    made: int | None = None
    given: int = 0

    @classmethod
    def from_settings(cls, settings: ArtvSettings, chunks: int | None, given_chunks: int) -> Artv:
        steps = timesteps_of(settings.steps, settings.timesteps, settings.spacing)
        noised = settings.augmentation
        return cls(
            levels=(*[(step + 1) / settings.timesteps for step in steps], 0.0),
            references=settings.references,
            layers=settings.layers,
            features=settings.features,
            augmentation=(noised + 1) / settings.timesteps if noised else 0.0,
            augmentation_timestep=noised,
            mask=settings.mask,
            anchor=settings.anchor,
            made=chunks,
            given=given_chunks,
        )

    @property
    def chunk_frames(self) -> int:
        return 1

    @property
    def given_frames(self) -> int:
        return self.given

    @property
    def places(self) -> int:
        return 1

    @property
    def first_call(self) -> int:
        return 0

    @property
    def period(self) -> int:
        """Calls of a frame."""
        return BEFORE_STEPS + len(self.levels) - 1

    @property
    def calls(self) -> int | None:
        return None if self.made is None else self.made * self.period

    def weights(self, guidance: float) -> tuple[float, ...]:
        return (1.0,) if guidance == 1 else tuple(cfg(guidance).tolist())

    def denoisers(self) -> tuple[tuple[Variant, int], ...]:
        return ((DENOISER, 1),)

    def others(self) -> tuple[Variant, ...]:
        return REFERENCES, ANCHOR

    @property
    def decoder_sizes(self) -> tuple[int, ...]:
        return (1,)

    def length(self, frames: int | None, frames_per_latent: float) -> int | None:
        return frames

    def prepare(self) -> Sequence[Call]:
        return ()

    def switched(self, index: int) -> Artv:
        return self

    def recache(self, index: int) -> Iterator[Call]:
        """Nothing: what is kept of earlier frames has not seen the prompt."""
        return iter(())

    def call(self, index: int) -> Call:
        """What call number `index` does, from 0 on."""
        place, part = divmod(index, self.period)
        frame = self.given + place
        if part == 0:
            return self._anchor(frame, place)
        if part == 1:
            return self._references(frame)
        return self._step(frame, part - BEFORE_STEPS)

    def _anchor(self, frame: int, place: int) -> Call:
        """The first frame alone has none. The second one's call, or the first one's behind given frames, makes it once and for all."""
        if place > 0 and (frame != 1 or not self.anchor):
            return Call(variant=None)
        present = frame > 0 and self.anchor
        return Call(
            variant=ANCHOR,
            values={PRESENT: (int(present),)},
            latents=(0,) if present else (),
            writes={name: name for name in self._anchor_names},
        )

    def _references(self, frame: int) -> Call:
        """Frames that are not there yet are the first one again."""
        newest = range(frame - 1, frame - 1 - self.references, -1)
        return Call(
            variant=REFERENCES,
            values={
                PRESENT: (int(frame > 0),),
                MASKED: (int(self.mask),),
                AUGMENTATION: (self.augmentation_timestep,),
            },
            latents=tuple([max(0, each) for each in newest]) if frame > 0 else (),
            latents_level=self.augmentation,
            draw=AUGMENTED + frame,
            writes={name: name for name in (CONDITION, *self._feature_names)},
        )

    def _step(self, frame: int, step: int) -> Call:
        level, then = self.levels[step : step + 2]
        last = then == 0
        reference = Row(frame - 1, origin="given") if frame > 0 else Row()
        row = Row(frame, level, then, "noise" if step == 0 else "carried", place=0, done=last)
        names = (CONDITION, *self._anchor_names, *self._feature_names)
        return Call(
            variant=DENOISER,
            lanes=(Lane((reference, row)),),
            reads={name: Key(name) for name in names},
            draw=step,
            emit=(Emit((frame,)),) if last else (),
            keeps=(1, frame + 1 - self.references) if last else None,
        )

    @property
    def _anchor_names(self) -> tuple[str, ...]:
        return tuple([f"anchor.{index}" for index in range(self.layers)])

    @property
    def _feature_names(self) -> tuple[str, ...]:
        return tuple([f"feature.{index}" for index in range(self.features)])
