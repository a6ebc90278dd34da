"""Graphs with their weights, from files that an installer has hard-linked, too."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
import toy_family as toy
from onnx import numpy_helper

from pyengine.bundle.bundle import BUNDLED, Bundle
from pyengine.bundle.graph_file import load_graph
from pyengine.errors import BundleError
from pyengine.export.families.shapes.modules import load_modules


def linked(source: Path, target: Path) -> Path:
    """The bundle as uv installs it: every file has a second name."""
    target.mkdir()
    (target / "again").mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
        os.link(target / path.name, target / "again" / path.name)
    return target


def values(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def test_it_is_what_onnx_loads(tmp_path: Path) -> None:
    folder = toy.bundle().folder
    wanted, found = values(onnx.load(folder / "denoiser.onnx")), values(load_graph(folder / "denoiser.onnx"))
    assert wanted
    assert wanted.keys() == found.keys()
    assert all(np.array_equal(wanted[name], found[name]) for name in wanted)
    assert values(load_graph(linked(folder, tmp_path / "linked") / "denoiser.onnx")).keys() == wanted.keys()


def test_peers_read_a_bundle_that_is_hard_linked(tmp_path: Path) -> None:
    modules = load_modules(Bundle.load(linked(BUNDLED / "shapes", tmp_path / "shapes")))
    assert sum(parameter.numel() for parameter in modules.denoiser.parameters()) > 1e6


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("location", "../weights.bin", "lies outside the bundle"),
        ("location", "/etc/hostname", "lies outside the bundle"),
        ("location", "nowhere.bin", "No such file"),
        ("offset", str(2**40), "ends at byte"),
        ("offset", "-4", "ends at byte"),
        ("length", "many", "invalid literal"),
    ],
)
def test_weights_that_lie_elsewhere_are_refused(tmp_path: Path, key: str, value: str, sentence: str) -> None:
    folder = toy.bundle_copy(tmp_path / "toy")
    model = onnx.load(folder / "denoiser.onnx", load_external_data=False)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.external_data)
    next(entry for entry in tensor.external_data if entry.key == key).value = value
    onnx.save(model, folder / "denoiser.onnx")
    with pytest.raises(BundleError, match=sentence) as caught:
        load_graph(folder / "denoiser.onnx")
    assert "\n" not in str(caught.value)


def test_what_is_no_graph(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(b"no graph")
    with pytest.raises(BundleError, match="is no readable ONNX file"):
        load_graph(tmp_path / "a.onnx")
