"""The bundle contract: the axes of a denoiser, and that streams of one call know nothing of each other."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import lvdm_family
import numpy as np
import onnxruntime as ort
import opensora_family
import pytest
import torch
import toy_family
from torch import Tensor, nn

from pyengine.bundle.bundle import Bundle, Component, TensorSpec
from pyengine.export.families.lvdm.components import Denoiser
from pyengine.export.families.lvdm.export import load_modules as load_lvdm
from pyengine.export.families.opensora.export import components as opensora_components
from pyengine.export.families.shapes.modules import load_modules

FRAMES, RING = 5, 4
ROWS = "branches*streams"
EXPORTED = ("opensora", "opensora-ring", "lvdm-prediction", "lvdm-interpolation", "lvdm-text")
CASES = (
    "toy",
    "shapes",
    "shapes-lvdm",
    *(pytest.param(name, marks=pytest.mark.slow) for name in EXPORTED),
)


@dataclass(frozen=True)
class Case:
    bundle: Bundle
    component: Component
    module: nn.Module

    def inputs(self, branches: int, streams: int) -> dict[str, Tensor]:
        """Inputs by graph name; streams stand at different frames and levels, with absent rows and empty slots."""
        random = torch.Generator().manual_seed(5)
        sizes = self.sizes(branches, streams)
        tensors = {}
        for name, spec in self.component.inputs.items():
            shape = spec.resolve(sizes)
            if spec.dtype == "bool":
                tensors[name] = torch.rand(shape, generator=random) < 0.7
                tensors[name][..., 0] = True
            elif name == "frame_index":
                tensors[name] = torch.arange(FRAMES) + RING + 9 * torch.arange(streams)[:, None]
                tensors[name][-1, 0] = -1
            elif name == "ring_index":
                tensors[name] = torch.arange(RING) + 9 * torch.arange(streams)[:, None]
                tensors[name][0, 1] = -1
            elif name in ("level", "mask"):
                tensors[name] = torch.rand(shape, generator=random)
            elif name == "text_mask":
                tensors[name] = torch.where(torch.rand(shape, generator=random) < 0.7, 0.0, -1e4)
                tensors[name][..., 0] = 0
            else:
                tensors[name] = torch.randn(shape, generator=random)
        return tensors

    def sizes(self, branches: int, streams: int) -> dict[str, int]:
        own = {"branches": branches, "streams": streams, "frames": FRAMES, "ring": RING}
        return {name: size for name, size in own.items() if name in self.component.symbols}

    def torch(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        """Outputs of the module by graph name."""
        arguments: dict[str, Any] = {}
        for name, tensor in tensors.items():
            value = tensor.to(dtype) if tensor.is_floating_point() else tensor
            key, _, index = name.partition(".")
            if index:
                arguments.setdefault(key, []).append(value)
            else:
                arguments[key] = value
        with torch.no_grad():
            outputs = copy.deepcopy(self.module).to(dtype)(**arguments)
        listed = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        return dict(zip(self.component.outputs, listed, strict=True))


def of_stream(
    tensors: Mapping[str, Tensor], specs: Mapping[str, TensorSpec], stream: int
) -> dict[str, Tensor]:
    """The part of one stream, with an axis of one stream."""
    found = {}
    for name, tensor in tensors.items():
        axis = specs[name].axis("streams")
        if axis is not None:
            found[name] = tensor.narrow(axis, stream, 1)
        elif specs[name].shape[0] == ROWS:
            streams = tensors["latents"].shape[0]
            found[name] = tensor.unflatten(0, (-1, streams))[:, stream]
        else:
            found[name] = tensor
    return found


@functools.cache
def case(name: str) -> Case:
    if name == "toy":
        bundle, module = toy_family.bundle(), toy_family.modules()["denoiser"][0]
    elif name == "shapes":
        bundle = Bundle.load("shapes")
        module = load_modules(bundle).denoiser
    elif name.startswith("opensora"):
        context = "ring" if name.endswith("ring") else "recompute"
        options = replace(opensora_family.OPTIONS, context=context)
        bundle = opensora_family.bundle(options, only=("denoiser", "text_encoder"))
        parts = opensora_components(opensora_family.denoiser(), opensora_family.autoencoder(), options)
        module = parts["denoiser"].module
    elif name == "shapes-lvdm":
        bundle = Bundle.load(name)
        module = Denoiser(load_lvdm(bundle).unets["prediction"])
        return Case(bundle, bundle.component("prediction"), module)
    elif name == "lvdm-text":
        bundle = lvdm_family.text_bundle()
        module = Denoiser(lvdm_family.text_modules().unets["prediction"])
        return Case(bundle, bundle.component("prediction"), module)
    else:
        bundle, level = lvdm_family.bundle(), name.partition("-")[2]
        return Case(bundle, bundle.component(level), Denoiser(lvdm_family.modules().unets[level]))
    return Case(bundle, bundle.component("denoiser"), module)


@pytest.mark.parametrize("name", CASES)
def test_every_denoiser_has_the_axes_of_the_contract(name: str) -> None:
    component, latent = case(name).component, case(name).bundle.latent
    assert latent is not None
    inputs, outputs = component.inputs, component.outputs
    frames = inputs["latents"].shape[1]
    places = (frames, latent.channels, latent.height, latent.width)
    assert inputs["latents"] == TensorSpec(("streams", *places), "float32")
    assert outputs["prediction"] == TensorSpec(("branches", "streams", *places), "float32")
    assert set(component.symbols) >= {"branches", "streams"}
    for wanted, names in {
        ("streams", "frames"): ("level", "frame_index"),
        ("streams", "ring"): ("ring_index",),
        ("branches", "streams"): ("text_mask", "text_vector", "mask", "embedding"),
    }.items():
        for known in set(names) & set(inputs):
            assert inputs[known].shape[:2] == wanted, known
    for known, spec in {**inputs, **outputs}.items():
        if known.startswith("text_"):
            axis = spec.axis("streams")
            assert axis is not None
            assert spec.shape[axis - 1] == "branches", known
        if known in {*component.ring, *component.ring.values()}:
            assert spec.shape[0] == ROWS, known


@pytest.mark.parametrize("name", ["shapes", pytest.param("opensora", marks=pytest.mark.slow)])
def test_features_of_a_prompt_are_one_slice_of_the_denoisers_inputs(name: str) -> None:
    bundle = case(name).bundle
    features, inputs = bundle.component("text_encoder").outputs, bundle.component("denoiser").inputs
    assert set(features) == {key for key in inputs if key.startswith("text_")}
    for key, feature in features.items():
        sizes = {"branches": len(bundle.branches), "streams": 4}
        axis = inputs[key].axis("streams")
        assert axis is not None
        place = np.zeros(inputs[key].resolve(sizes))[(slice(None),) * axis + (2,)]
        assert place.shape == feature.resolve({}), key


@pytest.mark.parametrize("name", CASES)
def test_streams_of_one_call_equal_calls_of_their_own(name: str) -> None:
    it = case(name)
    inputs = it.inputs(2, 3)
    together = it.torch(inputs, torch.float64)
    for stream in range(3):
        alone = it.torch(of_stream(inputs, it.component.inputs, stream), torch.float64)
        for key, part in alone.items():
            whole = together[key]
            axis = it.component.outputs[key].axis("streams")
            got = whole.narrow(axis, stream, 1) if axis is not None else whole.unflatten(0, (2, 3))[:, stream]
            torch.testing.assert_close(got, part, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", CASES)
def test_one_branch_alone_is_the_first_of_two(name: str) -> None:
    it = case(name)
    inputs = it.inputs(2, 2)
    first = {}
    for key, tensor in inputs.items():
        spec = it.component.inputs[key]
        axis = spec.axis("branches")
        rows = spec.shape[0] == ROWS
        first[key] = tensor[:2] if rows else tensor if axis is None else tensor.narrow(axis, 0, 1)
    both, alone = it.torch(inputs, torch.float64), it.torch(first, torch.float64)
    torch.testing.assert_close(alone["prediction"], both["prediction"][:1], rtol=1e-9, atol=1e-10)
    assert not torch.allclose(both["prediction"][0], both["prediction"][1], atol=1e-3)


@functools.cache
def session(name: str) -> ort.InferenceSession:
    it = case(name)
    path = it.bundle.path(it.component.portable)
    return ort.InferenceSession(path, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("streams", [1, 3])
@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_one_portable_graph_serves_every_number(name: str, branches: int, streams: int) -> None:
    it = case(name)
    inputs = it.inputs(branches, streams)
    wanted = it.torch(inputs, torch.float32)
    feeds = {key: tensor.numpy() for key, tensor in inputs.items()}
    got = session(name).run(list(wanted), feeds)
    sizes = it.sizes(branches, streams)
    for (key, exact), array in zip(wanted.items(), got, strict=True):
        assert array.shape == it.component.outputs[key].resolve(sizes)
        scale = float(exact.abs().max())
        assert np.abs(array - exact.numpy()).max() <= 2e-4 * scale, key


@pytest.mark.parametrize("name", CASES)
def test_no_segment_repeats_data_that_it_could_view(name: str) -> None:
    """Only the first segment spreads over the branches, and a constant target or a near tensor serves every other reshape."""
    import onnx

    it = case(name)
    assert it.component.cut is not None
    segments = [step for step in it.component.cut.steps if step.kind == "segment" and step.precision is None]
    for index, step in enumerate(segments):
        graph = onnx.load(it.bundle.path(str(step.file)), load_external_data=False).graph
        kinds = [node.op_type for node in graph.node]
        assert "Tile" not in kinds, step.file
        assert kinds.count("Expand") <= (2 if index == 0 else 0), step.file
