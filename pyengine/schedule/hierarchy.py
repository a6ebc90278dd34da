"""The schedule of two-level generation (LVDM, arXiv:2211.13221, section 3.3), as frozen records; pure Python.

A **prediction** clip makes key latents, `stride` latents apart: the first from noise, each later one behind the last `known` keys of the
one before. An **interpolation** window fills the interval between two neighbouring keys. Work goes in rounds: some prediction
clips, then all intervals whose ends now exist, as one batch. So frames leave long before the last key is predicted.

    keys after clip c     T + c (T - known)
    interval i            latents stride * i .. stride * (i + 1), its ends key i and key i + 1

One call is one run of one network: call k belongs to round k // ((clips per round + 1) * steps).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from pyengine.errors import ConfigError

__all__ = ["Behaviour", "ClipStep", "Decode", "HierarchyConfig", "ddim_timesteps"]

Network = Literal["prediction", "interpolation"]
Behaviour = Literal["intended", "released"]
Decode = Literal["windowed", "whole", "streamed"]
MOST_AT_ONCE = 4096  # latents that one call of a network takes


def ddim_timesteps(steps: int, timesteps: int = 1000) -> tuple[int, ...]:
    """Timesteps that a DDIM loop visits, the noisiest first: range(0, timesteps, timesteps // steps) + 1.

    As released, so a count that does not divide `timesteps` gives more steps than asked. `steps` = `timesteps` is ancestral
    sampling (DDPM): every timestep, 999 to 0.
    """
    if not 1 <= steps <= timesteps:
        raise ConfigError(f"steps must lie in 1..{timesteps} but is {steps}")
    if steps == timesteps:
        return tuple(range(timesteps - 1, -1, -1))
    visited = tuple(t + 1 for t in range(0, timesteps, timesteps // steps))
    if visited[-1] >= timesteps:
        raise ConfigError(
            f"{steps} steps of {timesteps} would visit timestep {visited[-1]}; choose another number"
        )
    return tuple(reversed(visited))


@dataclass(frozen=True)
class HierarchyConfig:
    """`intervals` to make, None = endless. `clip_frames` T of a prediction clip, `known` of them given by the clip before.

    `stride` 1 means that there is no second level: one clip and no more (short models, text to video).
    `decode`: "whole" in one call as published; "windowed" a round at a time, with some of the round before and the key behind it;
    "streamed" each interval once and in order, for a causal decoder that remembers.
    `behaviour` "released" keeps two bugs of the published loops: the mask of the prediction is 1 on all frames, and of the n
    prediction steps' intervals only the first n + 1 are interpolated, so the video is shorter than asked.
    """

    steps: int
    timesteps: int
    clip_frames: int
    known: int
    stride: int
    intervals: int | None
    clips_per_round: int = 1
    left_context: int = 2
    decode: Decode = "windowed"
    behaviour: Behaviour = "intended"

    def __post_init__(self) -> None:
        if self.behaviour not in get_args(Behaviour):
            raise ConfigError(
                f"behaviour must be one of {', '.join(get_args(Behaviour))} but is {self.behaviour!r}"
            )
        if self.decode not in get_args(Decode):
            raise ConfigError(f"decode must be one of {', '.join(get_args(Decode))} but is {self.decode!r}")
        if not 1 <= self.known < self.clip_frames:
            raise ConfigError(f"known must lie in 1..{self.clip_frames - 1} but is {self.known}")
        if self.clips_per_round < 1 or self.left_context < 0:
            raise ConfigError("clips_per_round must be at least 1 and left_context at least 0")
        if self.intervals is None and (self.decode == "whole" or self.behaviour == "released"):
            raise ConfigError(
                f"decode {self.decode!r} with behaviour {self.behaviour!r} needs a length; give frames or seconds"
            )
        at_once = (self.made_intervals or 0) * self.stride + 1
        if self.decode == "whole" and self.interpolates and at_once > MOST_AT_ONCE:
            raise ConfigError(
                f"decode 'whole' takes a video of at most {MOST_AT_ONCE} latents in one piece but this one has {at_once}; ask for "
                "fewer frames, or choose decode 'windowed'"
            )
        lanes = len(self.intervals_of(1)) * (self.stride + 1) if self.interpolates else 0
        if max(self.clip_frames, lanes) > MOST_AT_ONCE:
            raise ConfigError(
                f"at most {MOST_AT_ONCE} latents can be denoised together but these settings ask for {max(self.clip_frames, lanes)}; lower "
                "clip_frames, stride or clips_per_round"
            )
        if not self.interpolates and self.clips_per_round != 1:
            raise ConfigError(
                f"this model makes one clip, so clips_per_round must be 1 but is {self.clips_per_round}"
            )
        if not self.interpolates and self.intervals != 1:
            raise ConfigError(
                f"this model makes one clip of {self.clip_frames} latents; ask for no more frames than that"
            )

    @property
    def interpolates(self) -> bool:
        return self.stride > 1

    @property
    def ladder(self) -> tuple[int, ...]:
        return ddim_timesteps(self.steps, self.timesteps)

    @property
    def final_timestep(self) -> int:
        """Where the last step lands: -1 is clean. DDIM as released ends at timestep 0, whose alpha bar is not quite 1."""
        return -1 if self.steps == self.timesteps else 0

    @property
    def clips(self) -> int | None:
        """Prediction clips that the video needs."""
        if self.intervals is None:
            return None
        more = max(0, self.intervals - (self.clip_frames - 1))
        return 1 + -(-more // (self.clip_frames - self.known))

    @property
    def made_intervals(self) -> int | None:
        """Intervals that are interpolated: all, or as many as there are prediction clips."""
        return self.clips if self.behaviour == "released" and self.interpolates else self.intervals

    @property
    def calls_per_round(self) -> int:
        return (self.clips_per_round + self.interpolates) * len(self.ladder)

    @property
    def rounds(self) -> int | None:
        """Rounds until the last interval that is made."""
        if self.made_intervals is None:
            return None
        if not self.interpolates:
            return 1
        # The least number r of rounds whose clips, 1 + (r * clips per round - 1) of them after the first, reach so far.
        more = max(0, self.made_intervals - (self.clip_frames - 1))
        return -(-(1 + -(-more // (self.clip_frames - self.known))) // self.clips_per_round)

    @property
    def calls(self) -> int | None:
        return None if self.rounds is None else self.rounds * self.calls_per_round

    def intervals_of(self, round_index: int) -> range:
        """Intervals whose ends exist after a round and did not before."""
        if not self.interpolates:
            return range(1)
        fresh = self.clip_frames - self.known
        before = (
            0 if round_index == 0 else self.clip_frames - 1 + (round_index * self.clips_per_round - 1) * fresh
        )
        after = self.clip_frames - 1 + ((round_index + 1) * self.clips_per_round - 1) * fresh
        return range(before, after)

    def step_at(self, call: int) -> ClipStep:
        """What call number `call` does."""
        round_index, place = divmod(call, self.calls_per_round)
        part, index = divmod(place, len(self.ladder))
        predicts = part < self.clips_per_round
        ladder = (*self.ladder, self.final_timestep)
        return ClipStep(
            network="prediction" if predicts else "interpolation",
            clip=round_index * self.clips_per_round + part if predicts else -1,
            intervals=range(0) if predicts else self.intervals_of(round_index),
            index=index,
            timestep=ladder[index],
            timestep_next=ladder[index + 1],
            is_last=index == len(self.ladder) - 1,
            round_index=round_index,
        )


@dataclass(frozen=True)
class ClipStep:
    """One call. `clip` counts prediction clips (-1 in an interpolation), `intervals` are those of an interpolation's batch."""

    network: Network
    clip: int
    intervals: range
    index: int  # of the step within its denoising
    timestep: int
    timestep_next: int
    is_last: bool
    round_index: int
