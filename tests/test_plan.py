"""Building and caching plans: hit, miss, damage, two builders at once, and the sentence when it cannot be."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy_family as toy

from pyengine import _C
from pyengine.backends import base as backends
from pyengine.backends.openvino import OpenVINO
from pyengine.build.builder import build
from pyengine.build.library import VariantLibrary
from pyengine.build.trial import rows_are_exact
from pyengine.bundle.variant import Variant
from pyengine.errors import BackendUnavailable, ConfigError, PlanError
from pyengine.options import EngineOptions
from pyengine.plans.cache import KEPT_DAYS
from pyengine.plans.plan import Plan
from pyengine.runtime.executor import Executor
from pyengine.runtime.program import Program

Calls = list[tuple[int, int, str]]
TOGETHER = toy.DENOISER.sized(streams=2)  # what is always cut


@pytest.fixture(autouse=True)
def _own_temporary_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one test could keep nowhere else is not found by another."""
    monkeypatch.setattr("pyengine.plans.cache._temporary", [])


def make(cache: Path, *, variants: list[Variant] | None = None, **options: Any) -> tuple[Plan, Calls]:
    calls: Calls = []
    options = {"choice": "cut"} | options
    plan = build(
        toy.bundle(),
        variants=variants or [toy.DENOISER],
        cache_dir=cache,
        progress=lambda *call: calls.append(call),
        **options,
    )
    return plan, calls


def velocity(plan: Plan) -> np.ndarray:
    executor = Executor(Program(plan))
    rng = np.random.default_rng(0)
    for array in executor.inputs(toy.DENOISER).values():
        if array.dtype == np.float32:
            array[...] = rng.random(array.shape, np.float32)
    executor.run(toy.DENOISER)
    return executor.output(toy.DENOISER, "prediction").copy()


def folders(cache: Path) -> list[Path]:
    return sorted(path for path in (cache / "toy").iterdir())


def test_both_choices_are_timed_and_the_faster_is_kept(tmp_path: Path) -> None:
    plan, calls = make(tmp_path, choice="auto")
    part = plan.part(toy.DENOISER)
    seconds = {choice: value for choice, value in part.seconds.items() if value is not None}
    assert set(seconds) == {"cut", "inline"}
    assert part.choice == min(seconds, key=lambda choice: seconds[choice])
    record = json.loads((part.folder / "plan.json").read_text())
    assert record["choice"] == part.choice
    assert record["seconds"] == dict(part.seconds)
    counts = [done for done, total, _ in calls]
    assert counts == sorted(counts)
    assert counts[-1] == calls[-1][1] == 6  # 4 cut segments and 2 inlined ones


def test_second_build_loads_and_gives_the_same(tmp_path: Path) -> None:
    first, calls = make(tmp_path)
    second, again = make(tmp_path)
    assert calls
    assert not again
    assert not second.loaded
    assert np.array_equal(velocity(first), velocity(second))


def test_each_variant_is_cached_on_its_own(tmp_path: Path) -> None:
    make(tmp_path)
    plan, calls = make(tmp_path, variants=[toy.DENOISER, toy.DECODER])
    assert [what for _, _, what in calls] == ["compiling decoder.inline.onnx"]
    assert list(plan.parts) == [toy.DENOISER, toy.DECODER]


def test_a_build_deletes_what_nobody_used_for_long(tmp_path: Path) -> None:
    make(tmp_path, precision="fp32", choice="inline")
    (old,) = folders(tmp_path)
    month_old = time.time() - 0.5 * KEPT_DAYS * 86400
    long_ago = time.time() - 1.5 * KEPT_DAYS * 86400
    os.utime(old / "plan.json", (month_old, month_old))
    make(tmp_path, precision="fp32", choice="cut")
    assert old in folders(tmp_path)
    os.utime(old / "plan.json", (long_ago, long_ago))
    _, calls = make(tmp_path, precision="fp32", choice="inline")  # reading it makes it young again
    assert not calls
    make(tmp_path, precision="fp32", choice="auto")
    assert old in folders(tmp_path)
    os.utime(old / "plan.json", (long_ago, long_ago))
    make(tmp_path, precision="fp32", choice="cut", threads=1)
    assert old not in folders(tmp_path)


@pytest.mark.parametrize("changed", ["precision", "threads", "choice", "isa", "version", "device", "weights"])
def test_anything_in_the_key_rebuilds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str, caplog: pytest.LogCaptureFixture
) -> None:
    make(tmp_path, precision="fp32")
    options: dict[str, Any] = {"precision": "fp32"}
    if changed == "isa":
        monkeypatch.setattr(_C, "cpu_isa", lambda: "another")
    elif changed in ("version", "device"):
        monkeypatch.setattr(backends.get("openvino"), changed, "another")
    elif changed == "weights":
        monkeypatch.setattr(type(toy.bundle()), "digest", "another")
    else:
        options |= {
            "precision": {"precision": "bf16"},
            "threads": {"threads": 1},
            "choice": {"choice": "inline"},
        }[changed]
    if changed == "precision" and backends.get("openvino").precision("auto") == "fp32":
        pytest.skip("this machine has no bf16")
    _, calls = make(tmp_path, **options)
    assert calls
    said = [record.message for record in caplog.records if "of another version or machine" in record.message]
    assert len(said) == (changed not in ("precision", "threads", "choice"))
    assert len(folders(tmp_path)) == 2


@pytest.mark.parametrize("damage", ["truncated engine", "missing engine", "no json", "other json"])
def test_a_damaged_plan_is_rebuilt_and_said_once(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    first, _ = make(tmp_path)
    expected = velocity(first)
    (folder,) = folders(tmp_path)
    engine = folder / "1.engine"
    if damage == "truncated engine":
        engine.write_bytes(engine.read_bytes()[:-100])
    elif damage == "missing engine":
        engine.unlink()
    else:
        (folder / "plan.json").write_text("{" if damage == "no json" else "[]")
    plan, calls = make(tmp_path)
    assert calls
    assert len(caplog.records) == 1
    assert "is corrupt" in caplog.text
    assert "building it again" in caplog.text
    assert np.array_equal(velocity(plan), expected)
    assert folders(tmp_path) == [folder]
    assert not make(tmp_path)[1]


@pytest.mark.parametrize(
    "damage",
    ["an engine too few", "unknown choice", "a choice without that form", "file elsewhere", "odd seconds"],
)
def test_a_record_that_does_not_fit_is_built_again(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    make(tmp_path, variants=[toy.DECODER])
    (folder,) = folders(tmp_path)
    record = json.loads((folder / "plan.json").read_text())
    if damage == "an engine too few":
        record["engines"].pop()
    elif damage == "file elsewhere":
        outside = tmp_path / "0.engine"
        (folder / "0.engine").rename(outside)
        record["engines"][0]["file"] = str(outside)
    elif damage == "odd seconds":
        record["seconds"] = {"inline": "soon"}
    else:
        record["choice"] = "cut" if damage == "a choice without that form" else "magic"
    (folder / "plan.json").write_text(json.dumps(record))
    _, calls = make(tmp_path, variants=[toy.DECODER])
    assert calls
    assert "is corrupt" in caplog.text
    assert "building it again" in caplog.text
    assert not make(tmp_path, variants=[toy.DECODER])[1]


def test_an_engine_that_the_backend_refuses_is_built_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Damage that its hash does not tell."""
    make(tmp_path, variants=[toy.TEXT_ENCODER])
    (folder,) = folders(tmp_path)
    record = json.loads((folder / "plan.json").read_text())
    (folder / "0.engine").write_bytes(b"no engine")
    record["engines"][0]["sha256"] = hashlib.sha256(b"no engine").hexdigest()
    (folder / "plan.json").write_text(json.dumps(record))
    library = VariantLibrary(toy.bundle(), EngineOptions(choice="cut", cache_dir=tmp_path))
    executor = library.program([toy.TEXT_ENCODER]).executor()
    executor.run(toy.TEXT_ENCODER)
    executor.close()
    assert "building it again" in caplog.text
    assert (folder / "0.engine").read_bytes() != b"no engine"


def test_a_build_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the disk is full half way through, here and in the temporary folder."""
    saved = OpenVINO.save

    def full(self: OpenVINO, engine: Any, path: Path) -> bool:
        if path.name == "2.engine":
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return saved(self, engine, path)

    monkeypatch.setattr(OpenVINO, "save", full)
    plan, _ = make(tmp_path)
    assert np.isfinite(velocity(plan)).all()
    assert "No space left on device" in caplog.text
    assert not folders(tmp_path)

    def interrupted(self: OpenVINO, engine: Any, path: Path) -> bool:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(OpenVINO, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path)
    assert not folders(tmp_path)
    library = VariantLibrary(toy.bundle(), EngineOptions(choice="cut", cache_dir=tmp_path))
    monkeypatch.setattr(OpenVINO, "save", full)
    assert library.program([toy.DENOISER]).engines(toy.DENOISER)  # kept nowhere, and yet it runs


def test_what_a_killed_builder_left_is_removed(tmp_path: Path) -> None:
    make(tmp_path, variants=[toy.DECODER])
    old, new = (tmp_path / "toy" / f".decoder.{name}" for name in ("old", "new"))
    for path in (old, new):
        path.mkdir()
        (path / "0.engine").write_bytes(b"half")
    long_ago = time.time() - 2 * 86400
    os.utime(old, (long_ago, long_ago))
    make(tmp_path, variants=[toy.TEXT_ENCODER])
    assert not old.exists()
    assert new.exists()  # its builder may be at work


@pytest.mark.parametrize("place", ["a name too long", "below a file", "forbidden"])
def test_a_cache_that_cannot_be_used_costs_a_warning(
    tmp_path: Path, place: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    cache = tmp_path / ("a" * 300) if place == "a name too long" else tmp_path / "file" / "plans"
    if place == "forbidden":  # by permissions, which a superuser would not notice
        cache = tmp_path / "closed"
        exists = Path.exists

        def refuse(path: Path, **options: Any) -> bool:
            if cache in (path, *path.parents):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return exists(path, **options)

        monkeypatch.setattr(Path, "exists", refuse)
    plan, _ = make(cache, variants=[toy.DECODER, toy.TEXT_ENCODER])
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "cannot be kept" in caplog.text
    assert "PYENGINE_CACHE" in caplog.text
    assert all((part.folder / "0.engine").is_file() for part in plan.parts.values())  # in a temporary folder
    assert not make(cache, variants=[toy.DECODER])[1]  # found there by the same process


def test_openvino_writes_nothing_into_the_home_folder(tmp_path: Path) -> None:
    code = (
        "import pyengine.backends.openvino, sys, openvino_telemetry, openvino as ov; ov.Core(); "
        "assert sys.modules['openvino_telemetry'] is not None"
    )
    hidden = {"CI", "TF_BUILD", "JENKINS_URL"}  # where it counts nobody anyway
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    subprocess.run([sys.executable, "-P", "-c", code], env=environment | {"HOME": str(tmp_path)}, check=True)
    assert not list(tmp_path.iterdir())


def test_two_builders_at_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        plans = [plan for plan, _ in pool.map(lambda _: make(tmp_path), range(2))]
    assert len(folders(tmp_path)) == 1
    assert np.array_equal(*map(velocity, plans))
    assert not make(tmp_path)[1]


def test_a_cache_that_cannot_be_written_costs_only_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    plan, _ = make(tmp_path / "file")
    assert "cannot be kept" in caplog.text
    assert "PYENGINE_CACHE" in caplog.text
    assert np.isfinite(velocity(plan)).all()


def test_cache_folder_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYENGINE_CACHE", str(tmp_path / "here"))
    build(toy.bundle(), variants=[toy.TEXT_ENCODER])
    assert folders(tmp_path / "here")


def test_onnxruntime_plans_hold_no_engines(tmp_path: Path) -> None:
    first, _ = make(tmp_path, backend="onnxruntime")
    second, again = make(tmp_path, backend="onnxruntime")
    assert not again
    assert first.part(toy.DENOISER).engines == (None,) * 4
    assert np.allclose(velocity(first), velocity(second), atol=1e-6)


def test_many_streams_with_rings_are_cut(tmp_path: Path) -> None:
    plan, _ = make(tmp_path, variants=[TOGETHER], choice="auto")
    assert set(plan.part(TOGETHER).seconds) == {"cut"}
    with pytest.raises(ConfigError, match="cannot find the rings of several streams, but got 'inline'"):
        make(tmp_path, variants=[TOGETHER], choice="inline")


def test_the_plan_remembers_whether_streams_are_exact(tmp_path: Path) -> None:
    options = EngineOptions(choice="cut", cache_dir=tmp_path)
    library = VariantLibrary(toy.bundle(), options)
    program = library.program([toy.DENOISER, TOGETHER])
    library.try_streams(program, program)
    exact = program.plan.part(TOGETHER).exact
    assert type(exact) is bool
    assert program.plan.part(toy.DENOISER).exact is None
    library = VariantLibrary(toy.bundle(), options)
    assert library.program([TOGETHER]).plan.part(TOGETHER).exact is exact  # found, not tried again
    record = program.plan.part(TOGETHER).folder / "plan.json"
    record.write_text(record.read_text().replace(f'"exact": {str(exact).lower()}', '"exact": "yes"'))
    assert make(tmp_path, variants=[TOGETHER])[0].part(TOGETHER).exact is None  # such a record is no record


def test_streams_that_change_each_other_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, _ = make(tmp_path, variants=[toy.DENOISER, TOGETHER])
    program, run = Program(plan), Executor.run
    last = np.s_[:, -1, 0, 0, 0, 0]

    def leaky(executor: Executor, variant: Variant) -> None:
        run(executor, variant)
        if variant == TOGETHER:
            prediction = executor.output(variant, "prediction")
            prediction[last] = np.nextafter(prediction[last], np.float32(np.inf))

    if not rows_are_exact(program, toy.DENOISER, program, TOGETHER):
        pytest.skip("this compiler rounds streams of one run differently")
    monkeypatch.setattr(Executor, "run", leaky)
    assert not rows_are_exact(program, toy.DENOISER, program, TOGETHER)


def test_missing_backend_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delitem(sys.modules, "pyengine.backends.onnxruntime", raising=False)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendUnavailable, match=r"pip install 'pyengine-video\[onnxruntime\]'"):
        make(tmp_path, backend="onnxruntime")


def test_bad_settings_are_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"\[backend\] expected one of openvino, onnxruntime, tensorrt but got 'tpu'"
    ):
        make(tmp_path, backend="tpu")
    with pytest.raises(
        ConfigError, match=r"\[precision\] expected one of auto, bf16, fp16, fp32 but got 'int3'"
    ):
        make(tmp_path, precision="int3")
    with pytest.raises(ConfigError, match="use backend openvino for bf16"):
        make(tmp_path, backend="onnxruntime", precision="bf16")
    with pytest.raises(ConfigError, match=r"\[choice\] expected one of auto, cut, inline but got 'fast'"):
        make(tmp_path, choice="fast")


def test_a_segment_that_does_not_compile_is_one_sentence(tmp_path: Path) -> None:
    folder = toy.bundle_copy(tmp_path / "toy")
    (folder / "text_encoder.inline.onnx").write_bytes(b"not onnx")
    damaged = replace(toy.bundle(), folder=folder)
    for backend in ("openvino", "onnxruntime"):
        with pytest.raises(PlanError, match=r"text_encoder\.inline\.onnx") as caught:
            build(damaged, variants=[toy.TEXT_ENCODER], backend=backend, cache_dir=tmp_path / "cache")
        assert "\n" not in str(caught.value)


def test_auto_falls_back_when_one_choice_does_not_compile(tmp_path: Path) -> None:
    folder = toy.bundle_copy(tmp_path / "toy")
    (folder / "denoiser.inline.onnx").write_bytes(b"not onnx")
    plan = build(replace(toy.bundle(), folder=folder), variants=[toy.DENOISER], cache_dir=tmp_path / "cache")
    assert plan.part(toy.DENOISER).choice == "cut"
