"""What the install builds: the architectures of a machine's GPUs, and what the code knows of them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize(("architectures", "has"), [("80-real;90a-real", True), ("90-real", False)])
def test_warpgroups_are_offered_only_where_they_are_compiled(
    tmp_path: Path, architectures: str, has: bool
) -> None:
    pybind11 = pytest.importorskip("pybind11")
    subprocess.run(
        ["cmake", "-S", str(ROOT), "-B", str(tmp_path), "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}",
         f"-DPYTHON_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", "-DPYENGINE_CUDA=on",
         f"-DPYENGINE_CUDA_ARCHITECTURES={architectures}"],
        check=True, capture_output=True,
    )  # fmt: skip
    rules = (tmp_path / "build.ninja").read_text().split("\nbuild ")
    rule = next(rule for rule in rules if "_cuda.dir/csrc/core/cuda/device_info.cc.o:" in rule)
    assert ("-DPYENGINE_HAVE_SM90A" in rule) == has
