"""The state of one stream, as the driver works on it."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import is_
from typing import Any

import numpy as np

from pyengine.bundle.variant import Variant
from pyengine.errors import PlanError
from pyengine.runtime.host.decoder import Clip, Decoder
from pyengine.runtime.latents import LatentStore
from pyengine.schedule.call import Call, Emit, Key, Lane, Schedule
from pyengine.schedule.positions import PositionPolicy
from pyengine.schedule.samplers import Coefficients, Multistep, Sampler

__all__ = ["StreamState"]

MOST_SCALES = 256  # sets of coefficients that are kept


@dataclass(eq=False)
class StreamState:
    """The state of one stream: its schedule, latents, rings and decoder, and the number of its next call."""

    schedule: Schedule
    sampler: Sampler
    positions: tuple[PositionPolicy, int]
    seed: int
    weights: tuple[float, ...]
    store: LatentStore
    rings: Mapping[str, Any]
    decoder: Decoder
    call: int
    text: dict[str, np.ndarray] = field(default_factory=dict)
    switched_at: int | None = None  # the call before which a prompt last changed what stays visible
    kept: dict[str, np.ndarray] = field(default_factory=dict)
    prepared: dict[str, np.ndarray] = field(default_factory=dict)  # what was kept before the first call
    # Of each network that turns kept values into others: what it read last, and what it gave.
    made: dict[Variant, tuple[tuple[Any, ...], dict[str, np.ndarray]]] = field(default_factory=dict)
    clips: deque[Clip] = field(default_factory=deque)
    scales: dict[tuple[Any, ...], Coefficients | Multistep] = field(default_factory=dict)
    # Those to the next clip, which are looked at before they are made, and the last one.
    _calls: dict[int, Call] = field(default_factory=dict)

    @property
    def ended(self) -> bool:
        """Whether every call of the schedule has been made."""
        calls = self.schedule.calls
        return calls is not None and self.call >= calls

    def call_at(self, number: int) -> Call:
        """What the schedule says, asked once."""
        if number not in self._calls:
            self._calls = {known: call for known, call in self._calls.items() if known >= self.call - 1}
            self._calls[number] = self.schedule.call(number)
        return self._calls[number]

    def switch(self, number: int) -> None:
        """Goes on by the schedule that holds from a call on when the prompt changed before it."""
        schedule = self.schedule.switched(number)
        if schedule is not self.schedule:
            self.schedule, self.switched_at = schedule, number
            self._calls.clear()

    def calls_to_clip(self, beyond: int) -> int:
        """How many calls there are until a chunk is finished and `beyond` more are made, or the schedule ends."""
        number, last = self.call, self.schedule.calls
        while (last is None or number < last) and not self.call_at(number).emit:
            number += 1
        end = number + 1 + beyond
        return (end if last is None else min(end, last)) - self.call

    def made_by_last(self, calls: int) -> int:
        """How many chunks the last so many calls finished."""
        first = max(self.schedule.first_call, self.call - calls)
        return sum(len(self.call_at(number).emit) for number in range(first, self.call))

    def coefficients(self, call: Call, lane: Lane) -> Coefficients | Multistep:
        """Of the call's sampler or the stream's; a steady schedule repeats after a few calls, so they are kept."""
        sampler = self.sampler if call.sampler is None else call.sampler
        levels = tuple([row.level for row in lane.rows]), tuple([row.level_next for row in lane.rows])
        if (sampler, *levels) not in self.scales:
            if len(self.scales) > MOST_SCALES:
                self.scales.clear()
            self.scales[sampler, *levels] = sampler(*levels)
        return self.scales[sampler, *levels]

    def weights_of(self, call: Call) -> tuple[float, ...]:
        """Of the guidance branches."""
        return self.weights if call.weights is None else call.weights

    def value(self, name: str) -> np.ndarray:
        """A value that an earlier call kept. Raises PlanError where none has."""
        if name not in self.kept:
            raise PlanError(
                f"expected a call to have kept '{name}' but there is only {', '.join(sorted(self.kept)) or 'nothing'}; if the stream was "
                "resumed, make its snapshot again"
            )
        return self.kept[name]

    def part(self, key: Key, branch: int) -> np.ndarray:
        """What a key names for a guidance branch. Raises PlanError."""
        value = self.value(key.name)
        return value[key.places[branch]] if key.places else value

    def has_made(self, call: Call, read: tuple[Any, ...]) -> bool:
        """Whether what a call writes is there already, made of the same: records, which come first, are compared by value, arrays by
        identity.
        """
        assert call.variant is not None
        before, made = self.made.get(call.variant, ((), {}))
        if before[:1] != read[:1] or len(before) != len(read) or not all(map(is_, before[1:], read[1:])):
            return False
        return set(made) == set(call.writes.values()) and all(
            self.kept.get(name) is value for name, value in made.items()
        )

    def keep_decoded(self, emit: Emit) -> None:
        """Keeps what the decoder gave beside the frames of the last clip, once it is decoded. Raises what made the decoder fail."""
        self.clips[-1].result()
        outputs = self.decoder.outputs(len(emit.frames), tuple(emit.writes))
        self.kept |= {name: outputs[output] for output, name in emit.writes.items()}
