"""The small ART-V as a bundle: against torch, and as streams of compiled plans."""

from __future__ import annotations

import functools
import tempfile
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

import pyengine
from pyengine.bundle.bundle import Bundle
from pyengine.bundle.graph_file import load_graph
from pyengine.export.families.artv.assembly import components
from pyengine.export.families.artv.export import export_bundle, random_small_modules
from pyengine.export.parity import parity
from pyengine.export.runs import flat, run_portable

FIRST, THEN = "a red circle bounces over a blue background", "a cyan triangle spins over a grey background"


@functools.cache
def _home() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


@functools.cache
def bundle() -> Bundle:
    return export_bundle(random_small_modules(), Path(_home().name) / "bundle", "artv-tiny")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["denoiser", "references", "anchor", "text_encoder"])
def test_a_component_is_what_torch_computes(name: str, plan_cache: Path) -> None:
    modules = components(random_small_modules())
    parity(bundle(), {name: modules[name]}, cache_dir=plan_cache).check()


@pytest.mark.slow
def test_every_input_counts_by_itself() -> None:
    """References that are not present give zeros, and a mask that is left out gives another condition than one that is not."""
    made = bundle()
    component = made.component("references")
    assert set(component.inputs) == {
        value.name for value in load_graph(made.path(component.portable)).graph.input
    }
    inputs = flat(components(random_small_modules())["references"][1])
    for present, masked in ((1.0, 1.0), (1.0, 0.0), (0.0, 1.0)):
        given = inputs | {
            "present": np.array([present], np.float32),
            "masked": np.array([masked], np.float32),
        }
        got = run_portable(made, component, given)
        assert got["condition"].tolist() == [present * masked, 0.0]
        assert bool(got["feature.0"].any()) == bool(present)


@pytest.mark.slow
def test_streams_of_compiled_plans(plan_cache: Path) -> None:
    """A video that goes on from a snapshot, in a batch or alone, with a new prompt, is the same to the bit."""
    torch.set_num_threads(1)
    engine = pyengine.load(bundle().folder, threads=1)
    options = {"seed": 4, "method": {"steps": 2}, "guidance": 2.0}
    with engine.stream(FIRST, **options) as stream:
        list(islice(stream, 5))
        saved = stream.snapshot()
        stream.prompt = THEN
        wanted = np.stack(list(islice(stream, 11)))
    with engine.resume(saved) as resumed:
        resumed.prompt = THEN
        assert np.array_equal(np.stack(list(islice(resumed, 11))), wanted)
    with engine.batch(max_streams=2, guidance=2.0, method={"steps": 2}) as batch:
        with batch.stream(FIRST, seed=4) as one, batch.stream(THEN, seed=5) as other:
            list(islice(one, 5)), list(islice(other, 5))
            one.prompt = THEN
            got = np.stack(list(islice(one, 11)))
        if batch.exact:
            assert np.array_equal(got, wanted)
        else:
            assert np.abs(got.astype(int) - wanted).mean() < 2
