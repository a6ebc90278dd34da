"""Reference numbers of the original LVDM code: cases, and modules with the weights that the rule gives (golden/lvdm/manifest.json).

Weight of key K with shape S: a normal draw seeded by [1, crc32(K)], over the root of its fan-in; vectors are 0.1 times the draw, about
1 for a `weight`. The numbers were made with tiny configurations, fp32, by the released code, bugs included.
"""

from __future__ import annotations

import json
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pyengine.export.families.lvdm import Autoencoder3D, UNet

FOLDER = Path(__file__).parent / "golden" / "lvdm"
MANIFEST: dict[str, Any] = json.loads((FOLDER / "manifest.json").read_text())
CASES: dict[str, Any] = MANIFEST["cases"]


def cases(*kinds: str) -> list[str]:
    """Names of the cases of these kinds."""
    return [name for name, case in CASES.items() if case["spec"]["kind"] in kinds]


@cache
def arrays(name: str) -> dict[str, np.ndarray]:
    with np.load(FOLDER / CASES[name]["file"], allow_pickle=False) as archive:
        return {key: archive[key] for key in archive.files}


def tensors(name: str) -> dict[str, torch.Tensor]:
    return {key: torch.from_numpy(value.copy()) for key, value in arrays(name).items()}


def rule_weight(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    draw = np.random.default_rng([1, zlib.crc32(key.encode())]).standard_normal(shape)
    if len(shape) >= 2:
        draw = draw / np.sqrt(np.prod(shape[1:]))
    else:
        draw = 1 + 0.1 * draw if key.endswith("weight") else 0.1 * draw
    return torch.from_numpy(np.asarray(draw, np.float32))


@cache
def model(name: str) -> torch.nn.Module:
    """A model of the manifest with its weights."""
    entry = MANIFEST["models"][name]
    module = (Autoencoder3D if "autoencoder" in entry["type"] else UNet)(**entry["config"]).eval()
    module.load_state_dict({k: rule_weight(k, tuple(v.shape)) for k, v in module.state_dict().items()})
    return module


def error(got: Any, expected: Any) -> float:
    """Largest difference over the largest expected value."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape
    return float(np.abs(got - expected).max() / np.abs(expected).max())
