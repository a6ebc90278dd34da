"""The original loops through portable ONNX and CPU plans, fp32, to the stated tolerances: rolling caches, sinks, prompt changes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_wan_long_loops as long
import test_wan_loops as loops
import wan_golden as golden
from run_folder import made_once
from wan_streams import exported_module, portable

from pyengine.build.builder import build
from pyengine.bundle.bundle import Bundle, Latent, Video, write_manifest
from pyengine.export.families.wan import CausalWan, presets
from pyengine.export.families.wan.export import denoiser_plan
from pyengine.export.graph import export_component
from pyengine.export.weights import WeightStore
from pyengine.methods.causal import Causal
from pyengine.runtime.executor import Executor
from pyengine.runtime.open import load_program

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]
LATENT = (4, 6)
SHORT = [
    ("loop_sf", "self-forcing"),
    ("loop_sf_roll", "self-forcing"),
    ("loop_sf_image", "self-forcing"),
    ("loop_sf_frame", "self-forcing"),
    ("loop_causvid", "causvid"),
]
LONG = [
    ("ll_tiny_absolute_switch_keepsink", "longlive"),
    ("ll_tiny_relative_switch_newsink", "longlive"),
    ("rf_tiny_b2", "rolling-forcing"),
]


@functools.cache
def bundle(system: str, model: Callable[[], CausalWan]) -> Bundle:
    """The denoiser of a reference alone, as it is exported for a system."""
    chosen, network = presets.system(system), model()

    def make(folder: Path) -> None:
        module = exported_module(network, chosen.levels, chosen.shown, LATENT, chosen.mask)
        plan, store = denoiser_plan(module, LATENT, chosen.levels), WeightStore()
        part = export_component(
            plan.module,
            plan.inputs,
            folder=folder,
            name="denoiser",
            store=store,
            outputs=plan.outputs,
            dynamic=plan.dynamic,
            ring=plan.ring,
            working=plan.working,
        )
        store.write(folder)
        write_manifest(
            folder,
            name="golden",
            family="wan",
            version="1",
            components={"denoiser": part},
            video=Video(LATENT[0], LATENT[1], 16.0, 1),
            latent=Latent(network.config.in_dim, *LATENT),
            method=chosen.method(),
        )

    return Bundle.load(made_once(f"wan-golden-{system}-{network.config.in_dim}", make))


def networks(of: Bundle, cache: Path, streams: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """By name, what `Streams` takes to run on them. An inlined plan serves one stream."""
    component = of.component("denoiser")
    yield "portable", {"module": portable(component, of.path(component.portable))}

    def plan(backend: str, choice: str) -> Callable[[Causal, int], Executor]:
        def executor(schedule: Causal, count: int) -> Executor:
            variants = [variant.sized(branches=1, streams=count) for variant, _ in schedule.denoisers()]
            options: dict[str, Any] = {
                "backend": backend,
                "precision": "fp32",
                "choice": choice,
                "cache_dir": cache,
            }
            return load_program(build(of, variants=variants, **options)).executor()

        return executor

    for backend in ("openvino", "onnxruntime"):
        for choice in ("cut", "inline") if streams == 1 else ("cut",):
            yield f"{backend} {choice}", {"plan": plan(backend, choice)}


@pytest.mark.parametrize(("name", "system"), SHORT)
def test_loops_of_self_forcing_and_causvid(
    name: str, system: str, plan_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = golden.case(name)
    for where, network in networks(bundle(system, golden.transformer), plan_cache, len(arrays["out"])):
        streams = loops.streams_of(name, **network)
        loops.draw_as(monkeypatch, loops.noise_of(name, streams))
        streams.run()
        want = arrays["out"][:, streams.schedule.given_frames :]
        assert np.abs(streams.latents() - want).max() <= golden.TOLERANCE, where


@pytest.mark.parametrize(("name", "system"), LONG)
def test_loops_of_longlive_and_rolling_forcing(
    name: str, system: str, plan_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = long.long_case(name)
    method = (
        long.longlive(name.removeprefix("ll_tiny_"))
        if system == "longlive"
        else presets.system(system).method()
    )
    for where, network in networks(bundle(system, long.model), plan_cache, len(arrays["out"])):
        got = long.run(name, method, presets.system(system).mask, monkeypatch, **network).latents()
        assert np.abs(got - arrays["out"]).max() <= long.TOLERANCE, where
