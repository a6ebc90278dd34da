"""The original's chunk of four DDIM steps by the driver and the schedule of streams, on torch, on portable ONNX and on CPU plans."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from fake_network import Arrays, FakeExecutor, FakeNetwork, stream_settings
from run_folder import made_once
from streamingt2v_golden import CONFIG, array, difference, modules, own_error

from pyengine.build.builder import build
from pyengine.build.variants import stream_variants
from pyengine.bundle.bundle import Bundle, Latent, TensorSpec, Video
from pyengine.bundle.variant import Variant
from pyengine.export.families.streamingt2v.assembly import Networks, Part, Sizes, assemble
from pyengine.export.families.streamingt2v.cached import fill
from pyengine.export.families.streamingt2v.export import write_bundle
from pyengine.export.runs import run_torch
from pyengine.methods import make_method, method_settings
from pyengine.methods.streamingt2v import REGENERATED
from pyengine.runtime.host.decoder import HostDecoder
from pyengine.runtime.open import load_program
from pyengine.streaming import driver as driver_module
from pyengine.streaming.driver import Driver
from pyengine.streaming.stream import open_state

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

SETTING = CONFIG["ddim"]
STEPS, WINDOW, SEEN = SETTING["steps"], 16, 8
SIZES = Sizes((16, 8), WINDOW, SEEN)
METHOD = {
    "name": "streamingt2v", "steps": STEPS, "betas": [SETTING["beta_start"], SETTING["beta_end"]], "eta": SETTING["eta"],
    "guidance": SETTING["guidance"], "clip_frames": WINDOW, "condition_frames": SEEN,
}  # fmt: skip
USED = ("image_encoder", "appearance", "condition", "denoiser", "decoder")


@functools.cache
def networks() -> Networks:
    parts = {name: module for name, module in modules().items() if name != "enhancer"}
    return Networks(**parts)  # type: ignore[arg-type]


@functools.cache
def parts() -> dict[str, Part]:
    root, found = assemble(networks(), SIZES)
    fill(root)
    return found


@functools.cache
def bundle() -> Bundle:
    """Of what a chunk runs, with the weights as they are."""

    def make(folder: Path) -> None:
        write_bundle(folder, parts(), SIZES, networks(), only=USED)

    return Bundle.load(made_once("streamingt2v-golden", make))


def description() -> Any:
    """What the driver and a decoder read of a bundle, from the modules alone."""
    high, wide = SIZES.latent
    return SimpleNamespace(
        latent=Latent(4, high, wide),
        video=Video(8 * high, 8 * wide, 8.0, 1),
        components={name: SimpleNamespace(inputs=specs(parts()[name])) for name in USED},
    )


def specs(part: Part) -> dict[str, TensorSpec]:
    """Of a module's inputs: shapes of the example, with the axes that a build chooses by name."""
    found = {}
    for key, value in part.inputs.items():
        listed = isinstance(value, list)
        for index, tensor in enumerate(value if listed else [value]):
            shape: list[int | str] = list(tensor.shape)
            for axis, symbol in part.dynamic.get(key, {}).items():
                shape[axis] = symbol
            name = f"{key}.{index}" if listed else key
            found[name] = TensorSpec(tuple(shape), str(tensor.dtype).removeprefix("torch."))
    return found


class Runs(FakeExecutor):
    """Networks that are functions, its decoder among them."""

    def output(self, variant: Variant, name: str) -> np.ndarray:
        """As the last run left it; a prediction is always the same array."""
        made = self._outputs.setdefault(variant, {})
        if name not in made:
            latents = self.inputs(variant)["latents"]
            made[name] = np.zeros((variant.symbols["branches"], *latents.shape), np.float32)
        return made[name]

    def run(self, variant: Variant) -> None:
        made = self.networks[variant.component].run(self.inputs(variant), [])
        for name, value in made.items():
            if name == "prediction":
                self.output(variant, name)[...] = value
            else:
                self._outputs.setdefault(variant, {})[name] = value

    def input(self, variant: Variant, name: str) -> np.ndarray:
        return self.inputs(variant)[name]

    def decoder(self, *, device_frames: bool = False) -> Any:
        return HostDecoder(self, description())  # type: ignore[arg-type]

    def codec(self) -> Runs:
        return self


def in_torch(name: str) -> FakeNetwork:
    import torch

    part = parts()[name]

    def run(given: Arrays, rings: Any) -> Arrays:
        inputs: dict[str, Any] = {}
        for key, value in given.items():
            listed, _, place = key.partition(".")
            tensor = torch.from_numpy(value.copy())
            if place:
                inputs.setdefault(listed, []).append(tensor)
            else:
                inputs[key] = tensor
        return run_torch(part.module, inputs, part.outputs)

    return FakeNetwork(specs(part), {}, run)


def in_onnx(name: str) -> FakeNetwork:
    component = bundle().component(name)
    session = ort.InferenceSession(bundle().path(component.portable), providers=["CPUExecutionProvider"])
    names = list(component.outputs)
    return FakeNetwork(
        component.inputs,
        {},
        lambda given, rings: dict(zip(names, session.run(names, given), strict=True)),
    )


def executor_of(runner: str, cache: Path) -> Any:
    if runner in ("torch", "portable"):
        made = {name: (in_torch if runner == "torch" else in_onnx)(name) for name in USED}
        return Runs(made)
    variants = stream_variants(bundle(), make_method(METHOD, None, 1))
    options: Any = {"backend": runner, "precision": "fp32", "threads": 1, "cache_dir": cache}
    return load_program(build(bundle(), variants=variants, **options)).executor()


def drawn(seed: int, frame: int, shape: Any, draw: int | None = None, out: Any = None) -> np.ndarray:
    """The noise of the original in place of a stream's own."""
    row = frame - REGENERATED if frame >= REGENERATED else SEEN + frame
    noise = array("ddim_inputs/x_T")[0, :, row] if draw is None else array("ddim_inputs/noise")[draw, row]
    out[...] = noise
    return noise


def check(got: np.ndarray, name: str, own: str) -> None:
    largest, relative = difference(got, name)
    allowed = own_error(own)
    said = f"{name}: {largest:.2e} {relative:.2e}, own {allowed}"
    assert largest <= 2 * allowed[0], said
    assert relative <= 2 * allowed[1], said


@pytest.mark.parametrize("runner", ["torch", "portable", "onnxruntime", "openvino"])
def test_a_chunk_by_the_driver_is_that_of_the_original(
    runner: str, plan_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver_module, "frame_noise", drawn)
    executor = executor_of(runner, plan_cache)
    described = description() if isinstance(executor, Runs) else bundle()
    driver = Driver(executor, described)
    how = method_settings(METHOD)
    settings: Mapping[str, Any] = stream_settings(METHOD, guidance=how.guidance)
    schedule = make_method(how, 1, 1)
    state = open_state(driver, schedule, how.make_sampler(), settings, {}, executor, described.latent)
    state.text = {"text": np.concatenate([array("ddim_inputs/text"), array("ddim_inputs/negative_text")])}
    state.kept = {
        "pixels": array("ddim_inputs/cond_rgb").copy(),
        "anchor_pixels": array("ddim_inputs/anchor_rgb")[0].copy(),
    }
    latents = []
    while not state.ended:
        is_denoised = bool(state.call_at(state.call).lanes)
        driver.step([state])
        if is_denoised:
            latents.append(state.store.state()["latents"].transpose(1, 0, 2, 3))
    check(state.kept["anchor"][::-1], "ddim_outputs/img_tokens", "ddim:ddim_img_tokens")
    check(np.stack(latents), "ddim_outputs/latents", "ddim:ddim_latents")
    check(state.kept["pixels"] * 0.5 + 0.5, "ddim_outputs/video_tail", "ddim:ddim_video_tail")
    (clip,) = [clip.result() for clip in state.clips]
    shown = np.moveaxis(state.kept["pixels"] * 127.5 + 127.5, 1, -1)
    assert np.array_equal(clip, shown.astype(np.uint8))
    state.decoder.close()
    executor.close()
