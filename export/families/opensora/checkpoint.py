"""Open-Sora's checkpoints: a folder with config.json and model.safetensors, read strictly and one tensor at a time.

weights = Weights.open(folder)         # nothing is read yet
weights.check(STDiT3(**config))        # names and shapes, in one sentence where they differ
weights.numpy("t_block.1.weight")      # float32, straight from the file
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pyengine.errors import BundleError

from .stdit3 import STDiT3
from .vae import VideoAutoencoder

FILE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
SHOWN = 4  # names that a message lists
Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class Weights:
    """Tensors by name, each in one file of a folder. Also the config beside them."""

    folder: Path
    files: dict[str, Path]
    shapes: dict[str, tuple[int, ...]]
    config: dict[str, Any]

    @classmethod
    def open(cls, folder: str | Path) -> Weights:
        """Raises BundleError for a folder that holds no such checkpoint."""
        path = Path(folder)
        config = _json(path / CONFIG)
        if (path / INDEX).is_file():
            parts = sorted(set(_json(path / INDEX).get("weight_map", {}).values()))
        else:
            parts = [FILE]
        files: dict[str, Path] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for part in parts:
            if Path(part).name != part:
                raise BundleError(
                    f"[checkpoint] expected files inside {path} but {INDEX} names {part!r}; download it again"
                )
            try:
                with safe_open(path / part, "pt") as file:
                    for name in file.keys():  # noqa: SIM118 (not a mapping)
                        files[name], shapes[name] = path / part, tuple(file.get_slice(name).get_shape())
            except (SafetensorError, OSError) as error:
                raise BundleError(
                    f"[checkpoint] expected {path / part} to be a safetensors file but it cannot be read ({error}); "
                    "download it again"
                ) from error
        return cls(path, files, shapes, config)

    def check(self, module: nn.Module) -> None:
        """Raises BundleError that names what is missing, unexpected or of another shape."""
        wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
        faults = [
            f"{what} {_some(names)}"
            for what, names in (
                ("lacks", sorted(wanted.keys() - self.shapes.keys())),
                ("has the unexpected", sorted(self.shapes.keys() - wanted.keys())),
                (
                    "has another shape for",
                    [
                        f"{name} (expected {list(shape)} but got {list(self.shapes[name])})"
                        for name, shape in wanted.items()
                        if name in self.shapes and self.shapes[name] != shape
                    ],
                ),
            )
            if names
        ]
        if faults:
            raise BundleError(
                f"[checkpoint] expected the {len(wanted)} tensors of {type(module).__name__} in {self.folder} but it "
                f"{' and '.join(faults)}; check that config.json and weights are of the same release"
            )

    def tensor(self, name: str) -> Tensor:
        """One tensor in the dtype of the file."""
        with safe_open(self.files[name], "pt") as file:
            return file.get_tensor(name)

    def numpy(self, name: str) -> np.ndarray:
        """One tensor as float32."""
        return self.tensor(name).float().numpy()

    def load(self, module: Module) -> Module:
        """Fills a module, which may be on the meta device, tensor by tensor; evaluation mode, no gradients."""
        self.check(module)
        module = module.to_empty(device="cpu") if _is_meta(module) else module
        own = module.state_dict()
        with torch.no_grad():
            for name, target in own.items():
                target.copy_(self.tensor(name))
        return module.eval().requires_grad_(False)


def load_stdit3(folder: str | Path) -> STDiT3:
    """The denoiser of a checkpoint folder. Raises BundleError, ConfigError."""
    weights = Weights.open(folder)
    return weights.load(empty(STDiT3, weights.config))


def load_autoencoder(folder: str | Path) -> VideoAutoencoder:
    """The autoencoder of a checkpoint folder. Raises BundleError."""
    weights = Weights.open(folder)
    return weights.load(empty_autoencoder(weights.config))


def empty_autoencoder(config: dict[str, Any]) -> VideoAutoencoder:
    """Without memory for its parameters. Where the config leaves the size of a chunk open, it is the one that the release passes."""
    return empty(VideoAutoencoder, {**config, "micro_frame_size": config.get("micro_frame_size") or 17})


def empty(kind: type[Module], config: dict[str, Any]) -> Module:
    """The module without memory for its parameters."""
    with torch.device("meta"):
        try:
            return kind(**config)
        except (TypeError, ValueError) as error:
            raise BundleError(
                f"[checkpoint] {CONFIG} does not describe a {kind.__name__} ({error})"
            ) from error


def _is_meta(module: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in module.parameters())


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BundleError(
            f"[checkpoint] expected {path} but it cannot be read ({error}); give the folder of a downloaded checkpoint"
        ) from error
    if not isinstance(value, dict):
        raise BundleError(
            f"[checkpoint] expected an object in {path} but got {type(value).__name__}; download it again"
        )
    return value
