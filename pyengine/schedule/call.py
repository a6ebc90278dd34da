"""What a schedule says: plain records of what one run of one network does for one stream.

A schedule is a pure function of the number of a call. It never sees a latent, a device or another stream; the driver
(`pyengine.streaming.driver`) obeys what it returns, for one stream or for many at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, NamedTuple, Protocol

from pyengine.bundle.variant import Variant
from pyengine.schedule.samplers import Sampler

__all__ = ["Call", "Emit", "Key", "Lane", "Origin", "Row", "Schedule"]

Origin = Literal["absent", "carried", "noise", "given", "noised"]


class Row(NamedTuple):
    """One latent frame of a lane.

    frame       absolute number of the latent in its stream; -1 = absent
    level       noise level before the call, 0 = clean, 1 = noise
    level_next  after the call; equal to `level` for a condition, which is kept bit for bit
    origin      "carried": as the last call that touched its place left it; "noise": born now, from seed and frame
                alone; "given": the clean latent that the stream keeps; "noised": that latent, mixed with noise to `level`
    place       where the latent in flight lies in the stream's latent store
    target      where the updated latent goes, if not back to `place`, which then stays as it is for other calls to read; -1 = back
    history     place of what a multistep solver keeps of the row from one step to the next; -1 = nothing
    slot        ring slot that takes its keys and values in this call; -1 = none
    mask        what a network with a mask channel reads for the conditional branch: 1 = a condition
    done        the latent is clean after this call: the stream keeps a copy under its number
    renoised    the network sees it mixed with fresh noise to `level`; the latent itself stays as it is
    """

    frame: int = -1
    level: float = 0.0
    level_next: float = 0.0
    origin: Origin = "absent"
    place: int = -1
    slot: int = -1
    mask: float = 0.0
    done: bool = False
    renoised: bool = False
    target: int = -1
    history: int = -1


class Lane(NamedTuple):
    """One batch entry of a call: the rows that attend to each other, oldest first, and the frame in each ring slot
    that they may read (-1 = empty, or hidden from them). A slot that this very call writes still holds the frame before.
    """

    rows: tuple[Row, ...]
    ring: tuple[int, ...] = ()


class Emit(NamedTuple):
    """Clean latents that are decoded together once the call is done.

    keep    those whose frames are shown
    writes  further outputs of the decoder that are kept, and under which names; of one call's emits the last alone may have any
    """

    frames: tuple[int, ...]
    keep: slice = slice(None)
    writes: Mapping[str, str] = MappingProxyType({})


class Key(NamedTuple):
    """A kept output, or a part of it for each guidance branch: `places[branch]` leads into its first axes."""

    name: str
    places: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class Call:
    """One run of one component.

    variant  the component and its sizes for one stream of one lane; the driver adds branches and streams. None: nothing to run
    lanes    what a denoiser works on; none for networks that only turn one kept value, or the prompt's features, into another: such a
             network is not run again while what it reads is the same
    values   small inputs as numbers: timesteps, labels; of a denoiser one number for each lane
    reads    inputs that are outputs kept by an earlier call
    latents  clean latents that the input `latents` takes, for codecs and feature networks
    latents_level  to which those are noised first, as drawn under `draw`; 0: not at all
    writes   outputs that are kept, and under which names
    draw     number under which noise that is added on the way is drawn
    noised_draw  the same of rows that begin as "noised"; None: that of their birth
    update   whether the prediction updates the latents; False: only keys and values are written
    weights  of the guidance branches; None: the stream's
    sampler  by which the prediction updates the latents; None: the stream's
    emit     clean latents for the decoder
    keeps    (pinned, oldest): clean latents below `pinned` and from `oldest` on may be asked for later, others are forgotten
    """

    variant: Variant | None
    lanes: tuple[Lane, ...] = ()
    values: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    reads: Mapping[str, Key] = field(default_factory=dict)
    latents: tuple[int, ...] = ()
    latents_level: float = 0.0
    writes: Mapping[str, str] = field(default_factory=dict)
    draw: int = 0
    noised_draw: int | None = None
    update: bool = True
    weights: tuple[float, ...] | None = None
    sampler: Sampler | None = None
    emit: tuple[Emit, ...] = ()
    keeps: tuple[int, int] | None = None


class Schedule(Protocol):
    """All calls of one stream. Pure: the same number gives the same call."""

    @property
    def first_call(self) -> int:
        """Number of the first call; negative where something comes before the first frame is denoised."""
        ...

    @property
    def calls(self) -> int | None:
        """One past the number of the last call; None = endless."""
        ...

    @property
    def chunk_frames(self) -> int:
        """Latents that are decoded, and encoded, together."""
        ...

    @property
    def given_frames(self) -> int:
        """Given latents that stay as they are, so that callers have their frames; further ones are noised and made again."""
        ...

    @property
    def places(self) -> int:
        """Latents in flight at most."""
        ...

    @property
    def period(self) -> int:
        """Calls after which the sizes repeat; streams of one batch keep in step modulo it."""
        ...

    def call(self, index: int) -> Call: ...

    def prepare(self) -> Sequence[Call]:
        """Calls whose kept outputs later calls read, run once before the first one and after a resume."""
        ...

    def recache(self, index: int) -> Iterator[Call]:
        """Calls that rewrite the ring before call `index` when the prompt has changed. Raises PromptError, before
        anything has changed, where a prompt cannot change any more.
        """
        ...

    def switched(self, index: int) -> Schedule:
        """The schedule from call `index` on when the prompt changed before it: another where that changes what stays visible."""
        ...

    def weights(self, guidance: float) -> tuple[float, ...]:
        """Weights of the guidance branches; one branch where guidance is neutral."""
        ...

    def denoisers(self) -> tuple[tuple[Variant, int], ...]:
        """Every denoiser variant that calls name, with its number of lanes. One with a size `branches` has weights of its own."""
        ...

    def others(self) -> tuple[Variant, ...]:
        """Further variants: of embeddings, features and the like. Decoders follow from `decoder_sizes`."""
        ...

    @property
    def decoder_sizes(self) -> tuple[int, ...]:
        """Latents in what is decoded together."""
        ...

    def length(self, frames: int | None, frames_per_latent: float) -> int | None:
        """Frames that are really made when so many are asked for."""
        ...
