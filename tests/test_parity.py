"""Parity of any bundle: with torch modules where the family makes them again, else with the portable ONNX, and the report says which."""

from __future__ import annotations

from pathlib import Path

import lvdm_family
import numpy as np
import pytest

from pyengine.bundle.bundle import Bundle
from pyengine.cli import main
from pyengine.export import parity as parity_module
from pyengine.export.examples import example_inputs
from pyengine.export.families import family_of
from pyengine.export.parity import ParityError, bundle_parity, parity


@pytest.mark.slow
def test_the_command_takes_any_bundle(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["parity", str(lvdm_family.bundle().folder), "--precision", "fp32"]) == 0
    said = capsys.readouterr().out
    assert "family lvdm cannot make its torch modules again" in said
    assert set(lvdm_family.bundle().components) <= {line.split()[0] for line in said.splitlines()}


@pytest.mark.slow
def test_opensora_is_compared_with_its_portable_onnx(plan_cache: Path) -> None:
    import opensora_family

    bundle = opensora_family.bundle()
    report = bundle_parity(bundle, precisions=["fp32"], cache_dir=plan_cache)
    report.check()
    assert {row.component for row in report.rows} == set(bundle.components)
    assert {row.torch_error for row in report.rows} == {None}
    assert {row.runner.split()[-1] for row in report.rows if row.component == "denoiser"} == {"cut", "inline"}


def test_shapes_is_compared_with_torch(plan_cache: Path) -> None:
    bundle = Bundle.load("shapes")
    rebuild = family_of(bundle).rebuild
    assert rebuild is not None
    modules = rebuild(bundle)
    assert set(modules) == set(bundle.components)
    report = parity(bundle, {"decoder": modules["decoder"]}, precisions=["fp32"], cache_dir=plan_cache)
    report.check()
    assert not report.note
    assert all(row.torch_error is not None for row in report.rows)


def test_a_plan_that_computes_something_else_fails(monkeypatch: pytest.MonkeyPatch, plan_cache: Path) -> None:
    run = parity_module.run_plan

    def wrong(*arguments: object) -> dict[str, np.ndarray]:
        return {name: value + 0.01 * np.abs(value).max() for name, value in run(*arguments).items()}  # type: ignore[arg-type]

    monkeypatch.setattr(parity_module, "run_plan", wrong)
    report = bundle_parity(lvdm_family.bundle(), precisions=["fp32"], cache_dir=plan_cache)
    assert not any(row.passed for row in report.rows if row.output != "frames")
    with pytest.raises(ParityError, match="outputs are past tolerance"):
        report.check()


def test_example_inputs_fill_the_ring_and_the_window() -> None:
    component = Bundle.load("shapes", verify=False).component("denoiser")
    inputs = example_inputs(component)
    assert set(inputs) == set(component.inputs)
    ring = component.symbols["ring"]
    assert inputs["ring_index"].ravel()[:ring].tolist() == list(range(ring))
    assert inputs["frame_index"].ravel()[0] == ring
    assert inputs["level"].ravel()[0] == 0 < inputs["level"].ravel()[-1]
