"""Builds pyengine's CUDA module against the emulator in tests/cuda_emulator: the same binding, checks, heuristics and
kernels, on an ordinary processor.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]
CSRC, EMULATOR = ROOT / "csrc", ROOT / "tests" / "cuda_emulator"
TYPES, HEAD_DIMS = ("bfloat16", "float16"), (64, 72, 128)
NAME = "_cuda_emulated"


def build(folder: Path) -> ModuleType | str:
    """The module, built in `folder`, or the reason why it cannot be."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        return "no C++ compiler"
    try:
        import pybind11
    except ImportError:
        return "no pybind11"
    instance = (CSRC / "ops/frame_window_attention/cuda_instance.cu.in").read_text()
    sources = [
        *sorted(CSRC.glob("ops/*/*.cu")),
        *sorted(CSRC.glob("ops/*/cuda*.cc")),
        *(path.with_name("bind.cc") for path in sorted(CSRC.glob("ops/*/cuda.cu"))),
        *(
            CSRC / f"bindings/{name}.cc"
            for name in ("arguments", "cuda_module", "device_array", "op_binding")
        ),
        CSRC / "core/tensor.cc",
        EMULATOR / "emulator.cc",
        EMULATOR / "warpgroup.cc",
    ]
    for kind, head_dim in product(TYPES, HEAD_DIMS):
        path = folder / f"instance_{kind}_{head_dim}.cu"
        path.write_text(instance.replace("@type@", kind).replace("@head_dim@", str(head_dim)))
        sources.append(path)
    includes = [CSRC, EMULATOR, pybind11.get_include(), sysconfig.get_path("include")]
    flags = ["-std=c++17", "-O1", "-fPIC", "-w", "-fvisibility=hidden", "-DPYENGINE_EMULATE_CUDA", "-DPYENGINE_BIND_CUDA",
             f"-DPYENGINE_CUDA_MODULE={NAME}", *(f"-I{path}" for path in includes)]  # fmt: skip

    def compile_one(item: tuple[int, Path]) -> Path:
        index, source = item
        made = folder / f"{index}.o"
        command = [compiler, *flags, "-x", "c++", "-c", str(source), "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{source.name} does not compile:\n{done.stderr[:4000]}")
        return made

    library = folder / f"{NAME}{sysconfig.get_config_var('EXT_SUFFIX')}"
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        objects = list(pool.map(compile_one, enumerate(sources)))
    subprocess.run([compiler, "-shared", *map(str, objects), "-o", str(library)], check=True)
    spec = importlib.util.spec_from_file_location(NAME, library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
