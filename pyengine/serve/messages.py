"""What clients say on the live socket: vLLM-Omni's messages and ours, read strictly. Text frames are JSON with a `type`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from pyengine.errors import InputError

__all__ = [
    "Ack",
    "Incoming",
    "Interact",
    "Pause",
    "Ping",
    "Play",
    "Resume",
    "Seek",
    "Snapshot",
    "StartSession",
    "Stats",
    "Stop",
    "UnknownType",
    "read",
]

MOST_PROMPT = 500
Text = Annotated[str, msgspec.Meta(max_length=MOST_PROMPT)]
Name = Annotated[str, msgspec.Meta(max_length=128)]
Number = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
Format = Literal["m4s", "jpeg", "webp", "raw", "h264"]


class UnknownType(InputError):
    """A message whose type this server does not have."""


class _Way(msgspec.Struct, kw_only=True):
    """How frames are to come."""

    format: Format = "m4s"
    quality: Annotated[int, msgspec.Meta(ge=1, le=100)] = 90
    lead_frames: Annotated[int, msgspec.Meta(ge=1, le=1000)] | None = None
    pace: Literal["realtime", "fastest"] = "realtime"
    delivery: Literal["lossless", "latest"] = "lossless"
    stats_interval_s: Annotated[float, msgspec.Meta(ge=0.2, le=3600)] | None = None
    token: Name | None = None


class StartSession(_Way, kw_only=True, tag="session.start", forbid_unknown_fields=True):
    """The fields that are None by default are vLLM-Omni's; those that cannot be honoured are named in the answer."""

    prompt: Text = ""
    model: Name | None = None
    seed: int | None = None
    num_frames: Annotated[int, msgspec.Meta(ge=1, le=2**53)] | None = None
    seconds: Annotated[float, msgspec.Meta(gt=0, le=10**9)] | None = None
    fps: float | None = None
    size: Name | None = None
    width: int | None = None
    height: int | None = None
    guidance_scale: float | None = None
    num_inference_steps: int | None = None
    image_reference: Any = None
    sampling_params: dict[str, Any] | None = None
    extra_params: dict[str, Any] | None = None
    record: bool | None = None


class Resume(_Way, kw_only=True, tag="session.resume", forbid_unknown_fields=True):
    session_id: Name
    resume_token: Name
    from_frame: Number | None = None


class _Event(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    prompt: Text
    multi_modal_data: Any = None


class _Interaction(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    event: _Event
    event_id: Annotated[str, msgspec.Meta(min_length=1, max_length=128)] | None = None
    transition_chunks: Annotated[int, msgspec.Meta(ge=0)] | None = None


class Interact(msgspec.Struct, kw_only=True, tag="session.interaction", forbid_unknown_fields=True):
    interaction: _Interaction


class Ack(msgspec.Struct, kw_only=True, tag="session.ack", forbid_unknown_fields=True):
    frame: Number


class Pause(msgspec.Struct, tag="session.pause", forbid_unknown_fields=True):
    pass


class Play(msgspec.Struct, tag="session.play", forbid_unknown_fields=True):
    pass


class Seek(msgspec.Struct, kw_only=True, tag="session.seek", forbid_unknown_fields=True):
    frame: Number | None = None
    seconds: Annotated[float, msgspec.Meta(ge=0, le=10**9)] | None = None
    mode: Literal["view", "branch"] = "view"


class Snapshot(msgspec.Struct, kw_only=True, tag="session.snapshot", forbid_unknown_fields=True):
    store: bool = False


class Stats(msgspec.Struct, tag="session.stats", forbid_unknown_fields=True):
    pass


class Stop(msgspec.Struct, tag="session.stop", forbid_unknown_fields=True):
    pass


class Ping(msgspec.Struct, tag="session.ping", forbid_unknown_fields=True):
    pass


Incoming = StartSession | Resume | Interact | Ack | Pause | Play | Seek | Snapshot | Stats | Stop | Ping
_DECODER = msgspec.json.Decoder(Incoming)


class _Typed(msgspec.Struct):
    type: str


_TYPED = msgspec.json.Decoder(_Typed)
TYPES = {kind.__struct_config__.tag for kind in Incoming.__args__}


def read(text: str | bytes) -> Incoming:
    """Raises UnknownType, or InputError for a message that is malformed."""
    try:
        kind = _TYPED.decode(text).type
        if kind not in TYPES:
            raise UnknownType(f"expected a type of {', '.join(sorted(TYPES))} but got {kind[:60]!r}")
        return _DECODER.decode(text)
    except (msgspec.DecodeError, RecursionError, UnicodeError) as error:
        raise InputError(f"the message cannot be read ({error})") from error
