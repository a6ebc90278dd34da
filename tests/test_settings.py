"""Settings read from mappings: any mapping at all is either what it says or one ConfigError that names the setting."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pyengine
from pyengine.bundle.bundle import Bundle
from pyengine.errors import BundleError, ConfigError
from pyengine.methods import (
    SETTINGS,
    HierarchicalSettings,
    ProgressiveSettings,
    ReplacementSettings,
    RflowSettings,
    make_method,
    method_settings,
)
from pyengine.settings import Range, read

PROMPT = "a red circle bounces over a blue background"
SHAPES = dict(Bundle.load("shapes", verify=False).method)
LVDM = dict(Bundle.load("shapes-lvdm", verify=False).method)
CLIP = {"name": "rflow", "clip_frames": 8, "frames_per_latent": 4}


@dataclass(frozen=True, kw_only=True)
class Inner:
    kind: Literal["ring", "none"] = "ring"
    frames: Annotated[int, Range(0, 10)]


@dataclass(frozen=True, kw_only=True)
class Outer:
    count: int
    flag: bool = False
    share: Annotated[float, Range(0, 1, above=True)] = 1.0
    size: float | Inner = 1.0
    inner: Inner | None = None
    rows: tuple[int, ...] | None = None
    pair: tuple[float, float] = (0.0, 1.0)
    name: str = ""
    folder: Path | None = None


def test_reads_every_type() -> None:
    made = read(
        Outer,
        {
            "count": np.int64(3),
            "flag": np.True_,
            "share": np.float32(0.5),
            "size": {"frames": 2},
            "inner": None,
            "rows": np.array([1, 2]),
            "pair": [1, 2],
            "folder": "plans",
        },
        "outer",
    )
    assert made == Outer(
        count=3,
        flag=True,
        share=0.5,
        size=Inner(frames=2),
        rows=(1, 2),
        pair=(1.0, 2.0),
        folder=Path("plans"),
    )
    assert [type(value) for value in (made.count, made.flag, made.share, made.pair[0])] == [
        int,
        bool,
        float,
        float,
    ]
    assert json.loads(json.dumps(asdict(made), default=str))["rows"] == [1, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": "8"}, "[outer.count] expected a whole number but got '8' (str)"),
        ({"count": True}, "[outer.count] expected a whole number but got True (bool)"),
        ({"count": 8.0}, "[outer.count] expected a whole number but got 8.0 (float)"),
        ({"count": None}, "[outer.count] expected a whole number but got none"),
        ({"flag": 1}, "[outer.flag] expected true or false but got 1 (int)"),
        (
            {"share": float("nan")},
            "[outer.share] expected a finite number above 0 and up to 1 but got nan (float)",
        ),
        ({"share": 0}, "[outer.share] expected a finite number above 0 and up to 1 but got 0 (int)"),
        ({"share": 10**400}, "[outer.share] expected a finite number above 0 and up to 1 but got 1000"),
        (
            {"size": "big"},
            "[outer.size] expected a finite number or a mapping of kind, frames but got 'big' (str)",
        ),
        (
            {"size": {"frames": 11}},
            "[outer.size.frames] expected a whole number from 0 to 10 but got 11 (int)",
        ),
        (
            {"inner": {"kind": "rings", "frames": 1}},
            "[outer.inner.kind] expected one of ring, none but got 'rings' (str)",
        ),
        (
            {"inner": {}},
            "[outer.inner] expected outer.inner.frames (a whole number from 0 to 10) but it is missing",
        ),
        (
            {"inner": {"frames": 1, "fps": 2}},
            "[outer.inner] expected settings out of kind, frames but got fps",
        ),
        ({"rows": [1, "2"]}, "[outer.rows[1]] expected a whole number but got '2' (str)"),
        ({"rows": 3}, "[outer.rows] expected a list of whole numbers or none but got 3 (int)"),
        (
            {"pair": [1]},
            "[outer.pair] expected a list of a finite number and a finite number but got [1] (list)",
        ),
        ({"name": 3}, "[outer.name] expected text but got 3 (int)"),
        ({"folder": "a\0b"}, "[outer.folder] expected a path or none but got 'a\\x00b' (str)"),
        ({3: 4}, "[outer] expected settings out of count, flag, share,"),
    ],
)
def test_says_what_was_expected_and_what_came(changes: dict[Any, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(Outer, {"count": 1} | changes, "outer")
    assert str(caught.value).startswith(message)


def test_a_long_value_is_shortened() -> None:
    with pytest.raises(ConfigError) as caught:
        read(Outer, {"count": "x" * 10_000}, "outer")
    assert len(str(caught.value)) < 200
    nested: list[Any] = []
    for _ in range(100_000):
        nested = [nested]
    with pytest.raises(ConfigError) as caught:
        read(Outer, {"count": nested}, "outer")
    assert len(str(caught.value)) < 200


def test_manifests_of_the_bundles_read_back_as_the_same() -> None:
    for own, kind in ((SHAPES, ProgressiveSettings), (LVDM, HierarchicalSettings)):
        settings = method_settings(own)
        assert type(settings) is kind
        assert method_settings(json.loads(json.dumps(asdict(settings)))) == settings


def test_presets_and_other_methods_keep_what_they_share() -> None:
    assert method_settings(LVDM, {"preset": "ddpm"}).steps == 1000
    assert method_settings(LVDM, {"preset": "ddpm", "steps": 500}).steps == 500
    clip = method_settings(SHAPES, CLIP)
    assert isinstance(clip, RflowSettings)
    assert (clip.steps, clip.warp, clip.guidance, clip.context) == (
        16,
        2.0,
        2.0,
        method_settings(SHAPES).context,
    )
    rows = {"clip_frames": 8, "overlap_frames": 2, "renoised": True, "ring_frames": 6}
    assert isinstance(method_settings(SHAPES, {"name": "replacement", **rows}), ReplacementSettings)


REFUSED = [
    (
        {"name": "replacement"},
        "method.clip_frames .*, method.overlap_frames .*, method.renoised .*, method.ring",
    ),
    ({"steps": "8"}, r"\[method.steps\] expected a whole number from 1 to 65536 but got '8' \(str\)"),
    ({"steps": 0}, r"\[method.steps\] expected a whole number from 1 to 65536 but got 0"),
    ({"cadence": None}, r"\[method.cadence\] expected a whole number .* but got none"),
    ({"cadence": 17}, "cadence must be from 0 to the 16 steps but is 17"),
    (
        {"context": {"kind": "ring"}},
        r"\[method.context\] expected method.context.sink_frames .*, method.context.recent",
    ),
    (
        {"context": {"kind": "rings", "sink_frames": 0, "recent_frames": 6}},
        r"\[method.context.kind\] .* 'rings'",
    ),
    (
        {"warp": {"rule": "other", "height": 1, "width": 1}},
        r"\[method.warp.rule\] expected 'rflow' but got 'other'",
    ),
    (
        {"warp": {"rule": "rflow", "size": 3}},
        r"\[method.warp\] expected settings out of rule, height, .* but got size",
    ),
    ({"warp": float("inf")}, r"\[method.warp\] expected a finite number above 0 or a mapping of rule"),
    ({"ladder": [0, 1]}, "ladder must be 17 levels"),
    ({"sampler": "ddim"}, r"\[method.sampler\] expected one of euler, renoise but got 'ddim'"),
    ({"positions": "far"}, r"\[method.positions\] expected one of absolute, local"),
    ({"preset": ["a"]}, r"\[method.preset\] expected a preset out of none but got \['a'\] \(list\)"),
    (
        {"name": ["a"]},
        r"\[method.name\] expected a method out of progressive, .*, streamingt2v.* but got \['a'\] \(list\)",
    ),
    ({"spets": 4}, r"\[method\] expected settings out of steps, .* but got spets"),
    ({"name": "replacement", "cadence": 4}, r"\[method\] expected settings out of .* but got cadence"),
    ("fast", r"\[method\] expected a mapping of settings but got 'fast' \(str\)"),
    ({"name": "rflow", "frames_per_latent": 4}, "method rflow makes one clip and needs its length"),
    ({**CLIP, "clip_frames": 1}, r"\[method.clip_frames\] expected room for a chunk of 2 .* but got 1"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_names_the_setting_of_a_method(changes: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_method(method_settings(SHAPES, changes), None, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 2000}, r"steps must lie in 1\.\.1000 but is 2000"),
        ({"betas": [0.5, 0.1]}, r"\[method.betas\] expected two numbers that rise"),
        ({"stride": 5}, r"\[method.chunk_frames\] expected 5, the latents that one interval adds, but got 4"),
        ({"perturbation": 251}, r"\[method.perturbation\] expected a timestep from 0 to 250"),
        ({"eta": -1}, r"\[method.eta\] expected a finite number from 0 to 1"),
    ],
)
def test_names_the_setting_of_two_levels(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_method(method_settings(LVDM, changes), 3, 0)


def _values() -> st.SearchStrategy[Any]:
    numbers = st.one_of(
        st.integers(-3, 40),
        st.integers(),
        st.floats(),
        st.sampled_from([10**400, -(10**400), True, False]),
        st.integers(-3, 40).map(np.int64),
        st.integers(0, 255).map(np.uint8),
        st.floats(width=32).map(np.float32),
        st.sampled_from([np.bool_(True), np.array(3), np.array([1.0, 2.0]), np.zeros((2, 2))]),
    )
    words = st.sampled_from(
        [
            "ring",
            "recompute",
            "none",
            "rflow",
            "euler",
            "renoise",
            "local",
            "slot",
            "windowed",
            "whole",
            "streamed",
        ]
    )
    leaves = st.one_of(st.none(), numbers, words, st.text(max_size=8), st.binary(max_size=4))
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.lists(inner, max_size=3), st.dictionaries(st.one_of(_keys(), st.integers()), inner, max_size=4)
        ),
        max_leaves=6,
    )


def _keys() -> st.SearchStrategy[str]:
    known = {field.name for kind in SETTINGS.values() for field in fields(kind)}
    inner = {"kind", "sink_frames", "recent_frames", "rule", "height", "width", "frames", "preset", "presets"}
    return st.one_of(st.sampled_from(sorted(known | inner)), st.text(max_size=6))


def _mappings() -> st.SearchStrategy[dict[Any, Any]]:
    return st.dictionaries(st.one_of(_keys(), st.integers(), st.none()), _values(), max_size=5)


NAMES = st.sampled_from([*SETTINGS, None])
GOOD = {
    "clip_frames": 4,
    "overlap_frames": 2,
    "renoised": False,
    "ring_frames": 6,
    "frames_per_latent": 4,
    "timesteps": 1000,
    "eta": 1.0,
    "betas": [0.0015, 0.0155],
    "cadence": 4,
    "context": {"kind": "ring", "sink_frames": 0, "recent_frames": 6},
    "chunk_frames": 2,
    "guidance": 1.0,
    "steps": 16,
}


@given(st.sampled_from([SHAPES, LVDM, {}]), NAMES, _mappings(), st.booleans(), st.sampled_from([None, 1, 3]))
def test_any_mapping_is_a_method_or_a_config_error(
    own: dict[str, Any], name: str | None, changes: dict[Any, Any], is_helped: bool, chunks: int | None
) -> None:
    """`is_helped` gives what another method needs, so that the changes themselves are reached."""
    if name is not None:
        known = {field.name for field in fields(SETTINGS[name])}
        helped = {key: value for key, value in GOOD.items() if is_helped and key in known}
        changes = {**helped, "name": name, **changes}
    said = ""
    try:
        settings = method_settings(own, changes)
        assert make_method(settings, chunks, 0).chunk_frames >= 1
        assert method_settings(json.loads(json.dumps(asdict(settings)))) == settings
    except ConfigError as error:
        said = str(error)
    assert "\n" not in said
    assert len(said) < 1500


@given(st.one_of(_values(), _mappings()), st.one_of(_values(), _mappings()))
def test_any_values_are_a_method_or_a_config_error(own: Any, changes: Any) -> None:
    with pytest.raises(ConfigError):
        make_method(method_settings(own, changes), None, 0)  # none of these is complete


@pytest.mark.parametrize(
    "options",
    [
        {"frames": "10"},
        {"frames": 1.5},
        {"frames": float("nan")},
        {"seconds": "1"},
        {"seconds": float("inf")},
        {"seconds": 1e300},
        {"seed": "x"},
        {"seed": None},
        {"guidance": "much"},
        {"guidance": float("nan")},
        {"method": "fast"},
        {"method": {"context": {"kind": "ring"}}},
        {"method": {"name": "replacement"}},
    ],
)
def test_a_stream_refuses_options_of_a_wrong_type(engine: pyengine.Engine, options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ConfigError, match=rf"\[{name}"):
        engine.stream(PROMPT, **options)


def test_numbers_of_numpy_are_numbers(engine: pyengine.Engine) -> None:
    numbers = {"frames": np.int64(4), "seed": np.uint8(3), "guidance": np.float32(2)}
    method = {"steps": np.int32(16), "warp": np.float64(2)}
    with (
        engine.stream(PROMPT, **numbers, method=method) as stream,
        engine.stream(PROMPT, frames=4, seed=3, guidance=2.0) as plain,
    ):
        assert np.array_equal(np.stack(list(stream)), np.stack(list(plain)))
        assert stream.snapshot()


def test_a_clip_ends_after_its_length(engine: pyengine.Engine) -> None:
    with engine.stream(PROMPT, method={**CLIP, "clip_frames": 4, "steps": 2}) as stream:
        assert stream.frames == 16
        assert len(list(stream)) == 16


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"spets": 8}, r"\[method\] expected settings out of .* but got spets"),
        ({"sampler": "fast"}, r"\[method.sampler\] expected one of euler, renoise"),
        (
            {"context": {"kind": "rings", "sink_frames": 0, "recent_frames": 6}},
            r"\[method.context.kind\] expected one of ring",
        ),
        ({"presets": {"fast": {"spets": 8}}}, r"\[method\] expected settings .*, in the preset fast"),
    ],
)
def test_a_manifest_that_cannot_be_read_is_a_bundle_error(
    tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    source = Bundle.load("shapes").folder
    for path in source.iterdir():
        (tmp_path / path.name).symlink_to(path)
    manifest = json.loads((source / "manifest.json").read_text())
    manifest["method"] |= changes
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=f"{sentence}.*export it again"):
        pyengine.load(tmp_path)
