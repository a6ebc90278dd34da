"""Tensors by name, each from a file of its own choosing, compared with what networks want before any is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from pyengine.errors import InputError

from .files import TensorFile

SHOWN = 4  # names that a message lists


class Source(NamedTuple):
    """A tensor of a file, or that part (index, parts) of its first axis."""

    file: TensorFile
    name: str
    part: tuple[int, int] = (0, 1)

    @property
    def shape(self) -> tuple[int, ...]:
        stored = self.file.tensors[self.name].shape
        return (stored[0] // self.part[1], *stored[1:]) if self.part[1] > 1 else stored

    def read(self) -> Tensor:
        index, parts = self.part
        return self.file.read(self.name).chunk(parts)[index] if parts > 1 else self.file.read(self.name)


@dataclass(frozen=True)
class Weights:
    """Sources by name. `half`: values are rounded to fp16 as they are read."""

    sources: Mapping[str, Source] = field(default_factory=dict)
    half: bool = False

    def compare(self, wanted: Mapping[str, tuple[int, ...]], what: str) -> None:
        """Raises InputError in one sentence where tensors of `what`, by name and shape, are missing, unexpected or of other shapes."""
        given = {name: source.shape for name, source in self.sources.items()}
        if said := differences(wanted, given, _plain):
            files = sorted({str(source.file.path) for source in self.sources.values()})
            raise InputError(
                f"[checkpoint] expected the {len(wanted)} tensors of {what} but {', '.join(files)} {said}; "
                "check that all files are of one release"
            )

    def rounded(self, value: Tensor, name: str) -> Tensor:
        """float32 values that fp16 holds, where `half`."""
        if not self.half:
            return value.float()
        half = value.half()
        if not half.isfinite().all():
            raise InputError(
                f"[checkpoint] expected values that fp16 holds but {name} has others; use --weights fp32, or download the file again"
            )
        return half.float()


def differences(
    wanted: Mapping[str, tuple[int, ...]],
    given: Mapping[str, tuple[int, ...]],
    shown: Callable[[tuple[int, ...]], tuple[int, ...]] = tuple,
) -> str:
    """What tensors lack, or have too many or of another shape, in words; empty where there is nothing. Shapes are compared as `shown`."""
    other = [
        f"{name} (expected {list(shape)} but got {list(given[name])})"
        for name, shape in wanted.items()
        if name in given and shown(given[name]) != shown(shape)
    ]
    faults = {
        "lacks": sorted(wanted.keys() - given.keys()),
        "has the unexpected": sorted(given.keys() - wanted.keys()),
        "has another shape for": other,
    }
    return " and ".join([f"{fault} {some(names)}" for fault, names in faults.items() if names])


def some(names: Iterable[str]) -> str:
    """The first few, and how many more."""
    listed = list(names)
    more = f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
    return ", ".join(listed[:SHOWN]) + more


def _plain(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without the ones at the end: some files have kernel-1 convolutions for matrices."""
    return _plain(shape[:-1]) if shape and shape[-1] == 1 else shape
