"""Reference numbers of Open-Sora v1.2 and PA-VDM: weights made by rule, inputs and outputs stored. See golden/opensora/README.md."""

from __future__ import annotations

import functools
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pyengine.export.families.opensora import STDiT3, VideoAutoencoder

FOLDER = Path(__file__).parent / "golden" / "opensora"
SEED = 1
COMPUTED = ("rope.freqs", "scale", "shift")  # left as the model computes them


def case(name: str) -> dict[str, np.ndarray]:
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


@functools.cache
def manifest() -> dict[str, Any]:
    return json.loads((FOLDER / "manifest.json").read_text())


def rule_weight(key: str, shape: tuple[int, ...], seed: int = SEED) -> np.ndarray:
    """The weight that the rule gives a parameter. float32"""
    draw = np.random.default_rng([seed, zlib.crc32(key.encode())]).standard_normal(shape)
    if len(shape) >= 2:
        return (draw / np.sqrt(np.prod(shape[1:]))).astype(np.float32)
    return (1 + 0.1 * draw if key.endswith("weight") else 0.1 * draw).astype(np.float32)


def fill(module: nn.Module, seed: int = SEED) -> nn.Module:
    with torch.no_grad():
        for key, tensor in module.state_dict().items():
            if key not in COMPUTED:
                tensor.copy_(torch.from_numpy(rule_weight(key, tuple(tensor.shape), seed)))
    return module.eval().requires_grad_(False)


@functools.cache
def stdit3() -> STDiT3:
    module = STDiT3(**manifest()["stdit3"]["config"])
    fill(module)
    return module


@functools.cache
def autoencoder() -> VideoAutoencoder:
    module = VideoAutoencoder(**manifest()["vae"]["config"])
    fill(module)
    return module
