"""The instruction set is chosen once, can be overridden, and one that this CPU lacks is refused."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from pyengine import _C


def chosen(override: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-c", "from pyengine import _C; print(_C.cpu_isa())"],
        env={**os.environ, "PYENGINE_CPU_ISA": override},
        capture_output=True,
        text=True,
        check=False,
    )


def test_best_is_the_default() -> None:
    assert _C.supported_isas()[0] == "baseline"
    assert chosen("").stdout.strip() == _C.supported_isas()[-1]


@pytest.mark.parametrize("name", ["baseline", _C.supported_isas()[-1]])
def test_environment_overrides(name: str) -> None:
    assert chosen(name).stdout.strip() == name


def test_unknown_is_refused() -> None:
    process = chosen("sse9")
    assert process.returncode != 0
    assert (
        process.stderr.strip()
        .splitlines()[-1]
        .startswith("ValueError: [cpu_isa] expected PYENGINE_CPU_ISA to be one of baseline")
    )


@pytest.mark.skipif(
    "amx" in _C.supported_isas(), reason="this CPU runs every instruction set that we compile for"
)
def test_what_this_cpu_lacks_is_refused() -> None:
    assert "this CPU lacks" in chosen("amx").stderr or "this build left out" in chosen("amx").stderr


def test_set_cpu_isa() -> None:
    _C.set_cpu_isa("baseline")
    assert _C.cpu_isa() == "baseline"
    _C.set_cpu_isa("auto")
    assert _C.cpu_isa() == _C.supported_isas()[-1]
    with pytest.raises(ValueError, match="expected the ISA to be one of"):
        _C.set_cpu_isa("neon")


def test_threads() -> None:
    _C.set_threads(3)
    assert _C.threads() == 3
    _C.set_threads(0)
    assert _C.threads() >= 1
    with pytest.raises(ValueError, match="expected 0"):
        _C.set_threads(-1)
