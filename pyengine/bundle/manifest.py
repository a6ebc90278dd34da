"""The types of a manifest, and their JSON.

dtype names are numpy's, and `working`: float32 in an fp32 plan, bf16 (numpy uint16) in a bf16 plan.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pyengine.errors import BundleError

CLEANING_RULES = ("none", "captions", "whitespace")
DTYPES = frozenset({"working", "float32", "int64", "uint8", "bool"})
Symbols = Mapping[str, int]


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a tensor. A dim is an int, a symbol (`frames`) or a sum of products
    (`2*frames+ring`).
    """

    shape: tuple[int | str, ...]
    dtype: str

    def resolve(self, symbols: Symbols) -> tuple[int, ...]:
        """The shape in numbers. Raises BundleError for a symbol without a value."""
        return tuple(_dim(dim, symbols) for dim in self.shape)

    def axis(self, symbol: str) -> int | None:
        """The axis that is exactly this symbol (`streams`), None without one."""
        return self.shape.index(symbol) if symbol in self.shape else None


@dataclass(frozen=True)
class Constant:
    """A weight that an op reads: raw bytes at `offset` of `file`."""

    shape: tuple[int, ...]
    dtype: str
    file: str
    offset: int


@dataclass(frozen=True)
class Step:
    """One step of a graph. `kind`: `segment` (an .onnx file), `op` (a kernel of ours) or `append` (of two
    outputs to a ring). `precision` is set where a segment must keep it in
    every plan.
    """

    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    file: str | None = None
    precision: str | None = None
    op: str | None = None
    attributes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Graph:
    """The steps of a component. `tensors` are those that cross a border between steps, `constants` the
    weights that ops read.
    """

    tensors: Mapping[str, TensorSpec]
    constants: Mapping[str, Constant]
    steps: tuple[Step, ...]

    @property
    def files(self) -> tuple[str, ...]:
        return tuple(step.file for step in self.steps if step.file)


@dataclass(frozen=True)
class Component:
    """A network of the bundle, in three forms: `portable` ONNX for any runtime, `inline` with our ops as
    plain ONNX that a backend compiles whole, and `cut` at our ops (None without any). `state` maps an
    input to the output that replaces it after a run; `ring` maps an input to the output that is appended
    to it. `symbols` are the symbolic dims, with the sizes of the example.

    A denoiser's symbols are `streams`, `branches` (guidance branches, in the order of the bundle's `branches`), and as the family
    has them `frames` and `ring`. What belongs to a stream has an axis `streams`: of one prompt's features, as the text encoder gives
    them, each is written to the place of its stream on that axis (`TensorSpec.axis`).
    """

    name: str
    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]
    symbols: Mapping[str, int]
    state: Mapping[str, str]
    ring: Mapping[str, str]
    portable: str
    inline: Graph
    cut: Graph | None = None

    @property
    def append_spec(self) -> TensorSpec | None:
        """`append_slot`: the ring slot that each active frame of each stream is written to after the run, -1 for none. None
        without a ring.
        """
        if not self.ring:
            return None
        frames = self.outputs[next(iter(self.ring.values()))].shape[1]
        return TensorSpec(("streams", frames), "int64")


@dataclass(frozen=True)
class Video:
    """Size and rate of the frames. `frames_per_latent` is whole for every chunk (17 frames of 5 latents are 3.4); the first latent of a
    video becomes `first_frames` (1 where a causal autoencoder keeps the first frame apart), None = as many as every other.
    """

    height: int
    width: int
    fps: float
    frames_per_latent: float
    first_frames: float | None = None

    def frames(self, latents: int) -> int:
        """Frames that the first so many latents of a video, in whole chunks, become."""
        first = self.frames_per_latent if self.first_frames is None else self.first_frames
        return round(first + (latents - 1) * self.frames_per_latent) if latents > 0 else 0

    def lead(self, first_latent: int) -> int:
        """Frames that a decoder makes of a chunk beginning with this latent before its first one that belongs to the video: it makes as
        many of the first latent as of every other.
        """
        return (
            0
            if first_latent or self.first_frames is None
            else round(self.frames_per_latent - self.first_frames)
        )

    def chunks(self, frames: int, first: int, later: int, given: int = 0) -> int:
        """Chunks of `first` latents, then `later` ones each, that make at least so many frames behind `given` latents."""
        per, begin = self.frames_per_latent, self.first_frames or self.frames_per_latent
        wanted = self.frames(given) + frames
        # Rounded, since frames per latent need not be whole.
        latents = 1 + math.ceil(max(0.0, (wanted - begin) / per - 1e-6)) - given
        behind = latents - (0 if given else first)
        return max(1, (0 if given else 1) + max(0, -(-behind // later)))


@dataclass(frozen=True)
class Latent:
    channels: int
    height: int
    width: int


@dataclass(frozen=True)
class Cleaning:
    """What is done to a prompt so that it reads as the captions of the training did.

    suffix  is put behind a prompt that does not hold `unless`; "" = nothing
    rules   "captions" or "whitespace": those of `text.captions`; "none": no others
    passes  how often the rules are applied
    """

    suffix: str = ""
    unless: str = ""
    rules: str = "none"
    passes: int = 1

    def __post_init__(self) -> None:
        if self.rules not in CLEANING_RULES:
            raise ValueError(
                f"expected text cleaning by the rules {' or '.join(CLEANING_RULES)} but got {self.rules!r}"
            )
        if self.passes < 1:
            raise ValueError(f"expected at least 1 pass of text cleaning but got {self.passes}")


@dataclass(frozen=True)
class Text:
    """How prompts are read. kind `words`: by the bundle's own tokenizer; `t5` or `umt5`: by that model at `source`, of whose
    `max_tokens` states the text encoder takes the first `words`. `cleaning`: what a prompt for such a model goes through first, None =
    it is taken as it is. `example` is a prompt to try the bundle with; "": any text will do.
    """

    tokenizer: str
    max_tokens: int
    kind: str = "words"
    source: str | None = None
    dtype: str = "float32"
    words: int | None = None
    cleaning: Cleaning | None = None
    example: str = ""


def parse_text(entry: Mapping[str, Any]) -> Text:
    cleaning = entry.get("cleaning")
    return Text(**{**entry, "cleaning": Cleaning(**cleaning) if cleaning is not None else None})


def parse_branches(entry: object) -> tuple[str, ...]:
    """Names of the guidance branches. Raises ValueError for anything but distinct names."""
    if not isinstance(entry, list) or not entry or not all(isinstance(name, str) and name for name in entry):
        raise ValueError(f"expected branches to be a list of names but got {entry!r}")
    if len(set(entry)) < len(entry):
        raise ValueError(f"expected branches with names of their own but got {entry!r}")
    return tuple(entry)


def parse_component(name: str, entry: dict[str, Any]) -> Component:
    inputs, outputs = _parse_specs(entry["inputs"]), _parse_specs(entry["outputs"])
    state, ring = dict(entry.get("state", {})), dict(entry.get("ring", {}))
    for source, target in (state | ring).items():
        if source not in inputs or target not in outputs:
            raise ValueError(
                f"component {name!r} pairs {source!r} with {target!r}, which are not an input and an "
                "output of it"
            )
    return Component(
        name=name,
        inputs=inputs,
        outputs=outputs,
        symbols={key: int(value) for key, value in entry.get("symbols", {}).items()},
        state=state,
        ring=ring,
        portable=entry["portable"],
        inline=_parse_graph(entry["inline"]),
        cut=_parse_graph(entry["cut"]) if entry.get("cut") else None,
    )


def _parse_specs(entries: dict[str, Any]) -> dict[str, TensorSpec]:
    specs = {name: TensorSpec(tuple(entry["shape"]), entry["dtype"]) for name, entry in entries.items()}
    for name, spec in specs.items():
        if spec.dtype not in DTYPES:
            raise ValueError(
                f"tensor {name!r} has dtype {spec.dtype!r}, expected one of {', '.join(sorted(DTYPES))}"
            )
    return specs


def _parse_graph(entry: dict[str, Any]) -> Graph:
    constants = {
        name: Constant(**{**fields, "shape": tuple(fields["shape"])})
        for name, fields in entry["constants"].items()
    }
    steps = tuple(
        Step(**{**fields, "inputs": tuple(fields["inputs"]), "outputs": tuple(fields["outputs"])})
        for fields in entry["steps"]
    )
    return Graph(_parse_specs(entry["tensors"]), constants, steps)


def describe_component(component: Component) -> dict[str, Any]:
    entry = asdict(component)
    del entry["name"]
    for graph in (entry["inline"], entry["cut"]):
        for step in graph["steps"] if graph else ():
            for key in ("file", "precision", "op", "attributes"):
                if not step[key]:
                    del step[key]
    return entry


def _dim(dim: int | str, symbols: Symbols) -> int:
    return sum(
        math.prod(_factor(factor, symbols) for factor in term.split("*")) for term in str(dim).split("+")
    )


def _factor(factor: str, symbols: Symbols) -> int:
    if factor.isdigit():
        return int(factor)
    if factor not in symbols:
        raise BundleError(
            f"a dimension has no size: give {factor!r} in the variant (given: {', '.join(symbols) or 'none'})"
        )
    return symbols[factor]
