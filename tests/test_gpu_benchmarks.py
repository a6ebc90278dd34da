"""What runs on machines with a GPU (benchmarks/gpu), as far as it can be run without one."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_cuda
import numpy as np
import pytest

import pyengine
from pyengine.bundle.bundle import Bundle
from pyengine.device import cuda as runtime

GPU = Path(__file__).parents[1] / "benchmarks" / "gpu"
sys.path.insert(0, str(GPU))
import run  # noqa: E402
import stream  # noqa: E402

pytestmark = pytest.mark.slow

SHAPES = Bundle.load("shapes")


@pytest.fixture(scope="module")
def on_gpu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pyengine.Engine]:
    """The bundled model on a simulated GPU in host memory."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        fake_cuda.install(monkeypatch)
        cache = tmp_path_factory.mktemp("plans")
        engine = pyengine.load("shapes", backend="tensorrt", choice="cut", cache_dir=cache)
        yield engine
        engine.close()
        gc.collect()
    runtime.runtime.cache_clear()


def test_a_stream_is_judged_by_its_frames(on_gpu: pyengine.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "FRAMES", 8)
    exact = next(stream.torch_frames("fp32", device="cpu"))
    found = stream.check_stream(on_gpu, exact, allowed=0.01)
    assert found["good"]
    assert found["resumes"]
    assert any(name.startswith("denoiser") for name in found["graphs"])
    assert not stream.check_stream(on_gpu, 255 - exact, allowed=0.01)["good"]


def test_a_bench_says_what_a_call_costs_and_what_bounds_it(
    on_gpu: pyengine.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WARM_CLIPS", "ROUNDS", "PROFILED_CLIPS", "REPLAYS"):
        monkeypatch.setattr(stream, name, 1)
    roof = {"matrix_bf16_per_second": 1e12, "copy_bytes_per_second": 1e11}
    with on_gpu.stream(stream.PROMPT) as running:
        found = stream.measure(running.clips(), 0.01) | stream.network(running, roof)
    # A clip of 8 frames leaves after every second call.
    assert found["call_ms"] == pytest.approx(1e3 * 8 / SHAPES.method["cadence"] / found["frames_per_second"])
    bound = found["network_bound"]
    assert found["of_roof"] == pytest.approx(bound["ms"] / found["network_ms"])
    # Two branches of 10 frames of 16 tokens meet about every weight once.
    assert 0.5 < bound["operations"] / (2 * 2 * 10 * 16 * bound["bytes"] / 2) < 2
    assert f"{found['network']}/0/" in found["graphs"]


def test_streams_are_checked_one_by_one_and_each_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    frames = np.zeros((8, 64, 64, 3), np.uint8)
    monkeypatch.setattr(stream, "PRECISIONS", {"tensorrt": ("bf16",)})
    monkeypatch.setattr(stream, "frames_on_gpu", lambda engine, frames: True)
    monkeypatch.setattr(stream, "reference", lambda cache: (frames, "torch"))
    monkeypatch.setattr(stream, "torch_clips", lambda precision, device: frames)
    monkeypatch.setattr(stream, "made", lambda *_: frames)
    monkeypatch.setattr(stream, "check_stream", lambda engine, exact, allowed: {"good": True})

    def load(backend: str, precision: str, cache: str | None, choice: str = "cut") -> Any:
        if choice == "inline":
            raise AttributeError("this library is of another version")
        return SimpleNamespace(stream=lambda *_, **__: contextlib.nullcontext(), close=lambda: None)

    monkeypatch.setattr(stream, "load", load)
    kept: list[list[bool]] = []
    found = stream.check("tensorrt", None, lambda result: kept.append([r["good"] for r in result["streams"]]))
    assert kept == [[True], [True, False]]
    assert found["streams"][1]["failed"] == "this library is of another version"


def test_the_first_frame_from_a_plan_is_kept_before_one_without(monkeypatch: pytest.MonkeyPatch) -> None:
    caches: list[str] = []
    kept: list[dict[str, Any]] = []

    def started(backend: str, cache: str) -> dict[str, float]:
        caches.append(cache)
        assert len(caches) < 5 or kept  # the fifth may be stopped
        return {"seconds": float(len(caches)), "import": 0.5}

    monkeypatch.setattr(stream, "_first_frame", started)
    found = stream.first("torch", "plans", kept.append)
    assert caches[:4] == ["plans"] * 4
    assert caches[4] != "plans"
    assert (found["warm_seconds"], found["warm_after_import_seconds"], found["cold_seconds"]) == (3, 2.5, 5)


def test_a_roofline_that_was_skipped_is_done_without(tmp_path: Path) -> None:
    assert stream.known_roof(tmp_path / "roofline.json") is None


def test_idle_time_of_overlapping_work() -> None:
    assert stream.idle_share([(0, 4), (2, 6), (8, 10)]) == {
        "busy_ms": 0.008,
        "span_ms": 0.01,
        "pieces": 3,
        "gap_share": pytest.approx(0.2),
    }
    assert stream.idle_share([]) is None


def outcome(tmp_path: Path, code: str, seconds: float = 30, **options: Any) -> run.Outcome:
    step = run.Step("a", [sys.executable, "-c", code], seconds, **options)
    return run.run_step(step, {"b": run.Outcome("failed")}, 600, tmp_path / "log")


def test_steps_fail_stop_and_are_skipped_with_a_reason(tmp_path: Path) -> None:
    good = outcome(tmp_path, "open('r', 'w').write('[1]')", result=tmp_path / "r")
    assert (good.status, good.result) == ("ok", [1])
    failed = outcome(tmp_path, "print('why'); raise SystemExit(3)")
    assert (failed.status, failed.reason, failed.tail) == ("failed", "exit code 3", ["why"])
    assert outcome(tmp_path, "import time; time.sleep(60)", seconds=5.1).status == "timeout"
    half = "open('r', 'w').write('[2]'); import time; time.sleep(60)"
    stopped = outcome(tmp_path, half, seconds=5.1, result=tmp_path / "r")
    assert (stopped.result, stopped.reason) == ([2], "stopped after 5 s, what it had measured is kept")
    assert outcome(tmp_path, "", result=tmp_path / "r").result is None  # not that of the step before
    torn = outcome(tmp_path, "open('r', 'w').write('[')", result=tmp_path / "r")
    assert (torn.status, torn.result) == ("ok", None)
    assert outcome(tmp_path, "", missing=lambda: "no hammer").reason == "no hammer"
    assert outcome(tmp_path, "", needs=("b",)).reason == "needs the step b, which was failed"
    tests = outcome(tmp_path, "print('3 skipped, 5 deselected in 1.92s')")
    assert (tests.status, tests.reason) == ("skipped", "3 skipped, 5 deselected in 1.92s")
    assert outcome(tmp_path, "print('3 passed, 1 skipped in 1.92s')").status == "ok"
    said = outcome(tmp_path, "print('ops.py: skipped, no GPU')", result=tmp_path / "none")
    assert (said.status, said.reason) == ("skipped", "no GPU")


def test_without_a_gpu_the_one_command_says_so(tmp_path: Path) -> None:
    if isinstance(run.gpu(), run.Gpu):
        pytest.skip("this machine has a GPU")
    done = subprocess.run([GPU / "run.sh", "--output", tmp_path], check=True, capture_output=True, text=True)
    assert done.stdout.startswith("run.sh: every step skipped: no NVIDIA driver")
    assert not list(tmp_path.iterdir())


def test_a_machine_with_a_gpu_and_nothing_else_gets_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every step really runs, on this machine, and finds its part missing."""
    monkeypatch.setattr(run, "gpu", lambda: run.Gpu("NVIDIA Example 9000", (9, 0), "13.0"))
    monkeypatch.setattr(run, "tool", lambda name: lambda: f"no {name} on PATH")
    monkeypatch.setattr(run, "has", lambda *names: lambda: f"no {names[0]}")
    monkeypatch.setattr(run, "BACKENDS", {"torch": lambda: "no torch"})
    monkeypatch.setenv("PATH", os.environ["PATH"])  # which it extends
    monkeypatch.setattr(sys, "argv", ["run.py", "--output", str(tmp_path)])
    assert run.main() == 0
    record = json.loads((tmp_path / "gpu-nvidia-example-9000.json").read_text())
    assert record["steps"]["build"]["reason"] == "no nvcc on PATH"
    assert {step["status"] for step in record["steps"].values()} == {"skipped"}
    assert record["steps"]["check:torch"]["reason"] == "needs the step import, which was skipped"
    # A later run of one step adds to the others.
    record["steps"]["roofline"] |= {"reason": "of the first run"}
    (tmp_path / "gpu-nvidia-example-9000.json").write_text(json.dumps(record))
    monkeypatch.setattr(sys, "argv", ["run.py", "--output", str(tmp_path), "--only", "ops"])
    assert run.main() == 0
    again = json.loads((tmp_path / "gpu-nvidia-example-9000.json").read_text())
    assert again["steps"].keys() == record["steps"].keys()
    assert again["steps"]["roofline"]["reason"] == "of the first run"
    assert {"build", "import", "ops", "wide:torch"} <= set(again["steps"])


@pytest.mark.parametrize(
    ("file", "needs"),
    [("ops", run.OPS_NEED), *((name, run.STREAM_NEEDS) for name in ("stream", "wide", "opensora"))],
)
def test_scripts_import_no_more_than_they_are_skipped_without(file: str, needs: tuple[str, ...]) -> None:
    known = {"numpy", "torch", *needs}
    others = ("openvino", "onnxscript", "safetensors", "onnxruntime", "av", "platformdirs", "rich", "transformers", "matplotlib",
              "nncf", "tensorrt_rtx", "pytest", "hypothesis")  # fmt: skip
    code = f"""
import sys
for name in {[name for name in others if name not in known]!r}:
    sys.modules[name] = None
sys.path.insert(0, {str(GPU)!r})
import {file}
"""
    subprocess.run([sys.executable, "-P", "-c", code], check=True)


def test_a_machine_with_onnxruntime_alone_runs_the_engine(tmp_path: Path) -> None:
    """As machines with a GPU often are: no OpenVINO, nothing for video, nothing for consoles and folders."""
    code = """
import sys
for name in ("openvino", "av", "platformdirs", "rich", "tensorrt_rtx"):
    sys.modules[name] = None
import pyengine
engine = pyengine.load("shapes", backend="onnxruntime", choice="cut")
print(next(engine.stream("a red circle bounces over a blue background")).shape)
"""
    environment = {**os.environ, "PYENGINE_CACHE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], check=True, capture_output=True, text=True, env=environment
    )
    assert done.stdout.strip() == "(64, 64, 3)"
