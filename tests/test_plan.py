"""Building and caching plans: hit, miss, damage, two builders at once, and the sentence when it cannot be."""

from __future__ import annotations

import json
import os
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
from pyengine.build.builder import build
from pyengine.bundle.variant import Variant
from pyengine.errors import BackendUnavailable, ConfigError, PlanError
from pyengine.plans.cache import KEPT_DAYS
from pyengine.plans.plan import Plan
from pyengine.runtime.executor import Executor
from pyengine.runtime.program import Program

Calls = list[tuple[int, int, str]]


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
    return executor.output(toy.DENOISER, "velocity").copy()


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


def test_missing_backend_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delitem(sys.modules, "pyengine.backends.onnxruntime", raising=False)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendUnavailable, match=r"pip install 'pyengine-video\[onnxruntime\]'"):
        make(tmp_path, backend="onnxruntime")


def test_bad_settings_are_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="expected a backend out of openvino, onnxruntime, tensorrt but got 'tpu'"
    ):
        make(tmp_path, backend="tpu")
    with pytest.raises(ConfigError, match="expected precision auto, bf16 or fp32 but got 'int3'"):
        make(tmp_path, precision="int3")
    with pytest.raises(ConfigError, match="use backend openvino for bf16"):
        make(tmp_path, backend="onnxruntime", precision="bf16")
    with pytest.raises(ConfigError, match="expected a choice out of auto, cut, inline but got 'fast'"):
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
