"""benchmarks/gpu/ops.py on the emulator: its checks, and its timings with a clock that stands still."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from cuda_arrays import CudaOps

from pyengine.export.ops import OPS, spec_of

pytestmark = pytest.mark.slow

GPU = Path(__file__).parents[2] / "benchmarks" / "gpu"


@pytest.fixture(scope="module")
def ops_benchmark() -> ModuleType:
    sys.path.insert(0, str(GPU))
    spec = spec_from_file_location("gpu_ops_benchmark", GPU / "ops.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


def test_every_op_is_checked(
    ops_benchmark: ModuleType, emulated_ops: CudaOps, monkeypatch: pytest.MonkeyPatch
) -> None:
    import op_checks

    monkeypatch.setattr(op_checks, "CASES", op_checks.CASES[1:3])
    records = list(op_checks.check(emulated_ops, small=False))
    assert {record["op"] for record in records} == {spec.name for spec in OPS}
    assert {record["dtype"] for record in records} == {"float32", "bfloat16", "float16"}
    assert all(record["good"] for record in records)


def test_every_case_gets_a_row_beside_its_bound(
    ops_benchmark: ModuleType, emulated_ops: CudaOps, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = ops_benchmark.GPU_CASES
    tiny = [
        replace(cases[0], name="temporal", tokens=2, heads=1, frames=3, ring=2),
        replace(cases[-1], name="few", tokens=66, heads=1, ring=12),
    ]
    monkeypatch.setattr(ops_benchmark, "BENCH_CASES", ())
    monkeypatch.setattr(ops_benchmark, "GPU_CASES", tiny)
    relative = spec_of("RelativeAttention")
    relative = replace(
        relative, bench_cases=(replace(relative.bench_cases[0], places=2, heads=1, head_dim=16),)
    )
    monkeypatch.setattr(ops_benchmark, "PLAIN", (spec_of("DenoiseStep"), relative))
    monkeypatch.setenv("PYENGINE_EMULATOR_PROCESSORS", "64")

    def time_cold(run: Callable[[], object], rounds: int = 1) -> list[float]:
        run()
        return [0.5] * rounds

    monkeypatch.setattr(ops_benchmark, "time_cold", time_cold)
    roof = ops_benchmark.Roofline("x", "1", "9.0", 4e12, 8e14, 8e14)
    kept: dict[str, list[dict[str, Any]]] = {"timings": [], "failures": []}
    ops_benchmark.time_all(emulated_ops, roof, 0.01, "", lambda kind, one: kept[kind].append(one))
    assert not kept["failures"]
    rows = [SimpleNamespace(**one) for one in kept["timings"]]
    ours = {(row.case, row.contender): row for row in rows if row.contender.startswith("pyengine")}
    assert {("temporal", "pyengine"), ("few", "pyengine"), ("few", "pyengine split")} <= set(ours)
    row = ours["temporal", "pyengine"]
    # qkv and ring once, out once; three frames in one chunk of five see all five sources.
    assert row.bytes == 2 * 2 * 1 * 64 * 2 * (4 * 3 + 2 * 2)
    assert row.operations == 4 * 64 * 2 * 2 * 3 * 5
    assert row.of_roof == pytest.approx(row.bytes / 4e12 / 0.5e-3)
    row = ours[relative.bench_cases[0].name, "pyengine"]
    assert row.bytes == 2 * 4 * (4 * 2 * 16) + 2 * 4 * 9 * 16  # four frames; tables in float32
    assert row.operations == 2 * 4 * 4 * 16 * 7
    assert "DenoiseStep" in {row.op for row in rows}
    for row in rows:
        if row.contender.startswith("sdpa"):
            assert row.operations >= ours[row.case, "pyengine"].operations  # no mask in it


class Raising:
    """A module one op of which raises."""

    def __init__(self, module: Any, op: str) -> None:
        self._module, self._op = module, op

    def __getattr__(self, name: str) -> Any:
        def refused(*_: Any, **__: Any) -> None:
            raise RuntimeError("[cuda] launching a kernel failed: unspecified launch failure\nmore")

        return refused if name == self._op else getattr(self._module, name)


@pytest.mark.parametrize("lives", [True, False])
def test_what_raises_is_a_record(
    ops_benchmark: ModuleType,
    emulated_ops: CudaOps,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    lives: bool,
) -> None:
    """The records before it are on disk by then; those after it follow while the context lives. Exit code 1."""
    import op_checks

    monkeypatch.setattr(op_checks, "CASES", op_checks.CASES[1:2])
    monkeypatch.setattr(op_checks, "context_lives", lambda ops: lives)
    broken = CudaOps(Raising(emulated_ops.module, "denoise_step"), "cpu")
    results = ops_benchmark.Results(tmp_path / "ops.json")
    results.check(op_checks.check(broken, small=True))
    checks = json.loads((tmp_path / "ops.json").read_text())["checks"]
    failed = [one for one in checks if "failed" in one]
    assert {(one["op"], one["failed"]) for one in failed} == {
        ("DenoiseStep", "RuntimeError: [cuda] launching a kernel failed: unspecified launch failure")
    }
    assert checks[0]["good"]
    assert (checks[-1]["op"] == "DenoiseStep") != lives
    assert len(failed) == (1 if not lives else 3 * len(spec_of("DenoiseStep").cases[::3]))
    assert results.code() == 1


@pytest.mark.parametrize("lives", [True, False])
def test_a_kernel_that_raises_while_it_is_timed_fails_the_run(
    ops_benchmark: ModuleType,
    emulated_ops: CudaOps,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    lives: bool,
) -> None:
    monkeypatch.setattr(ops_benchmark, "BENCH_CASES", ())
    monkeypatch.setattr(ops_benchmark, "GPU_CASES", ())
    specs = (spec_of("DenoiseStep"), spec_of("RelativeAttention"))
    specs = tuple(replace(spec, bench_cases=(spec.cases[0],)) for spec in specs)
    monkeypatch.setattr(ops_benchmark, "PLAIN", specs)
    monkeypatch.setattr(ops_benchmark, "time_cold", lambda run, rounds: [run() or 0.5 for _ in range(rounds)])
    monkeypatch.setattr(ops_benchmark, "context_lives", lambda ops: lives)
    roof = ops_benchmark.Roofline("x", "1", "9.0", 4e12, 8e14, 8e14)
    results = ops_benchmark.Results(tmp_path / "ops.json")
    broken = CudaOps(Raising(emulated_ops.module, "denoise_step"), "cpu")
    ops_benchmark.time_all(broken, roof, 0.01, "", results.keep)
    (failure,) = results.found["failures"]
    assert (failure["case"], failure["contender"]) == (specs[0].cases[0].name, "pyengine")
    assert [row["op"] for row in results.found.get("timings", [])] == (["RelativeAttention"] if lives else [])
    assert results.code() == 1


@pytest.mark.parametrize(("code", "fails"), [("", 0), ("import os; os.abort()", 1)])
def test_kernels_in_a_process_of_their_own_cannot_lose_what_is_known(
    ops_benchmark: ModuleType, tmp_path: Path, code: str, fails: int
) -> None:
    results = ops_benchmark.Results(tmp_path / "ops.json")
    results.keep("checks", {"good": True})
    child = f"import json; f = {str(results.path)!r}; found = json.load(open(f)); found['checks'] *= 2"
    child += f"; json.dump(found, open(f, 'w')); {code}"
    ops_benchmark.in_own_process(results, [sys.executable, "-c", child])
    assert len(results.found["checks"]) == 2
    assert len(results.found["failures"]) == fails
    assert results.code() == fails


def test_every_op_is_timed_on_the_processor() -> None:
    """Making a case's contenders compares them where they round alike."""
    spec = spec_from_file_location("cpu_ops_benchmark", GPU.parent / "ops.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    for op in module.OPS:
        contenders = module.contenders_of(op, op.bench_cases[0], False)
        assert {"pyengine", "eager"} <= set(contenders)
        for run in contenders.values():
            run()
