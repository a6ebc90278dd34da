"""Reference numbers of causal Wan: weights and most inputs made by rule, outputs stored. See golden/wan/README.md."""

from __future__ import annotations

import functools
import gzip
import json
import zlib
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from pyengine.export.families.wan import CausalWan, TextEncoder, VideoAutoencoder

FOLDER = Path(__file__).parent / "golden" / "wan"
TOLERANCE = 2e-5
SEED = 5
Module = TypeVar("Module", bound=nn.Module)


def draw(name: str, shape: tuple[int, ...], seed: int = SEED) -> np.ndarray:
    return np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(shape)


def rule_weight(key: str, shape: tuple[int, ...], seed: int = SEED) -> np.ndarray:
    """The weight that the rule gives a parameter. float32"""
    normal = draw(key, shape, seed)
    if key.endswith("gamma") or (len(shape) < 2 and key.endswith("weight")):
        return (1 + 0.1 * normal).astype(np.float32)
    return (normal / np.sqrt(np.prod(shape[1:])) if len(shape) >= 2 else 0.1 * normal).astype(np.float32)


def fill(module: Module, seed: int = SEED) -> Module:
    with torch.no_grad():
        for key, tensor in module.state_dict().items():
            tensor.copy_(torch.from_numpy(rule_weight(key, tuple(tensor.shape), seed)))
    return module.eval().requires_grad_(False)


@functools.cache
def case(name: str, folder: Path = FOLDER, seed: int = SEED) -> dict[str, np.ndarray]:
    """The arrays of a file; inputs that were drawn by rule are drawn again as `in_*`."""
    with np.load(folder / f"{name}.npz", allow_pickle=False) as file:
        arrays = {key: file[key] for key in file.files}
    for key in [key for key in arrays if key.startswith("shape_")]:
        part = key.removeprefix("shape_")
        value = draw(f"{name}/{part}", tuple(arrays.pop(key)), seed)
        if name.startswith("vae_encode"):
            value = np.clip(0.5 * value, -1, 1)
        value = value.astype(np.float32)
        if part == "context":
            for row, length in enumerate(np.atleast_1d(arrays.get("in_context_lens", []))):
                value[row, length:] = 0
        arrays[f"in_{part}"] = value
    return arrays


def tensor(name: str, key: str) -> Tensor:
    return torch.from_numpy(case(name)[key])


@functools.cache
def manifest() -> dict[str, Any]:
    return json.loads((FOLDER / "manifest.json").read_text())


@functools.cache
def full_keys() -> dict[str, dict[str, list[int]]]:
    """Names and shapes of the full released models."""
    return json.loads(gzip.decompress((FOLDER / "full_keys.json.gz").read_bytes()))


@functools.cache
def transformer() -> CausalWan:
    return fill(CausalWan(**manifest()["dit"]["config"]))


@functools.cache
def autoencoder() -> VideoAutoencoder:
    return fill(VideoAutoencoder(**manifest()["vae"]["config"]))


@functools.cache
def text_encoder() -> TextEncoder:
    return fill(TextEncoder(**manifest()["umt5"]["config"]))


def assert_close(got: Tensor | np.ndarray, want: np.ndarray, tolerance: float = TOLERANCE) -> None:
    got = got.detach().numpy() if isinstance(got, Tensor) else got
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= tolerance


def assert_sampled(
    got: Tensor, arrays: dict[str, np.ndarray], name: str, tolerance: float = TOLERANCE
) -> None:
    """An intermediate result against `dbg_<name>`, or against every n-th value of it."""
    if f"dbg_{name}" in arrays:
        assert_close(got, arrays[f"dbg_{name}"], tolerance)
        return
    assert tuple(got.shape) == tuple(arrays[f"of_{name}"])
    flat = got.detach().numpy().reshape(-1)[:: int(arrays[f"step_{name}"])]
    assert_close(flat, arrays[f"sample_{name}"], tolerance)
