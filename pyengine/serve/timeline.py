"""Timeline: all that a session depends on, in the store. An event log written ahead, and snapshots to begin from.

Every entry of the log says at which call of the stream it took effect, so a replay does at the same calls what was done then, and gives
the same frames to the bit. An entry is in the store before the call that it changes is made. A torn last line, of a process that was killed
while writing, changed nothing and is passed over.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from pyengine.serve.store import Store

__all__ = ["Entry", "Keyframe", "Timeline", "thinned"]

MOST_KEYFRAMES = 32


@dataclass(frozen=True, slots=True)
class Entry:
    """A line of the log. `call` is the number of calls that the stream had made.

    kind  "prompt": the text changed; `frame` is the first frame that a call under it touches, `complete` the first that it alone shapes
          "branch": what came later than `call` is no part of the story any more; the video goes on anew from `frame`
          "epoch": frames sent from here on carry the number `epoch`
    """

    seq: int
    kind: str
    call: int = 0
    frame: int = 0
    complete: int | None = None
    event_id: str = ""
    prompt: str = ""
    epoch: int = 0


class Keyframe(NamedTuple):
    """A snapshot taken after `call` calls, when `frame` frames had been handed out and `prompt` was the last prompt's entry, or 0."""

    frame: int
    call: int
    prompt: int

    @property
    def name(self) -> str:
        return f"key-{self.frame:012d}-{self.call:012d}-{self.prompt:012d}.npz"


class Timeline:
    """The log and the keyframes of one session. Used by one thread at a time."""

    def __init__(self, store: Store, folder: str) -> None:
        self._store, self._folder = store, folder
        self.entries: list[Entry] = list(_read(store.get(f"{folder}/log.jsonl") or b""))
        self.keyframes: list[Keyframe] = []
        for key in store.list(folder):
            parts = key.rsplit("/", 1)[-1].removesuffix(".npz").split("-")
            if parts[0] == "key":
                self.keyframes.append(Keyframe(*map(int, parts[1:])))
        self.keyframes = [keyframe for keyframe in self.keyframes if self._is_valid(keyframe)]
        if self.entries:  # closes a torn line, so that the next one stands by itself
            store.append(f"{folder}/log.jsonl", b"\n")

    @property
    def seq(self) -> int:
        """Entries so far."""
        return self.entries[-1].seq if self.entries else 0

    @property
    def epoch(self) -> int:
        return max((entry.epoch for entry in self.entries), default=0)

    def write(self, kind: str, **data: Any) -> Entry:
        """Adds an entry; it is in the store when this returns. Keyframes that it outdates are removed."""
        entry = Entry(self.seq + 1, kind, **data)
        self._store.append(f"{self._folder}/log.jsonl", json.dumps(asdict(entry)).encode() + b"\n")
        self.entries.append(entry)
        for keyframe in [known for known in self.keyframes if not self._is_valid(known)]:
            self._drop(keyframe)
        return entry

    def story(self) -> list[Entry]:
        """The prompts that count, in order: those before a branch that lie behind its call are left out."""
        story: list[Entry] = []
        for entry in self.entries:
            if entry.kind == "branch":
                story = [known for known in story if known.call < entry.call]
            elif entry.kind == "prompt":
                story.append(entry)
        return story

    def due(self, keyframe: Keyframe | None) -> list[Entry]:
        """The prompts that a stream begun there has yet to get."""
        return [entry for entry in self.story() if keyframe is None or entry.seq > keyframe.prompt]

    def add(self, keyframe: Keyframe, data: bytes) -> None:
        """Keeps a snapshot, unless the story has changed before it meanwhile, or the session was removed while it was made."""
        if keyframe in self.keyframes or not self._is_valid(keyframe):
            return
        if self._store.get(f"{self._folder}/record.json") is None:
            return
        self._store.put(f"{self._folder}/{keyframe.name}", data)
        self.keyframes = sorted([*self.keyframes, keyframe])
        kept = thinned(self.keyframes, MOST_KEYFRAMES)
        for known in set(self.keyframes) - set(kept):
            self._drop(known)

    def before(self, frame: int) -> tuple[Keyframe, bytes] | None:
        """The last keyframe from which `frame` can be made, with its snapshot."""
        for keyframe in sorted(self.keyframes, reverse=True):
            if keyframe.frame <= frame:
                data = self._store.get(f"{self._folder}/{keyframe.name}")
                if data is not None:
                    return keyframe, data
        return None

    def _is_valid(self, keyframe: Keyframe) -> bool:
        """Whether the story leads there: it was taken under the prompts that count, and none has changed anything before it since."""
        story = self.story()
        known = keyframe.prompt == 0 or any(entry.seq == keyframe.prompt for entry in story)
        return known and all(entry.call >= keyframe.call for entry in story if entry.seq > keyframe.prompt)

    def _drop(self, keyframe: Keyframe) -> None:
        self._store.delete(f"{self._folder}/{keyframe.name}")
        self.keyframes = [known for known in self.keyframes if known != keyframe]


def thinned(keyframes: Iterable[Keyframe], most: int) -> list[Keyframe]:
    """At most so many, denser near the end: while there are too many, the one goes whose neighbours are nearest, measured against
    how far it lies back. The first and the last stay.
    """
    kept = sorted(keyframes)
    while len(kept) > max(most, 2):
        end = kept[-1].frame + 1
        gaps = [
            ((kept[place + 1].frame - kept[place - 1].frame) / (end - kept[place].frame), place)
            for place in range(1, len(kept) - 1)
        ]
        kept.pop(min(gaps)[1])
    return kept


def _read(data: bytes) -> Iterable[Entry]:
    """The entries of a log, up to the first that was not written whole."""
    expected = 1
    for line in data.splitlines():
        if not line.strip():
            continue
        try:
            entry = Entry(**json.loads(line))
        except (ValueError, TypeError):
            continue
        if entry.seq == expected:
            expected += 1
            yield entry
