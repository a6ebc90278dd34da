"""The second stage of StreamingT2V: a finished video, scaled up, is noised in part and denoised again, in overlapping chunks.

Its latents are given from outside, by the stage before, as clean latents under their frame numbers; what it makes of them takes their
place. In what order chunks are denoised, `schedule.wavefront` says.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated

from pyengine.bundle.variant import Variant
from pyengine.errors import ConfigError
from pyengine.methods.shared import Count, Frames, Steps
from pyengine.schedule.call import Call, Emit, Lane, Row
from pyengine.schedule.samplers import Sampler, cfg
from pyengine.schedule.solver import Refinement, refinement
from pyengine.schedule.wavefront import Blending, ChunkStep, Wavefront
from pyengine.settings import Range

__all__ = ["Enhancement", "EnhancerSettings"]

OWN_DRAWS = 1 << 20  # numbers of noise that belong to one chunk, where chunks do not share theirs


@dataclass(frozen=True, kw_only=True)
class EnhancerSettings:
    """How finished frames are enhanced. Lengths in latent frames, of which there is one for each frame.

    steps        of the solver
    levels       the video is noised to this many of the timesteps
    guidance     scale of classifier-free guidance
    rescale      share by which the deviation of what is guided is drawn to that of the conditional prediction
    clip_frames  of a chunk; neighbours have `overlap` of them in common
    latent       height and width of a latent frame
    blending     how neighbours agree in the overlap, as in `schedule.wavefront`
    suffix       what is put behind every prompt, as in training
    """

    steps: Steps
    levels: Steps
    guidance: float
    rescale: Annotated[float, Range(0, 1)]
    clip_frames: Count
    overlap: Frames
    latent: tuple[Count, Count]
    blending: Blending = "randomized"
    suffix: str = ""

    def __post_init__(self) -> None:
        try:
            Enhancement(self, None, 0)
        except ConfigError as error:
            raise ConfigError(f"[method.enhancer] {error}") from error

    def chunks_of(self, frames: int) -> int:
        """Chunks that cover so many frames; the last one may go beyond them."""
        hop = self.clip_frames - self.overlap
        return max(1, -(-(frames - self.overlap) // hop))

    def covered(self, frames: int) -> int:
        """Frames that those chunks have together."""
        return self.chunks_of(frames) * (self.clip_frames - self.overlap) + self.overlap


@dataclass(frozen=True)
class Enhancement:
    """The schedule of one stream. `chunks` None: there is no end; `seed` of the draws of randomized blending."""

    settings: EnhancerSettings
    chunks: int | None
    seed: int
    first_call = 0
    given_frames = 0
    period = 1
    decoder_sizes = (1,)

    def __post_init__(self) -> None:
        assert self._refinement  # refuses steps that cannot be
        assert self.wave

    @cached_property
    def _refinement(self) -> Refinement:
        return refinement(self.settings.steps, self.settings.levels)

    @cached_property
    def wave(self) -> Wavefront:
        """Which chunk makes which step when."""
        own = self.settings
        steps = len(self._refinement.levels) - 1
        return Wavefront(steps, own.clip_frames, own.overlap, self.chunks, own.blending, self.seed)

    @property
    def sampler(self) -> Sampler:
        return self._refinement.sampler

    @property
    def chunk_frames(self) -> int:
        """Latents that leave together, but for the last ones."""
        return self.wave.hop

    @property
    def calls(self) -> int | None:
        return self.wave.calls

    @property
    def places(self) -> int:
        return self.wave.places

    def needs(self, index: int) -> int:
        """How many frames have to be given before a call is made."""
        return self.wave.needs(index)

    def call(self, index: int) -> Call:
        at = self.wave.step_at(index)
        if at is None:
            return Call(variant=None)
        own = self.settings.blending == "independent"
        first_draw = (at.chunk + 1) * OWN_DRAWS if own else 0
        return Call(
            variant=Variant.of("enhancer"),
            lanes=(Lane(tuple([self._row(frame, at) for frame in at.frames])),),
            values={"rescale": (self.settings.rescale,)},
            draw=first_draw + at.step + own,
            noised_draw=first_draw if own else None,
            emit=tuple([Emit((frame,)) for frame in at.leaving]),
            keeps=self._keeps(index, at),
        )

    def _row(self, frame: int, at: ChunkStep) -> Row:
        levels = self._refinement.levels
        place, target, history = self.wave.place(frame, at)
        changes = frame in at.updated
        return Row(
            frame,
            levels[at.step],
            levels[at.step + changes],
            "noised" if frame in at.fresh else "carried",
            place,
            done=frame in at.done,
            target=target,
            history=history,
        )

    def _keeps(self, index: int, at: ChunkStep) -> tuple[int, int] | None:
        """Frames that left are forgotten, and so are given ones that have been noised and that no other chunk will noise again."""
        if at.leaving:
            return 0, at.leaving.stop
        if at.step == 0 and self.settings.blending == "randomized":
            return self.wave.first_open(index + 1), at.frames.stop
        return None

    def prepare(self) -> Sequence[Call]:
        return ()

    def switched(self, index: int) -> Enhancement:
        return self

    def recache(self, index: int) -> Iterator[Call]:
        """None: a new prompt holds for the chunks that begin then."""
        return iter(())

    def weights(self, guidance: float) -> tuple[float, ...]:
        return (1.0,) if guidance == 1 else tuple(cfg(guidance).tolist())

    def denoisers(self) -> tuple[tuple[Variant, int], ...]:
        return ((Variant.of("enhancer"), 1),)

    def others(self) -> tuple[Variant, ...]:
        return ()

    def length(self, frames: int | None, frames_per_latent: float) -> int | None:
        return frames
