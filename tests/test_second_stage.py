"""The second stage of a bundle, seen as a bundle of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fake_streamingt2v
import pytest

from pyengine.build.variants import second_stage_of
from pyengine.bundle.bundle import Bundle, Component, Latent, TensorSpec, Video
from pyengine.bundle.manifest import Graph
from pyengine.bundle.second import NEEDED, second_stage
from pyengine.errors import BundleError

ENHANCER: dict[str, Any] = {
    "steps": 30, "levels": 600, "guidance": 7.5, "rescale": 0.2, "clip_frames": 24, "overlap": 8, "latent": [90, 160],
}  # fmt: skip


def component(name: str, **inputs: tuple[int | str, ...]) -> Component:
    specs = {key: TensorSpec(shape, "float32") for key, shape in inputs.items()}
    return Component(name, specs, {}, {}, {}, {}, f"{name}.onnx", Graph({}, {}, ()), None)


def bundle(*names: str, enhancer: dict[str, Any] | None = ENHANCER) -> Bundle:
    shapes: dict[str, dict[str, tuple[int | str, ...]]] = {
        "enhancer": {"latents": ("streams", 24, 4, 90, 160)},
        "enhancer_encoder": {"frames": ("chunk", 1, 720, 1280, 3)},
        "enhancer_decoder": {"latents": ("chunk", 4, 90, 160)},
    }
    components = {name: component(name, **shapes.get(name, {})) for name in ("decoder", "denoiser", *names)}
    return Bundle(
        Path("boats"),
        "boats",
        "streamingt2v",
        "1",
        Video(256, 256, 8.0, 1),
        Latent(4, 32, 32),
        None,
        fake_streamingt2v.METHOD | {"enhancer": enhancer},
        components,
        {},
    )


def test_its_networks_have_the_names_of_a_first_stage() -> None:
    found = second_stage(bundle(*NEEDED, "enhancer_text", "enhancer_text_encoder"))
    assert set(found.components) == {"enhancer", "decoder", "encoder", "projector", "text_encoder"}
    assert found.component("decoder").portable == "enhancer_decoder.onnx"
    assert all(found.components[name].name == name for name in found.components)
    assert found.video == Video(720, 1280, 8.0, 1)
    assert found.latent == Latent(4, 90, 160)
    # Plans are kept by this name: those of the two decoders are apart.
    assert found.name == "boats-enhancer"


@pytest.mark.parametrize("missing", NEEDED)
def test_what_is_missing_is_named(missing: str) -> None:
    there = [name for name in NEEDED if name != missing]
    with pytest.raises(BundleError, match=f"no component '{missing}'; export it with --enhancer"):
        second_stage(bundle(*there))


def test_what_a_build_compiles_of_it() -> None:
    found = second_stage_of(bundle(*NEEDED, "enhancer_text", "enhancer_text_encoder"))
    assert found is not None
    assert [str(variant) for variant in found[1]] == [
        "text_encoder",
        "projector",
        "enhancer.branches2.streams1",
        "decoder.chunk1",
        "encoder.chunk1",
    ]
    assert second_stage_of(bundle()) is None
    assert second_stage_of(bundle(*NEEDED, enhancer=None)) is None
