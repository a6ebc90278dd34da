"""Step: what one call does with the rows of a window. `pyengine.methods.windowed` makes a Call of it."""

from dataclasses import dataclass

from pyengine.errors import ConfigError

__all__ = ["Step"]


@dataclass(frozen=True, slots=True)
class Step:
    """One call of the network. Tuples named [F] have one entry per window row, oldest frame first.

    Absent rows come first and have chunk, frame_index, source and append_slot -1 and level 0. So the newest
    frame is always in the last row, and frames move up when a chunk is born and at no other time.
    Every present row comes from exactly one place: `source`, `born`, `given` or `warmed`.
    """

    call: int  # k; negative in calls that only write given chunks to the ring
    chunk: tuple[int, ...]  # [F] chunk of each row
    frame_index: tuple[int, ...]  # [F] absolute frame of each row
    level: tuple[float, ...]  # [F] before the call
    level_next: tuple[float, ...]  # [F] after the call; equal to `level` where the prediction is discarded
    source: tuple[int, ...]  # [F] row of the previous step that holds the latent; -1 if born, given or absent
    born: tuple[int, ...]  # rows to fill with fresh noise, drawn by absolute frame
    given: tuple[int, ...]  # rows to fill with a clean latent that the caller holds
    append_slot: tuple[int, ...]  # [F] ring slot that receives the row's keys and values; -1 = none
    emit: tuple[int, ...]  # chunks that are clean when the call ends, oldest first
    ring_index: tuple[int, ...]  # [R] absolute frame in each readable slot; -1 = empty or written now
    renoised: tuple[int, ...] = ()  # rows the network sees as (1 - level) x0 + level eps; x0 itself is kept
    warmed: tuple[int, ...] = ()  # rows that begin as (1 - level) x0 + level eps, x0 given and eps as if born

    @property
    def frames(self) -> int:
        """F, rows of the window: one of the configuration's `shapes`."""
        return len(self.frame_index)

    @property
    def present(self) -> int:
        """Rows that hold a frame."""
        return sum(frame >= 0 for frame in self.frame_index)

    def rows(self, chunk: int) -> slice:
        """Rows of a chunk that is in the window."""
        if chunk < 0 or chunk not in self.chunk:
            raise ConfigError(f"chunk must be in the window of call {self.call} but is {chunk}")
        start = self.chunk.index(chunk)
        return slice(start, start + self.chunk.count(chunk))

    def __str__(self) -> str:
        levels = zip(self.level, self.level_next, strict=True)
        chunks = dict(zip(self.chunk, levels, strict=True))
        text = [f"{chunk}: {now:.3f}->{then:.3f}" for chunk, (now, then) in chunks.items() if chunk >= 0]
        slots = [slot for slot in self.append_slot if slot >= 0]
        text += [f"append {slots}"] * bool(slots) + [f"emit {list(self.emit)}"] * bool(self.emit)
        return "  ".join([f"call {self.call}", f"rows {self.present}/{self.frames}", *text])
