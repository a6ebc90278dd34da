"""The tensors of one network by the network's own names, wherever in files they lie: strict, and read one at a time.

files = open_all("Wan2.1-T2V-1.3B/")             # a file, or a folder of one or of numbered parts
tensors = NamedTensors.of(files, rename)         # rename: name in the file -> ours, None = not of this network
tensors.check(module, "the folder of one release")
tensors.read("blocks.0.ffn.0.weight")            # float32, straight from its place
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from pyengine.errors import InputError

from .files import TensorFile, open_tensors
from .weights import Source, differences

STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")
Module = TypeVar("Module", bound=nn.Module)


class Readable(Protocol):
    """A tensor that can be read, or computed of such."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def read(self) -> Tensor: ...


@dataclass(frozen=True)
class NamedTensors:
    """`where` names the files, for messages."""

    sources: Mapping[str, Readable]
    where: str

    @classmethod
    def of(cls, files: Sequence[TensorFile], rename: Callable[[str], str | None]) -> NamedTensors:
        """Raises InputError where two tensors are the same of the network."""
        found: dict[str, Readable] = {}
        for file in files:
            for name in file.tensors:
                ours = rename(name)
                if ours in found:
                    raise InputError(
                        f"[checkpoint] expected {ours} once in {file.path} but it is there twice, the second time as {name}; "
                        "give one checkpoint"
                    )
                if ours is not None:
                    found[ours] = Source(file, name)
        return cls(found, ", ".join(str(file.path) for file in files))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: source.shape for name, source in self.sources.items()}

    def check(self, module: nn.Module, hint: str) -> None:
        """Raises InputError in one sentence where tensors of the module are missing, unexpected or of other shapes."""
        wanted = {name: tuple(value.shape) for name, value in module.state_dict().items()}
        if said := differences(wanted, self.shapes):
            raise InputError(
                f"[checkpoint] expected the {len(wanted)} tensors of {type(module).__name__} in {self.where} but it "
                f"{said}; {hint}"
            )

    def read(self, name: str) -> Tensor:
        """One tensor as float32. Raises InputError for a file that is cut off."""
        return self.sources[name].read().float()

    def load(self, module: Module) -> Module:
        """Fills a module, which may be on the meta device, tensor by tensor; evaluation mode, no gradients."""
        if any(parameter.is_meta for parameter in module.parameters()):
            module = module.to_empty(device="cpu")
        with torch.no_grad():
            for name, target in module.state_dict().items():
                target.copy_(self.read(name))
        return module.eval().requires_grad_(False)


def open_all(path: str | Path, entries: Sequence[str] = ("state_dict",)) -> list[TensorFile]:
    """The file, or the files of a folder. `entries` as in `open_tensors`. Raises InputError."""
    source = Path(path)
    if not source.is_dir():
        return [open_tensors(source, entries)]
    for stem in STEMS:
        index = source / f"{stem}.safetensors.index.json"
        if index.is_file():
            return [open_tensors(source / part, entries) for part in _parts(index)]
        for suffix in SUFFIXES:
            if (source / f"{stem}{suffix}").is_file():
                return [open_tensors(source / f"{stem}{suffix}", entries)]
    raise InputError(
        f"[checkpoint] expected {STEMS[0]}.safetensors in {source} but there is none; give the file itself, or the folder that holds it"
    )


def _parts(index: Path) -> list[str]:
    """Names of the files that an index lists, all inside its folder."""
    try:
        parts = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        if not parts or any(Path(part).name != part for part in parts):
            raise ValueError("its parts are no files beside it")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"[checkpoint] expected a list of files in {index} but it cannot be read ({error}); download it again"
        ) from error
    return parts
