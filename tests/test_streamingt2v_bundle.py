"""The exported components against torch, through portable ONNX and CPU plans."""

from __future__ import annotations

from pathlib import Path

import pytest
import streamingt2v_family

from pyengine.bundle.bundle import TensorSpec
from pyengine.export.parity import parity

LATENT = (4, 16, 16)
SMALL = ("appearance", "image_encoder", "condition", "decoder", "encoder", "first_text", "enhancer_text")


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SMALL, "denoiser", "first_denoiser", "enhancer"])
def test_a_component_is_what_torch_computes(name: str, plan_cache: Path) -> None:
    bundle, parts = streamingt2v_family.bundle(name), streamingt2v_family.parts()
    modules = {name: (parts[name].module, parts[name].inputs)}
    parity(bundle, modules, precisions=("fp32",), cache_dir=plan_cache).check()


@pytest.mark.slow
def test_the_denoiser_has_the_axes_of_the_contract() -> None:
    bundle = streamingt2v_family.bundle("denoiser")
    component, frames = bundle.component("denoiser"), streamingt2v_family.SIZES.frames
    assert component.inputs["latents"] == TensorSpec(("streams", frames, *LATENT), "float32")
    assert component.inputs["level"] == TensorSpec(("streams", frames), "float32")
    assert component.inputs["condition"].shape == ("streams", 2, 64, 16, 16)
    assert component.outputs["prediction"].shape == ("branches", "streams", frames, *LATENT)
    keys = streamingt2v_family.bundle("appearance").component("appearance").outputs
    for prefix, count in (("text", 16), ("cam_text", 7)):
        for index in range(count):
            for kind in ("key", "value"):
                name = f"{prefix}_{kind}.{index}"
                shape = component.inputs[name].shape
                assert shape == ("branches", "streams", *keys[name].shape[1:])
                assert keys[name].shape[0] == len(bundle.branches)
    assert set(keys) < set(component.inputs)
    assert bundle.method["name"] == "streamingt2v"
