"""Reference numbers of the original StreamingT2V code, and networks with the weights of its rule (golden/streamingt2v/manifest.json).

The numbers were made by the released code (repository Picsart-AI-Research/StreamingT2V, commit a8aceea5) with tiny configurations in fp32.
Inputs that a rule draws are drawn again (`by_rule`). Of large arrays every third value is kept, the first included (`arrays`).

Weight of key K with shape S: a normal draw seeded by [1, crc32(K)], over the root of its fan-in; vectors are 0.1 times the draw, about
1 for a `weight`. K has the prefix of the checkpoint, and `enhancer.` for the second stage.
"""

from __future__ import annotations

import json
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pyengine.export.families.streamingt2v import build

FOLDER = Path(__file__).parent / "golden" / "streamingt2v"
MANIFEST: dict[str, Any] = json.loads((FOLDER / "manifest.json").read_text())
CONFIG: dict[str, Any] = MANIFEST["config"]


def drawn(name: str, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng([1, zlib.crc32(name.encode())]).standard_normal(shape)


def rule_weight(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    draw = drawn(key, shape)
    if len(shape) >= 2:
        draw = draw / np.sqrt(np.prod(shape[1:]))
    else:
        draw = 1 + 0.1 * draw if key.endswith("weight") else 0.1 * draw
    return torch.from_numpy(np.asarray(draw, np.float32))


def fill(module: nn.Module, prefix: str) -> nn.Module:
    """The weights of the rule. A module on the meta device gets memory first."""
    state = {key: rule_weight(f"{prefix}.{key}", tuple(v.shape)) for key, v in module.state_dict().items()}
    module.load_state_dict(state, assign=True)
    return module.eval().requires_grad_(False)


@cache
def modules() -> dict[str, nn.Module]:
    """The networks of the golden configuration."""
    with torch.device("meta"):
        parts = build(CONFIG)
    return {name: fill(module, name) for name, module in parts.items()}


@cache
def _file(stem: str) -> dict[str, np.ndarray]:
    with np.load(FOLDER / f"{stem}.npz", allow_pickle=False) as archive:
        return {key: archive[key] for key in archive.files}


def array(name: str) -> np.ndarray:
    """An array by file and name, "denoiser_base/eps", flat where only every third value is kept."""
    if name in MANIFEST["by_rule"]:
        rule = MANIFEST["by_rule"][name]
        draw = drawn(rule["name"], tuple(rule["shape"])).astype(np.float32)
        return np.tanh(draw) if rule["scale"] == "tanh" else np.float32(rule["scale"]) * draw
    stem, key = name.split("/")
    return _file(stem)[key]


def tensor(name: str) -> torch.Tensor:
    return torch.from_numpy(array(name).copy())


def difference(got: Any, name: str) -> tuple[float, float]:
    """Largest difference to an array, and the root of the mean square of the differences over its deviation."""
    entry = MANIFEST["arrays"][name]
    got = np.asarray(got, np.float64)
    assert list(got.shape) == entry["shape"], f"{name}: {got.shape}"
    want = array(name).astype(np.float64).reshape(-1)
    apart = got.reshape(-1)[:: entry["every"]] - want
    return float(np.abs(apart).max()), float(np.sqrt(np.mean(apart**2)) / want.std())


def own_error(name: str) -> tuple[float, float]:
    """What the original's fp32 is off from its fp64: largest, and relative as in `difference`."""
    entry = MANIFEST["error_of_float32_vs_float64"][name]
    return entry["max_abs"], entry["rel_rms"]
