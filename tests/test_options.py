"""EngineOptions: one dataclass behind load, build, the commands and the benchmark, so that no option is dropped on the way."""

from __future__ import annotations

import argparse
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

import pyengine
from pyengine.build.targets import build_targets
from pyengine.cli import main
from pyengine.commands import bench as bench_command
from pyengine.commands import build as build_command
from pyengine.commands.engine_options import HELP, add_engine_options, engine_options
from pyengine.errors import ConfigError
from pyengine.options import EngineOptions

WORDS: dict[str, Any] = {
    "backend": "tensorrt",
    "device": "cuda",
    "precision": "fp16",
    "choice": "cut",
    "cache_dir": "plans",
    "threads": 2,
    "refit": True,
    "ring": "fp8",
    "memory_budget": 1000,
}


def flags() -> list[str]:
    """A command line that says all of WORDS."""
    words = []
    for name, value in WORDS.items():
        flag = "--cache" if name == "cache_dir" else f"--{name.replace('_', '-')}"
        words += [flag] if value is True else [flag, str(value)]
    return words


def test_every_option_has_a_flag_that_arrives() -> None:
    assert set(HELP) == set(WORDS) == {field.name for field in fields(EngineOptions)}
    parser = argparse.ArgumentParser()
    add_engine_options(parser)
    assert engine_options(parser.parse_args([])) == EngineOptions()
    wanted = EngineOptions(**WORDS)
    assert engine_options(parser.parse_args(flags())) == wanted
    assert wanted.cache_dir == Path("plans")
    assert all(getattr(wanted, name) != getattr(EngineOptions(), name) for name in WORDS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threads": 0}, r"\[threads\] expected a whole number from 1 to 4096 or none but got 0"),
        ({"threads": "2"}, r"\[threads\] expected a whole number .* but got '2' \(str\)"),
        ({"refit": 1}, r"\[refit\] expected true or false but got 1 \(int\)"),
        ({"cache_dir": 3}, r"\[cache_dir\] expected a path or none but got 3"),
        ({"device": "gpu"}, r"\[device\] expected one of auto, cpu, cuda but got 'gpu'"),
        (
            {"memory_budget": -1},
            r"\[memory_budget\] expected a whole number of at least 0 or none but got -1",
        ),
    ],
)
def test_a_bad_option_is_refused_by_its_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineOptions(**options)
    with pytest.raises(ConfigError, match=message):
        pyengine.load("shapes", **options)
    with pytest.raises(ConfigError, match=message):
        replace(EngineOptions(), **options)


def test_bench_and_builds_for_other_gpus_get_every_option(monkeypatch: pytest.MonkeyPatch) -> None:
    """`bench` used to drop --ring and --refit, `build --target` --ring."""
    seen: dict[str, EngineOptions] = {}

    def bench(bundle: str, *, options: EngineOptions, **_: Any) -> dict[str, Any]:
        seen["bench"] = options
        return {}

    def targets(bundle: str, targets: list[str], options: EngineOptions, progress: Any) -> list[Any]:
        seen["targets"] = options
        return []

    monkeypatch.setattr(bench_command, "bench", bench)
    monkeypatch.setattr(build_command, "build_targets", targets)
    assert main(["bench", "shapes", "--json", *flags()]) == 0
    assert main(["build", "shapes", "--json", "--target", "sm89", *flags()]) == 0
    wanted = EngineOptions(**WORDS)
    assert seen == {"bench": wanted, "targets": wanted}


def test_what_does_not_go_together_is_refused_before_anything_is_measured(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["bench", "shapes", "--no-peers", "--ring", "fp8"]) == 2
    assert "a ring in fp8 needs device cuda" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="needs backend tensorrt but got openvino"):
        build_targets("shapes", ["sm89"], EngineOptions())
    with pytest.raises(ConfigError, match="can only be built beside their GPU"):
        build_targets("shapes", ["sm89"], EngineOptions(backend="tensorrt", refit=True))
