"""The steps behind run.sh, which says what they are for. Standard library only: every other need is a step's own."""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from report import table

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PACKAGES = (
    "torch",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-rtx",
    "openvino",
    "numpy",
    "triton",
)
TAIL = 30  # lines of a failed step that are kept
# An editable installation comes before PYTHONPATH, and would be measured in place of what was just built.
IMPORT = """
import pyengine, sys
if not pyengine.__file__.startswith({folder!r}):
    sys.exit("another pyengine comes before the one just built: uninstall " + pyengine.__file__ + ", or use --installed")
import pyengine._cuda
"""


@dataclass(frozen=True)
class Gpu:
    """The first GPU, as its driver describes it."""

    name: str
    capability: tuple[int, int]
    driver_cuda: str  # the newest CUDA that the driver knows

    @property
    def architecture(self) -> str:
        """As CMake names it; the a-features of Hopper are used where there are."""
        major, minor = self.capability
        return f"{major}{minor}{'a' if (major, minor) == (9, 0) else ''}-real"


def gpu() -> Gpu | str:
    """The GPU, or why there is none."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "no NVIDIA driver (libcuda.so.1) on this machine"
    if error := driver.cuInit(0):
        return f"the NVIDIA driver finds no GPU (cuInit: error {error})"
    name, value, version = ctypes.create_string_buffer(256), ctypes.c_int(), ctypes.c_int()
    driver.cuDeviceGetName(name, 256, 0)
    driver.cuDriverGetVersion(ctypes.byref(version))
    capability = []
    for attribute in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
        driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, 0)
        capability.append(value.value)
    cuda = f"{version.value // 1000}.{version.value % 1000 // 10}"
    return Gpu(name.value.decode(), (capability[0], capability[1]), cuda)


@dataclass
class Step:
    """A command with a time limit. It is skipped where `missing` gives a reason."""

    name: str
    command: list[str]
    seconds: float
    result: Path | None = None  # JSON that it writes
    missing: Callable[[], str | None] = lambda: None
    needs: tuple[str, ...] = ()  # steps that must have gone well
    environment: dict[str, str] = field(default_factory=dict)


@dataclass
class Outcome:
    """What became of a step: ok, failed, timeout or skipped."""

    status: str
    seconds: float = 0.0
    reason: str = ""
    result: Any = None
    tail: list[str] = field(default_factory=list)


def read(path: Path | None) -> Any:
    """What a step wrote, if it did and can be read."""
    try:
        return None if path is None else json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def run_step(step: Step, done: dict[str, Outcome], left: float, log: Path) -> Outcome:
    for name in step.needs:
        if done[name].status != "ok":
            return Outcome("skipped", reason=f"needs the step {name}, which was {done[name].status}")
    if reason := step.missing():
        return Outcome("skipped", reason=reason)
    limit = min(step.seconds, left)
    if limit < 5:
        return Outcome("skipped", reason="no time left")
    start = time.perf_counter()
    if step.result is not None:
        step.result.unlink(missing_ok=True)  # of an earlier run in the same folder
    # Outside the source tree, whose folder pyengine/ would shadow the built package.
    with log.open("wb") as out:
        process = subprocess.Popen(step.command, stdout=out, stderr=subprocess.STDOUT, cwd=log.parent,
                                   env={**os.environ, **step.environment}, start_new_session=True)  # fmt: skip
        code: int | None = None
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            pass
        finally:  # also where this process is told to stop: nothing goes on computing behind it
            if code is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    seconds = round(time.perf_counter() - start, 1)
    lines = log.read_text(errors="replace").splitlines()
    result = read(step.result)
    if code is None:
        kept = ", what it had measured is kept" if result is not None else ""
        return Outcome("timeout", seconds, f"stopped after {limit:.0f} s{kept}", result, lines[-TAIL:])
    if code:
        return Outcome("failed", seconds, f"exit code {code}", result, lines[-TAIL:])
    said = [found[1] for line in lines if (found := re.match(r"\w+\.(?:py|sh): skipped, (.*)", line))]
    if said and result is None:
        return Outcome("skipped", seconds, said[0])
    counted = [line.strip("= ") for line in lines if re.search(r"\d+ (passed|skipped).* in [\d.]+s", line)]
    if counted:  # by pytest
        return Outcome("ok" if "passed" in counted[-1] else "skipped", seconds, counted[-1])
    return Outcome("ok", seconds, "; ".join(line for line in lines if ": stopped after " in line), result)


def has(*modules: str) -> Callable[[], str | None]:
    """Skips a step where a module is missing."""

    def missing() -> str | None:
        absent = [name for name in modules if find_spec(name) is None]
        return f"{sys.executable} has no {' and no '.join(absent)}" if absent else None

    return missing


def tool(name: str) -> Callable[[], str | None]:
    return lambda: None if shutil.which(name) else f"no {name} on PATH"


def onnxruntime_cuda() -> str | None:
    """onnxruntime must have been built with the CUDA provider."""
    if reason := has("onnxruntime")():
        return reason
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        return None
    return f"onnxruntime {onnxruntime.__version__} has no CUDAExecutionProvider"


def tensorrt() -> str | None:
    for name in ("tensorrt", "tensorrt_rtx"):
        try:
            if hasattr(import_module(name), "Builder"):  # PyPI's `tensorrt` alone is an empty shell
                return None
        except ImportError:
            continue
    return "neither tensorrt nor tensorrt_rtx is installed"


# What the scripts import before they do anything.
OPS_NEED = ("torch", "onnx")
STREAM_NEEDS = ("torch", "onnx", "onnxruntime", "onnxscript", "safetensors", "tokenizers")


def both(needs: tuple[str, ...], backend: Callable[[], str | None]) -> Callable[[], str | None]:
    """Modules, then a backend."""
    return lambda: has(*needs)() or backend()


BACKENDS = {"tensorrt": tensorrt, "onnxruntime": onnxruntime_cuda, "torch": has("torch", "onnx")}


def steps(gpu: Gpu, work: Path, installed: bool) -> list[Step]:
    python, site = sys.executable, work / "site"
    environment = {
        "PYENGINE_CACHE": str(work / "plans"),
        "OMP_NUM_THREADS": str(min(16, os.cpu_count() or 1)),
    }
    if not installed:
        environment["PYTHONPATH"] = os.pathsep.join(
            [str(site), *filter(None, [os.environ.get("PYTHONPATH")])]
        )
    settings = {
        "build-dir": work / "build",
        "cmake.define.PYENGINE_CUDA": "on",
        "cmake.define.PYENGINE_CUDA_ARCHITECTURES": gpu.architecture,
    }
    build = [python, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-index", "--no-deps",
             "--upgrade", "--target", str(site),
             *(f"--config-settings={name}={value}" for name, value in settings.items()), str(ROOT)]  # fmt: skip
    found = [
        Step(
            "build",
            build,
            240,
            missing=lambda: tool("nvcc")() or has("pip", "pybind11", "scikit_build_core")(),
        )
    ]
    found = [] if installed else found
    code = IMPORT.format(folder="" if installed else str(site))
    needs = () if installed else ("build",)
    found.append(Step("import", [python, "-c", code], 30, needs=needs, environment=environment))

    def script(
        name: str, file: str, seconds: float, *arguments: str, missing: Any = None, **options: Any
    ) -> Step:
        result = work / f"{name.replace(':', '-')}.json"
        command = [python, str(HERE / file), *arguments, "--json", str(result)]
        return Step(
            name, command, seconds, result, missing or has("torch"), ("import",), environment, **options
        )

    def each(kind: str, file: str, seconds: float, *arguments: str) -> list[Step]:
        """A step per backend, whose name is the last argument."""
        return [
            script(f"{kind}:{name}", file, seconds, *arguments, name, missing=both(STREAM_NEEDS, missing))
            for name, missing in BACKENDS.items()
        ]

    roofline, kept = ("--roofline", str(work / "roofline.json")), ("--work", str(work))
    # By name: others in that folder import more than these, and cannot be collected everywhere.
    files = [str(ROOT / "tests" / "ops" / f"test_cuda_{name}.py") for name in ("ops", "ring_float8")]
    tests = [python, "-P", "-m", "pytest", *files, "-q", "-p", "no:cacheprovider", "-rs", "-k", "gpu"]
    found += [
        script("roofline", "roofline.py", 60),
        script("ops", "ops.py", 90, "--check-only", missing=has(*OPS_NEED)),
        Step("kernel tests", tests, 90, None, has(*OPS_NEED, "pytest", "hypothesis"), ("import",), environment),
        *each("check", "stream.py", 120, "check"),
        Step("sanitizer", ["bash", str(HERE / "sanitize.sh"), python, "25"], 85, None, both(OPS_NEED, tool("compute-sanitizer")),
             ("import",), environment),
        script("op timings", "ops.py", 100, "--time-only", "--seconds", "0.1", missing=has(*OPS_NEED)),
        *each("bench", "stream.py", 60, *roofline, "bench"),
        script("bench:torch_eager", "stream.py", 60, "bench", "torch_eager", missing=has(*STREAM_NEEDS)),
        *each("first", "stream.py", 60, "first"),
        *each("wide", "wide.py", 90, *kept, *roofline),
        script("wide:torch_eager", "wide.py", 60, "torch_eager", *roofline, missing=has(*STREAM_NEEDS)),
        *each("opensora", "opensora.py", 90, *kept, *roofline),
        script("opensora:torch_eager", "opensora.py", 60, "torch_eager", *roofline, missing=has(*STREAM_NEEDS)),
        # Compilers of peers last: they may take all the time there is.
        script("bench:torch_compile", "stream.py", 150, "bench", "torch_compile", missing=has(*STREAM_NEEDS, "triton")),
        script("wide:torch_compile", "wide.py", 120, "torch_compile", *roofline, missing=has(*STREAM_NEEDS, "triton")),
        script("opensora:torch_compile", "opensora.py", 120, "torch_compile", *roofline, missing=has(*STREAM_NEEDS, "triton")),
    ]  # fmt: skip
    return found


def versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if nvcc := shutil.which("nvcc"):
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
        if release := re.search(r"release ([\d.]+)", text):
            found["nvcc"] = release[1]
    return found


def name_of(gpu: Gpu) -> str:
    return "gpu-" + re.sub(r"[^a-z0-9]+", "-", gpu.name.lower()).strip("-")


def known(folder: Path, gpu: Gpu, found: dict[str, str]) -> dict[str, Any]:
    """The steps of an earlier run on the same GPU with the same versions, which `--only` adds to."""
    record = read(folder / f"{name_of(gpu)}.json") or {}
    same = record.get("gpu") == json.loads(json.dumps(asdict(gpu))) and record.get("versions") == found
    return record["steps"] if same else {}


def write(
    folder: Path,
    gpu: Gpu,
    found: dict[str, str],
    seconds: float,
    done: dict[str, Outcome],
    earlier: dict[str, Any],
) -> str:
    """Writes JSON and table; returns the table."""
    record = {
        "gpu": asdict(gpu),
        "versions": found,
        "seconds": round(seconds, 1),
        "steps": earlier | {name: asdict(outcome) for name, outcome in done.items()},
    }
    folder.mkdir(parents=True, exist_ok=True)
    name = name_of(gpu)
    text = table(record)
    for ending, content in ((".json", json.dumps(record, indent=1) + "\n"), (".md", text)):
        scratch = folder / f".{name}{ending}"
        scratch.write_text(content)
        scratch.replace(folder / f"{name}{ending}")
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description="See run.sh.")
    parser.add_argument(
        "--output", type=Path, default=HERE.parent / "results", help="where JSON and table go"
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="of all steps together (default 10)")
    parser.add_argument(
        "--only",
        default="",
        help="these steps, build and import, separated by commas; added to what is in the output",
    )
    parser.add_argument(
        "--installed", action="store_true", help="use the installed pyengine instead of building one"
    )
    parser.add_argument(
        "--work", type=Path, help="where to build (default: a new folder; kept between runs if given)"
    )
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `finally` holds for it
    here = gpu()
    if isinstance(here, str):
        print(f"run.sh: every step skipped: {here}. Nothing was written.")
        return 0
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"
    os.environ["PATH"] += os.pathsep + str(toolkit)  # often installed, and on nobody's PATH
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="pyengine-gpu-") as scratch:
        work = (options.work or Path(scratch)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        done: dict[str, Outcome] = {}
        found, text = versions(), "run.sh: no such steps"
        wanted = {name for name in options.only.split(",") if name}
        earlier = known(options.output, here, found) if wanted else {}
        for step in steps(here, work, options.installed):
            if wanted and step.name not in {"build", "import", *wanted}:
                continue
            left = 60 * options.minutes - 5 - (time.perf_counter() - start)
            log = work / f"{step.name.replace(':', '-').replace(' ', '-')}.log"
            done[step.name] = outcome = run_step(step, done, left, log)
            print(f"{step.name:20} {outcome.status:8} {outcome.seconds:6.1f} s  {outcome.reason}", flush=True)
            for line in outcome.tail:
                print(f"    {line}")
            # After every step, so that a run that is stopped from outside leaves what it has found.
            text = write(options.output, here, found, time.perf_counter() - start, done, earlier)
    print(text)
    return 1 if any(outcome.status == "failed" for outcome in done.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
