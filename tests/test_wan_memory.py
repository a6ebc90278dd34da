"""The table of memory in docs/wan.md is what the manifests and the released shapes come to."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from wan_golden import full_keys

from pyengine.export.families.wan import CausalWan, VideoAutoencoder, presets
from pyengine.export.families.wan.vae import FULL_SIZE
from pyengine.methods import make_method, method_settings
from pyengine.methods.causal import Causal

DOCUMENT = (Path(__file__).parents[1] / "docs" / "wan.md").read_text()
BYTES = 2  # bf16
LATENT = (60, 104)
NAMES = {
    "self-forcing": "Self-Forcing",
    "causvid": "CausVid",
    "rolling-forcing": "Rolling Forcing",
    "longlive": "LongLive",
}


def model() -> CausalWan:
    sizes: dict[str, Any] = {"dim": 1536, "ffn_dim": 8960, "num_heads": 12, "num_layers": 30}
    with torch.device("meta"):
        return CausalWan(**sizes)


def gigabytes(numbers: float) -> str:
    return f"{numbers * BYTES / 1e9:.2f} GB"


def row(name: str) -> str:
    """The second column of the table's row."""
    found = re.search(rf"^\| {name} \| (.+) \|$", DOCUMENT, re.MULTILINE)
    assert found is not None
    return found[1]


def test_weights_and_text() -> None:
    config = model().config
    assert row("weights of the transformer") == gigabytes(
        sum(math.prod(shape) for shape in full_keys()["dit_1.3B"].values())
    )
    words = 2 * config.num_layers * config.text_len * config.dim * BYTES / 1e6
    assert row("keys and values of a prompt") == f"{words:.0f} MB"


@pytest.mark.parametrize("system", presets.SYSTEMS)
def test_ring_of_every_system(system: str) -> None:
    config = model().config
    rows, columns = config.grid(*LATENT)
    frame = 2 * config.num_layers * rows * columns * config.dim
    schedule = make_method(method_settings(presets.system(system).method()), None, 0)
    assert isinstance(schedule, Causal)
    said = row("ring per latent frame")
    assert said.startswith(f"{frame * BYTES / 1e6:.1f} MB: ")
    parts = [part.rsplit(" ", 2) for part in said.split(": ")[1].split(", ")]
    sizes: dict[str, str] = {}
    unsaid: list[str] = []
    for part in parts:
        if part[-1] != "GB":
            unsaid.append(" ".join(part))  # shares the size of the next
            continue
        sizes |= dict.fromkeys([*unsaid, part[0]], " ".join(part[1:]))
        unsaid = []
    assert sizes[NAMES[system]] == gigabytes(frame * schedule.config.ring_frames)
    slots = re.search(r"^\| slots of the ring \|(.+)\|$", DOCUMENT, re.MULTILINE)
    assert slots is not None
    column = list(NAMES).index(system)
    assert int(slots[1].split("|")[column]) == schedule.config.ring_frames


def test_memory_of_the_decoder() -> None:
    with torch.device("meta"):
        decoder = VideoAutoencoder(**FULL_SIZE).decoder
    held = sum(math.prod(shape) for shape in decoder.memory_shapes(1, *LATENT))
    assert row("decoder's memory").startswith(gigabytes(held))
