"""StreamingT2V: chunk by chunk, each conditioned on the last frames that were decoded and on the first frame of all.

A chunk is a window whose first half generates the condition frames again, and is dropped; its second half is new (Henschel et al. 2024,
arXiv:2403.14773). The first clip is made by a text-to-video model, or is what the caller starts from. In calls:

    from text      first_text, the steps of first_denoiser, image_encoder (the anchor: frame 0)
    from frames    image_encoder
    every chunk    condition, appearance (not run while prompt and anchor are the same), the steps of denoiser

So a prompt that is set while a chunk is being made shows from the next one on, and so does one that is set when its frames are there:
`condition` is the one call that is made meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np

from pyengine.bundle.variant import Variant
from pyengine.errors import ConfigError
from pyengine.methods.enhancement import EnhancerSettings
from pyengine.methods.shared import Beta, Count, MethodSettings, Steps
from pyengine.schedule.call import Call, Emit, Key, Lane, Row
from pyengine.schedule.dpm_solver import dpm_solver, even_timesteps
from pyengine.schedule.samplers import Prediction, Sampler, alphas_cumprod, make_sampler
from pyengine.schedule.timesteps import leading_timesteps, levels_of, with_first_alpha
from pyengine.settings import Range

__all__ = ["FirstSettings", "StreamingT2V", "StreamingT2VSettings"]

# Rows that generate condition frames again are numbered from here on: their noise is their own, and they are never shown.
REGENERATED = 1 << 40
PIXELS, ANCHOR_PIXELS = "pixels", "anchor_pixels"


@dataclass(frozen=True, kw_only=True)
class FirstSettings:
    """How the first clip is made of a text.

    steps     of its sampler
    guidance  scale of classifier-free guidance; 1 = none
    sampler   "dpmsolver++", of second order, as released, or "ddim": that of the chunks
    """

    steps: Steps
    guidance: float
    sampler: Literal["dpmsolver++", "ddim"] = "dpmsolver++"

    @property
    def remembers(self) -> bool:
        """Whether the sampler reads what it kept of the step before."""
        return self.sampler != "ddim"

    def timesteps(self, of: int) -> np.ndarray:
        """Those of the steps, highest first, of so many in training. [steps] Raises ConfigError."""
        return (even_timesteps if self.remembers else leading_timesteps)(self.steps, of)


@dataclass(frozen=True, kw_only=True)
class StreamingT2VSettings(MethodSettings):
    """The settings of the method, from a manifest or a caller. Lengths in latent frames: of the release each is one frame.

    steps             of DDIM, for every chunk
    timesteps         T of the training
    eta               0 deterministic, 1 as released
    betas             first and last; linear in the square root between them
    predicts          what the networks name, as in `samplers.ddim`: epsilon, as released, or velocity
    guidance          scale of classifier-free guidance where a stream gives none; 1 = none
    clip_frames       F, frames of a window
    condition_frames  the first of them, which stand for the last frames of the chunk before: half of F, as trained
    attentions        cross-attentions whose keys and values are kept: of the denoiser, and of its extractor
    takes_frames      whether a stream may begin with frames; not where the networks read latents and there is no encoder
    first             how a first clip is made of a text; None: the bundle has no network for it, and streams begin with frames
    enhancer          of the second stage; None: the bundle has none
    enhance           whether a stream's frames go through the second stage
    """

    name: Literal["streamingt2v"]
    steps: Steps
    timesteps: Steps = 1000
    eta: Annotated[float, Range(0, 1)] = 1.0
    betas: tuple[Beta, Beta]
    predicts: Prediction = "epsilon"
    guidance: float
    clip_frames: Count
    condition_frames: Count
    attentions: tuple[Count, Count] = (16, 7)
    takes_frames: bool = True
    first: FirstSettings | None = None
    enhancer: EnhancerSettings | None = None
    enhance: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "first.steps"):
            try:
                if name == "steps":
                    leading_timesteps(self.steps, self.timesteps)
                elif self.first is not None:
                    self.first.timesteps(self.timesteps)
            except ConfigError as error:
                raise ConfigError(f"[method.{name}] {error}") from error
        if self.betas[0] > self.betas[1]:
            raise ConfigError(f"[method.betas] expected two numbers that rise but got {list(self.betas)}")
        if self.enhance and self.enhancer is None:
            raise ConfigError(
                "[method.enhance] expected false, since this model has no second stage, but got true; export it with --enhancer"
            )
        if self.clip_frames != 2 * self.condition_frames:
            raise ConfigError(
                f"[method.condition_frames] expected half of clip_frames ({self.clip_frames}) but got {self.condition_frames}"
            )
        if self.first is None and not self.takes_frames:
            raise ConfigError(
                "[method.takes_frames] expected true, since no network makes a first clip of a text, but got false"
            )

    @property
    def chunk_frames(self) -> int:
        """New frames of a chunk."""
        return self.clip_frames - self.condition_frames

    def schedule(self, chunks: int | None, given_chunks: int) -> StreamingT2V:
        return StreamingT2V(self, chunks, given_chunks > 0 or self.needs_start)

    def make_sampler(self) -> Sampler:
        table = with_first_alpha(alphas_cumprod(*self.betas, self.timesteps))
        return make_sampler("ddim", alpha_bar=table, eta=self.eta, predicts=self.predicts)

    @property
    def start_chunks(self) -> int:
        """Most given chunks that a stream can begin with: the one that the first new chunk is conditioned on."""
        return int(self.takes_frames)

    @property
    def needs_start(self) -> bool:
        return self.first is None

    @property
    def reads_pixels(self) -> bool:
        return True

    def pixels_of(self, start: np.ndarray) -> dict[str, np.ndarray]:
        """What the calls of a stream read that begins with frames, uint8 [frames, h, w, 3], as many as condition frames or more.

        The last ones are the condition of the first chunk, the very first one is the anchor. float32 [..., 3, h, w] in [-1, 1]
        """

        def pixels(frames: np.ndarray) -> np.ndarray:
            scaled = frames.astype(np.float32) / np.float32(127.5) - 1
            return np.ascontiguousarray(np.moveaxis(scaled, -1, -3))

        return {PIXELS: pixels(start[-self.condition_frames :]), ANCHOR_PIXELS: pixels(start[0])}


@dataclass(frozen=True)
class StreamingT2V:
    """The schedule of one stream. `chunks`: of `chunk_frames` new frames each, None = endless; `is_given`: it begins with frames."""

    settings: StreamingT2VSettings
    chunks: int | None
    is_given: bool

    @property
    def first_call(self) -> int:
        return 0

    @property
    def calls(self) -> int | None:
        later = self.later_chunks
        return None if later is None else self._opening + later * self._calls_per_chunk

    @property
    def later_chunks(self) -> int | None:
        """Chunks behind what the stream begins with; None = without end."""
        return None if self.chunks is None else max(0, self.chunks - self._first_frames // self.chunk_frames)

    @property
    def chunk_frames(self) -> int:
        return self.settings.chunk_frames

    @property
    def given_frames(self) -> int:
        return 0  # none is given as a latent

    @property
    def places(self) -> int:
        window, first = self.settings.clip_frames, self.settings.first
        remembers = first is not None and first.remembers and not self.is_given
        return 2 * window if remembers else window

    @property
    def period(self) -> int:
        return 1

    @property
    def decoder_sizes(self) -> tuple[int, ...]:
        return (self.chunk_frames,)

    def prepare(self) -> Sequence[Call]:
        return ()

    def switched(self, index: int) -> StreamingT2V:
        return self

    def recache(self, index: int) -> Iterator[Call]:
        return iter(())  # the next chunk's `appearance` reads the new prompt

    def weights(self, guidance: float) -> tuple[float, ...]:
        """Weights of the branches (prompt, null); one branch alone where guidance is neutral."""
        return (1.0,) if guidance == 1 else (guidance, 1 - guidance)

    def denoisers(self) -> tuple[tuple[Variant, int], ...]:
        first = () if self.is_given else ((self._first_denoiser, 1),)
        return ((Variant.of("denoiser"), 1), *first)

    def others(self) -> tuple[Variant, ...]:
        first = () if self.is_given else (Variant.of("first_text"),)
        return (*first, *map(Variant.of, ("image_encoder", "appearance")), Variant.of("condition", streams=1))

    def length(self, frames: int | None, frames_per_latent: float) -> int | None:
        return frames

    def call(self, index: int) -> Call:
        if index < self._opening:
            return self._open(index)
        chunk, step = divmod(index - self._opening, self._calls_per_chunk)
        if step == 0:
            return Call(
                Variant.of("condition", streams=1),
                reads={PIXELS: Key(PIXELS)},
                writes={"condition": "condition"},
            )
        if step == 1:
            base, extractor = self.settings.attentions
            names = [*_texts("text", base), *_texts("cam_text", extractor)]
            return Call(
                Variant.of("appearance"),
                reads={"anchor": Key("anchor")},
                writes={name: name for name in names},
            )
        return self._denoise(chunk, step - 2)

    def _open(self, index: int) -> Call:
        """The calls before the first chunk that has a condition."""
        if self.is_given:
            return Call(
                Variant.of("image_encoder"),
                reads={PIXELS: Key(ANCHOR_PIXELS)},
                writes={"anchor": "anchor"},
            )
        first = self.settings.first
        assert first is not None
        step = index - 1
        if step == first.steps:
            # The rest of the first clip is decoded here: its last frames are the condition, and frame 0 was among the others.
            rest = tuple(range(self.chunk_frames, self._first_frames))
            needed = self.later_chunks != 0
            return Call(
                Variant.of("image_encoder") if needed else None,
                reads={PIXELS: Key(PIXELS, ((0,),))} if needed else {},
                writes={"anchor": "anchor"} if needed else {},
                emit=(Emit(rest, writes={PIXELS: PIXELS}),),
                keeps=(0, self._first_frames),
            )
        names = _texts("text", self.settings.attentions[0])
        if index == 0:
            return Call(Variant.of("first_text"), writes={name: name for name in names})
        is_last = step == first.steps - 1
        frames = tuple(range(self._first_frames))
        own = (self.settings.betas, first.steps, self.settings.timesteps, self.settings.predicts)
        timesteps = first.timesteps(self.settings.timesteps)
        return Call(
            self._first_denoiser,
            (self._lane(timesteps, step, frames, 0, self._first_frames if first.remembers else None),),
            reads=_by_branch(names),
            draw=step,
            weights=self.weights(first.guidance),
            sampler=dpm_solver(*own) if first.remembers else None,
            emit=(Emit(frames[: self.chunk_frames], writes={PIXELS: PIXELS}),) if is_last else (),
        )

    def _denoise(self, chunk: int, step: int) -> Call:
        settings = self.settings
        again, new = settings.condition_frames, self._first_frames + chunk * self.chunk_frames
        frames = (
            *range(REGENERATED + chunk * again, REGENERATED + (chunk + 1) * again),
            *range(new, new + self.chunk_frames),
        )
        reads = _by_branch(_texts("text", settings.attentions[0]))
        reads |= _by_branch(_texts("cam_text", settings.attentions[1]))
        is_last = step == settings.steps - 1
        return Call(
            Variant.of("denoiser"),
            (self._lane(leading_timesteps(settings.steps, settings.timesteps), step, frames, again),),
            reads=reads | {"condition": Key("condition", ((0,),))},
            draw=step,
            emit=(Emit(frames[again:], writes={PIXELS: PIXELS}),) if is_last else (),
            keeps=(0, new + self.chunk_frames) if is_last else None,
        )

    def _lane(
        self,
        timesteps: np.ndarray,
        step: int,
        frames: Sequence[int],
        first_kept: int,
        history: int | None = None,
    ) -> Lane:
        """The rows of a window at one step; clean ones are kept from `first_kept` on. `history`: where what the sampler keeps begins."""
        steps = len(timesteps)
        ladder = levels_of(timesteps, self.settings.timesteps)
        now, then = ladder[steps - step], ladder[steps - step - 1]
        origin: Any = "carried" if step else "noise"
        is_last = step == steps - 1
        past = -1 if history is None else history
        return Lane(
            tuple(
                [
                    Row(
                        frame,
                        now,
                        then,
                        origin,
                        place,
                        done=is_last and place >= first_kept,
                        history=past if past < 0 else past + place,
                    )
                    for place, frame in enumerate(frames)
                ]
            )
        )

    @property
    def _first_frames(self) -> int:
        """Frames of the first clip; 0 where it is given, and is the caller's."""
        return 0 if self.is_given else self.settings.clip_frames

    @property
    def _opening(self) -> int:
        """Calls before the first chunk that has a condition."""
        if self.is_given:
            return 1
        assert self.settings.first is not None
        return self.settings.first.steps + 2

    @property
    def _calls_per_chunk(self) -> int:
        return self.settings.steps + 2

    @property
    def _first_denoiser(self) -> Variant:
        assert self.settings.first is not None
        return Variant.of("first_denoiser", branches=len(self.weights(self.settings.first.guidance)))


def _texts(prefix: str, count: int) -> list[str]:
    """Names of the keys and values of so many cross-attentions, as networks have them."""
    return [f"{prefix}_{kind}.{index}" for index in range(count) for kind in ("key", "value")]


def _by_branch(names: Sequence[str]) -> dict[str, Key]:
    """Kept values whose first axis is that of the branches (prompt, null)."""
    return {name: Key(name, ((0,), (1,))) for name in names}
