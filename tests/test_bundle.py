"""Bundles: what is loaded, and the one sentence for what is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import toy_family as toy

from pyengine.bundle.bundle import Bundle, Cleaning, TensorSpec, Video, write_manifest
from pyengine.errors import BundleError


def test_manifest_round_trip() -> None:
    bundle = toy.bundle()
    assert (bundle.name, bundle.family, bundle.version) == ("toy", "toy", "1")
    assert bundle.video is not None
    assert bundle.video.frames_per_latent == 4
    denoiser = bundle.component("denoiser")
    assert denoiser.inputs["latents"] == TensorSpec(("streams", "frames", 4, 4, 4), "float32")
    assert denoiser.inputs["ring_key.0"] == TensorSpec(("branches*streams", "ring", 16, 2, 16), "working")
    assert denoiser.symbols == {"frames": toy.FRAMES, **toy.SIZES, "streams": toy.EXAMPLE_STREAMS}
    assert denoiser.append_spec == TensorSpec(("streams", "frames"), "int64")
    assert denoiser.inputs["text_key"].axis("streams") == 2
    assert denoiser.inputs["ring_key.0"].axis("streams") is None
    assert bundle.branches == ("prompt", "null")
    assert bundle.component("decoder").state == {"memory": "memory.out"}
    assert "weights.bin" in bundle.files
    assert "manifest.json" not in bundle.files


@pytest.mark.parametrize(("dim", "size"), [(3, 3), ("frames", 8), ("2*frames", 16), ("2*frames+ring+1", 23)])
def test_dims_resolve(dim: int | str, size: int) -> None:
    assert TensorSpec((dim,), "int64").resolve({"frames": 8, "ring": 6}) == (size,)


def test_the_first_latent_may_become_fewer_frames() -> None:
    assert [Video(8, 8, 24.0, 3.4).frames(count) for count in (0, 5, 10)] == [0, 17, 34]
    assert [Video(8, 8, 16.0, 4, first_frames=1).frames(count) for count in (0, 1, 2, 21)] == [0, 1, 5, 81]


def test_cleaning_of_prompts_is_read_back(tmp_path: Path) -> None:
    folder = toy.bundle_copy(tmp_path / "toy")
    bundle = Bundle.load(folder)
    cleaning = Cleaning(" score: 6.", unless="score:", rules="captions", passes=2)
    assert bundle.text is not None
    assert bundle.text.cleaning is None
    written = write_manifest(
        folder,
        name="toy",
        family="toy",
        version="1",
        components=bundle.components,
        text=replace(bundle.text, cleaning=cleaning),
        branches=("prompt", "image", "null"),
    )
    assert written.text == replace(bundle.text, cleaning=cleaning)
    assert written.branches == ("prompt", "image", "null")


def test_a_dim_without_a_size_is_named() -> None:
    with pytest.raises(BundleError, match=r"give 'ring' in the variant \(given: frames\)"):
        TensorSpec(("frames", "ring"), "int64").resolve({"frames": 8})


def test_missing_bundle() -> None:
    with pytest.raises(
        BundleError, match=r"there is no bundle 'nowhere': expected a folder .* or a bundled name"
    ):
        Bundle.load("nowhere")


def test_folder_without_manifest(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"is not a bundle: it has no manifest\.json"):
        Bundle.load(tmp_path)


def test_missing_file(tmp_path: Path) -> None:
    folder = toy.bundle_copy(tmp_path / "toy")
    (folder / "denoiser.cut1.onnx").unlink()
    with pytest.raises(BundleError, match=r"is incomplete: .*denoiser\.cut1\.onnx is missing"):
        Bundle.load(folder)


def test_truncated_and_changed_files_are_named(tmp_path: Path) -> None:
    folder = toy.bundle_copy(tmp_path / "toy")
    weights = folder / "weights.bin"
    whole = weights.read_bytes()
    for damaged in (whole[:-100], whole[:500] + b"\x00" + whole[501:], b""):
        weights.write_bytes(damaged)
        with pytest.raises(BundleError, match=r"corrupt: the sha256 of .*weights\.bin"):
            Bundle.load(folder)
    weights.write_bytes(whole)
    Bundle.load(folder)


def test_truncated_manifest(tmp_path: Path) -> None:
    folder = toy.bundle_copy(tmp_path / "toy")
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text()[:300])
    with pytest.raises(BundleError, match=r"manifest\.json cannot be read as JSON"):
        Bundle.load(folder)


def _without(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda manifest: manifest.pop(key)


def _escape(manifest: dict[str, Any]) -> None:
    manifest["files"]["../weights.bin"] = "0"


def _bad_dtype(manifest: dict[str, Any]) -> None:
    manifest["components"]["denoiser"]["inputs"]["latents"]["dtype"] = "complex64"


def _bad_pair(manifest: dict[str, Any]) -> None:
    manifest["components"]["decoder"]["state"] = {"memory": "nothing"}


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda manifest: manifest.update(format=99), "expected format 2 but got 99"),
        (lambda manifest: manifest.update(format=1), "expected format 2 but got 1; export the bundle again"),
        (
            lambda manifest: manifest.update(branches="prompt"),
            "branches must be a list but is 'prompt'",
        ),
        (lambda manifest: manifest.update(branches=["null", "null"]), "branches with names of their own"),
        (
            lambda manifest: manifest["text"].update(cleaning={"rules": "all"}),
            "text.cleaning.rules must be one of none, captions, whitespace but is 'all'",
        ),
        (_without("components"), "not a valid manifest \\(no 'components'\\)"),
        (_without("files"), "not a valid manifest \\(no 'files'\\)"),
        (_escape, "lies outside the bundle"),
        (_bad_dtype, "tensor 'latents' has dtype 'complex64'"),
        (_bad_pair, "pairs 'memory' with 'nothing'"),
        (lambda manifest: manifest["files"].pop("denoiser.onnx"), r"lists no file 'denoiser\.onnx'"),
    ],
)
def test_bad_manifests(tmp_path: Path, damage: Callable[[dict[str, Any]], None], sentence: str) -> None:
    folder = toy.bundle_copy(tmp_path / "toy")
    manifest = json.loads((folder / "manifest.json").read_text())
    damage(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=sentence) as caught:
        Bundle.load(folder)
    assert "\n" not in str(caught.value)


def test_unknown_component_lists_the_known() -> None:
    with pytest.raises(BundleError, match="no component 'vae', only decoder, denoiser, text_encoder"):
        toy.bundle().component("vae")
