"""What the install builds: the instruction sets of processors, the architectures of GPUs, and what the code knows of them."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pyengine import _C

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake")


def executable(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("capabilities", "built", "said"),
    [
        ("9.0", "90a-real", ""),  # plain 90 has no code for warpgroups
        ("8.9\n9.0\n8.9", "89-real;90a-real", ""),
        ("7.5\n12.0", "120-real", "need compute capability 8.0 but a GPU here has 75"),
        ("13.0", "", "nvcc is older than a GPU here, of sm_130"),
    ],
)
def test_architectures_of_the_gpus_here(tmp_path: Path, capabilities: str, built: str, said: str) -> None:
    nvcc = executable(tmp_path / "nvcc", "echo sm_80 sm_89 sm_90 sm_90a sm_120")
    executable(tmp_path / "nvidia-smi", f"cat <<'END'\n{capabilities}\nEND")
    script = tmp_path / "script.cmake"
    script.write_text(
        "cmake_minimum_required(VERSION 3.18)\n"
        f'include("{ROOT}/csrc/cmake/cuda_architectures.cmake")\n'
        "pyengine_architectures_here(found)\n"
        'message(STATUS "found=${found}.")\n'
    )
    done = subprocess.run(
        ["cmake", f"-DPYENGINE_NVCC={nvcc}", "-P", str(script)],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin:{Path(shutil.which('cmake') or '').parent}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"found={built}." in done.stdout + done.stderr
    assert said in done.stdout + done.stderr


def configured(build: Path, *definitions: str) -> subprocess.CompletedProcess[str]:
    pybind11 = pytest.importorskip("pybind11")
    return subprocess.run(
        ["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}",
         f"-DPYTHON_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
         *(f"-D{definition}" for definition in definitions)],
        capture_output=True, text=True,
    )  # fmt: skip


def compiled_isas(build: Path) -> set[str]:
    """Those that the kernels of denoise_step are compiled for; each unit is there once."""
    rules = (build / "build.ninja").read_text()
    found = re.findall(
        r"^build CMakeFiles/kernels_(\w+)\.dir/csrc/ops/denoise_step/cpu\.cc\.o:", rules, re.MULTILINE
    )
    assert len(found) == len(set(found))
    return set(found)


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the instruction sets of x86-64")
def test_kernels_are_compiled_for_the_instruction_sets_wanted(tmp_path: Path) -> None:
    off = "PYENGINE_CUDA=off"
    done = configured(tmp_path, off)
    assert done.returncode == 0, done.stderr
    every = compiled_isas(tmp_path)
    assert {"baseline", "avx2", "avx512"} <= every
    said = re.search(r"compiling the kernels once for each of (.*);", done.stdout)
    assert said is not None
    assert set(said[1].split(", ")) == every
    # In the same folder: nothing is left of the choice before.
    configured(tmp_path, off, "PYENGINE_BUILD_ISAS=avx2, avx512")
    assert compiled_isas(tmp_path) == {"baseline", "avx2", "avx512"}
    configured(tmp_path, off, "PYENGINE_BUILD_ISAS=native")
    assert compiled_isas(tmp_path) == {"baseline", [*_C.supported_isas(), *_C.left_out_isas()][-1]}
    done = configured(tmp_path, off, "PYENGINE_BUILD_ISAS=avx3")
    assert done.returncode != 0
    said_again = " ".join(done.stderr.split())
    assert "all, native, or a list of baseline, avx2, avx512, avx512_bf16, amx but got avx3" in said_again


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize(("architectures", "has"), [("80-real;90a-real", True), ("90-real", False)])
def test_warpgroups_are_offered_only_where_they_are_compiled(
    tmp_path: Path, architectures: str, has: bool
) -> None:
    done = configured(tmp_path, "PYENGINE_CUDA=on", f"PYENGINE_CUDA_ARCHITECTURES={architectures}")
    assert done.returncode == 0, done.stderr
    rules = (tmp_path / "build.ninja").read_text().split("\nbuild ")
    rule = next(rule for rule in rules if "_cuda.dir/csrc/core/cuda/device_info.cc.o:" in rule)
    assert ("-DPYENGINE_HAVE_SM90A" in rule) == has
