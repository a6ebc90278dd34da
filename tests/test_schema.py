"""Manifests from elsewhere: whatever they say, a bundle is loaded or refused in one sentence, and nothing is written outside the cache."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import toy_family as toy
from hypothesis import given
from hypothesis import strategies as st

import pyengine
from pyengine.bundle import Bundle
from pyengine.bundle.bundle import BUNDLED
from pyengine.bundle.schema import check_manifest, is_inside
from pyengine.errors import BundleError

MANIFEST: dict[str, Any] = json.loads((BUNDLED / "shapes" / "manifest.json").read_text())


def at(manifest: Any, path: str, value: Any) -> dict[str, Any]:
    """A copy with another value at a dotted path."""
    changed = copy.deepcopy(manifest)
    *parents, last = path.split("/")
    place = changed
    for key in parents:
        place = place[int(key)] if isinstance(place, list) else place[key]
    place[int(last) if isinstance(place, list) else last] = value
    return dict(changed)


@pytest.mark.parametrize("name", ["shapes", "shapes-lvdm"])
def test_what_ships_is_valid(name: str) -> None:
    check_manifest(json.loads((BUNDLED / name / "manifest.json").read_text()))
    Bundle.load(name)


INPUT = "components/denoiser/inputs/latents"
CONSTANT = "components/denoiser/cut/constants/blocks.0.temporal.q_gain"
WRONG = [
    ("video/height", "64", "video.height must be a whole number from 1 to 16384 but is '64'"),
    ("video/height", True, "video.height"),
    ("video/width", 1.5, "video.width"),
    ("video/fps", 0, "video.fps must be a number above 0"),
    ("video/fps", float("nan"), "video.fps"),
    ("video/fps", float("inf"), "video.fps"),
    ("video/frames_per_latent", {}, "video.frames_per_latent"),
    ("video", [], "video must be an object"),
    ("latent/channels", -8, "latent.channels"),
    ("latent", {"channels": 8}, "no 'height' in latent"),
    ("text/max_tokens", "many", "text.max_tokens"),
    ("text/max_tokens", 10**9, "text.max_tokens"),
    ("text/tokenizer", "/etc/passwd", "'files' lists no file '/etc/passwd', which text.tokenizer names"),
    ("text/kind", "t6", "text.kind must be one of words, t5"),
    ("text/words", 0, "text.words"),
    ("method/guidance", float("nan"), "method.guidance must be a finite number"),
    ("method/guidance", "much", "method.guidance must be a finite number"),
    ("method/steps", [1], "method.steps must be a whole number from 1 to 65536 but is .1."),
    ("method/steps", 0, "method.steps must be a whole number"),
    ("method/cadence", None, "method.cadence must be a whole number"),
    ("method/chunk_frames", 1.5, "method.chunk_frames must be a whole number"),
    ("method/context/recent_frames", "6", "method.context.recent_frames must be a whole number"),
    ("method/sampler", {}, "method.sampler must be text"),
    ("method/ladder", [0, "1"], r"method.ladder\[1\] must be a number"),
    ("method/presets", {"fast": {"steps": "8"}}, "method.presets.fast.steps must be a whole number"),
    ("method/presets", ["fast"], "method.presets must be an object"),
    ("method/presets", {"fast": 3}, "method.presets.fast must be an object"),
    ("method/warp", {"a": {"b": {"c": {"d": {"e": {"f": {"g": {"h": {}}}}}}}}}, "nested too deep"),
    ("method/name", 5, "method.name must be text"),
    ("name", "../elsewhere", "name must be a name of letters"),
    ("name", "/abs", "name must be"),
    ("name", "..", "name must be"),
    ("name", "a" * 300, "name must be"),
    ("name", "a\0b", "name must be"),
    ("name", "", "name must be"),
    ("components", [], "components must be an object"),
    ("components/decoder/symbols/chunk", 0, "components.decoder.symbols.chunk"),
    ("components/decoder/symbols", {}, "has the symbol 'chunk', which has no size"),
    (f"{INPUT}/shape", "frames", "must be a list"),
    (f"{INPUT}/shape", [2**40], "must be a size"),
    (f"{INPUT}/shape", [-1], "must be a size"),
    (f"{INPUT}/shape", ["frames*"], "must be a size"),
    (f"{INPUT}/shape", [2**31 - 1] * 4, "must have at most .* elements"),
    (f"{INPUT}/shape", [1] * 9, "at most 8 dims"),
    (f"{INPUT}/dtype", "complex64", "tensor 'latents' has dtype 'complex64'"),
    (f"{CONSTANT}/offset", 10**9, "ends at byte .* of weights.bin, which has"),
    (f"{CONSTANT}/offset", -4, "offset must be a whole number"),
    (f"{CONSTANT}/shape", [2**31 - 1] * 8, "ends at byte"),
    (f"{CONSTANT}/dtype", "object", "dtype must be one of"),
    (f"{CONSTANT}/file", "../../weights.bin", "'files' lists no file"),
    ("components/denoiser/cut/steps/0/kind", "shell", "kind must be one of"),
    ("components/denoiser/cut/steps/0/inputs", ["nothing"], "names the tensor 'nothing', which is none"),
    ("components/denoiser/cut/steps", {}, "must be a list"),
    ("components/denoiser/portable", None, "portable must be text"),
    ("components/denoiser/inline", None, "inline must be an object"),
    ("files/a\0b", "0", "lies outside the bundle"),
    ("files/..", "0", "lies outside the bundle"),
]  # fmt: skip


def bundle_with(folder: Path, manifest: Any) -> Path:
    """The bundle that ships, under another manifest."""
    folder.mkdir()
    for name in os.listdir(BUNDLED / "shapes"):
        if name != "manifest.json":
            (folder / name).symlink_to(BUNDLED / "shapes" / name)
    text = manifest if isinstance(manifest, str) else json.dumps(manifest)
    (folder / "manifest.json").write_text(text)
    return folder


@pytest.mark.parametrize(("path", "value", "sentence"), WRONG)
def test_what_cannot_be_is_named(tmp_path: Path, path: str, value: Any, sentence: str) -> None:
    folder = bundle_with(tmp_path / "bundle", at(MANIFEST, path, value))
    with pytest.raises(BundleError, match=sentence) as caught:
        Bundle.load(folder)
    assert "\n" not in str(caught.value)


def test_files_stay_inside() -> None:
    for name in (
        "/etc/passwd",
        "../a",
        "a/../../b",
        "..",
        "",
        ".",
        "a\0b",
        "..\\a",
        "a" * 300,
        "a/" * 30 + "b",
    ):
        assert not is_inside(name), name
    for name in ("weights.bin", "a/b.onnx", "..a", "a..b", "ü.onnx"):
        assert is_inside(name), name


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, "[]", "3", "", "\udce9", "9" * 10_000, '{"format": 1}']
)
def test_what_is_no_manifest(tmp_path: Path, text: str) -> None:
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "manifest.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(BundleError) as caught:
        Bundle.load(folder)
    assert "\n" not in str(caught.value)


def test_nothing_is_written_outside_the_cache(tmp_path: Path) -> None:
    cache = tmp_path / "cache" / "plans"
    for name, component in (("../elsewhere", "denoiser"), ("shapes", "../../elsewhere")):
        manifest = at(MANIFEST, "name", name)
        manifest["components"][component] = manifest["components"].pop("denoiser")
        folder = bundle_with(tmp_path / f"bundle-{len(name)}", manifest)
        with pytest.raises(BundleError):
            pyengine.load(folder, cache_dir=cache, choice="inline")
    assert not (tmp_path / "cache").exists() or not any(tmp_path.rglob("elsewhere*"))


def paths(value: Any, prefix: str = "") -> list[str]:
    """Every place of a manifest."""
    found = []
    items = enumerate(value) if isinstance(value, list) else value.items() if isinstance(value, dict) else ()
    for key, item in items:
        if "/" not in str(key):
            found += [f"{prefix}{key}", *paths(item, f"{prefix}{key}/")]
    return found


SMALL = {
    **MANIFEST,
    "components": {name: MANIFEST["components"][name] for name in ("decoder", "text_encoder")},
}
VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(10**20, 10**30), st.floats(), st.text(max_size=8),
    st.sampled_from(["../x", "/abs", "a\0", "frames", "2*chunk", "weights.bin"]),
    st.lists(st.integers(-2, 5), max_size=3), st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)  # fmt: skip


@given(st.lists(st.tuples(st.sampled_from(paths(SMALL)), VALUES), min_size=1, max_size=3))
def test_any_change_is_loaded_or_refused(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[str, Any]]
) -> None:
    manifest = SMALL
    for path, value in changes:
        try:
            manifest = at(manifest, path, value)
        except (KeyError, IndexError, TypeError, ValueError):  # an earlier change took the place away
            continue
    folder = tmp_path_factory.getbasetemp() / "any"
    if not folder.exists():
        bundle_with(folder, MANIFEST)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    try:
        bundle = Bundle.load(folder, verify=False)
    except BundleError:
        return
    assert is_inside(bundle.name)
    assert bundle.video is None or bundle.video.height > 0


def test_exported_bundles_are_valid() -> None:
    check: Callable[[Any], None] = check_manifest
    check(json.loads((toy.bundle().folder / "manifest.json").read_text()))
