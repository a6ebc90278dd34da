"""The benchmark: its keys, that it needs no torch without peers, and that peers make the same video."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import pyengine
from pyengine.bundle.bundle import Bundle
from pyengine.errors import ConfigError
from pyengine.export.families.shapes.denoiser import DenoiserConfig
from pyengine.export.families.shapes.export import export_bundle
from pyengine.export.families.shapes.modules import Modules
from pyengine.export.peers import DEFAULT, NAMES, Peers, load_modules, names_for
from pyengine.measure.bench import bench, example_prompt, table

KEYS = {
    "frames_per_second",
    "first_frame_seconds",
    "call_ms",
    "peak_memory_mb",
    "overhead_percent",
    "peers",
}
# In it torch and onnx cannot be imported.
WITHOUT_TORCH = """
import sys
sys.modules["torch"] = sys.modules["onnx"] = None
from pyengine.cli import main
sys.exit(main(["bench", sys.argv[1], "--json", "--no-peers", "--seconds", "0.2"]))
"""


def small_modules() -> Modules:
    """An untrained network in which no two parameters are equal, as in a trained one."""
    modules = Modules.random(DenoiserConfig(width=64, depth=2, heads=2))
    with torch.no_grad():
        for part in modules.parts():
            for parameter in part.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
    return modules.rounded()


@pytest.fixture(scope="module")
def modules() -> Modules:
    return small_modules()


@pytest.fixture(scope="module")
def bundle(modules: Modules, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export_bundle(modules, tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plans")


def clips(iterator: Iterator[np.ndarray], count: int) -> np.ndarray:
    return np.stack(list(itertools.islice(iterator, count))).astype(int)


@pytest.mark.slow
def test_command_needs_no_torch_without_peers(bundle: Bundle, cache: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-c", WITHOUT_TORCH, str(bundle.folder)],
        capture_output=True,
        text=True,
        check=False,
        env={"PYENGINE_CACHE": str(cache), "PATH": ""},
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert set(result) >= KEYS
    first = result["first_frame_seconds"]
    assert 0 < result["import_seconds"] < first["warm"] < first["cold"]
    assert 0 < result["call_ms"]["p50"] <= result["call_ms"]["p95"]
    assert result["frames_per_second"] > 0
    assert result["peak_memory_mb"] > 10
    assert 0 <= result["overhead_percent"] < 100
    assert result["peers"] == {}


@pytest.mark.slow
def test_peers_stand_beside_the_engine(bundle: Bundle, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyengine.measure.bench.WARM_STARTS", 1)
    monkeypatch.setattr("pyengine.measure.bench.WARM_CLIPS", 2)
    result = bench(bundle.folder, seconds=0.2, precision="fp32", peers=["torch_eager"], cache_dir=cache)
    assert set(result["peers"]) == set(result["times_faster"]) == {"torch_eager"}
    assert result["peers_failed"] == {}
    assert len(result["rounds"]["torch_eager"]) == len(result["rounds"]["pyengine"])
    assert "torch_eager" in table(result)


@pytest.mark.slow
@pytest.mark.parametrize("source", ["shapes-lvdm", "opensora"])
def test_measures_any_bundle(source: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two levels and no text; a family that reads prompts with T5 and makes its first chunk by an opening."""
    monkeypatch.setattr("pyengine.measure.bench.WARM_STARTS", 1)
    monkeypatch.setattr("pyengine.measure.bench.WARM_CLIPS", 1)
    monkeypatch.setattr("pyengine.measure.bench.ROUNDS", 2)
    bundle: str | Path = source
    if source == "opensora":
        import opensora_family

        bundle = opensora_family.bundle().folder
    result = bench(
        bundle, seconds=0.1, peers=["onnxruntime"], cache_dir=cache, choice="inline", precision="fp32"
    )
    assert (result["prompt"] == "") == (source == "shapes-lvdm")
    assert set(result["times_faster"]) == {"onnxruntime"}
    assert result["peers_failed"] == {}
    assert result["call_ms"]["count"] > 0
    assert 0 <= result["overhead"]["executor"] < 100
    assert 0 <= result["overhead"]["call"] < 100
    assert source in result["bundle"]


def test_peers_follow_the_family(bundle: Bundle) -> None:
    assert names_for(bundle) == DEFAULT
    assert names_for(Bundle.load("shapes-lvdm", verify=False)) == ("onnxruntime",)


def test_refuses_what_it_cannot_measure(bundle: Bundle) -> None:
    with pytest.raises(ConfigError, match=r"expected peers out of torch_eager, .* but got tensorflow"):
        bench(bundle.folder, peers=["tensorflow"])
    with pytest.raises(ConfigError, match="expected seconds of measuring above 0 but got 0"):
        bench(bundle.folder, seconds=0, peers=False)


def test_weights_come_back_from_the_bundle(bundle: Bundle, modules: Modules) -> None:
    loaded = load_modules(bundle)
    for ours, theirs in (
        (loaded.denoiser, modules.denoiser),
        (loaded.text_encoder, modules.text_encoder),
        (loaded.decoder, modules.decoder),
    ):
        exact = dict(theirs.named_parameters())
        for name, parameter in ours.named_parameters():
            assert torch.equal(parameter, exact.pop(name)), name
        assert not exact


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if "compile" not in name])
def test_peers_make_the_same_video(bundle: Bundle, cache: Path, name: str) -> None:
    """float32, past the first turn of the ring; a recomputed context reaches less far back from there on."""
    recent = bundle.method["context"]["recent_frames"] // bundle.method["chunk_frames"]
    count = recent + (1 if name == "torch_recompute" else 3)
    engine = pyengine.load(bundle.folder, precision="fp32", cache_dir=cache)
    with engine.stream(example_prompt(bundle), seed=3) as stream:
        exact = clips(stream.clips(), count)
    peers = Peers(bundle, prompt=example_prompt(bundle), seed=3, precision="fp32", cache_dir=cache)
    difference = np.abs(clips(peers.clips(name), count) - exact)
    assert exact.std() > 10
    assert difference.max() <= 2
    assert difference.mean() < 0.01
