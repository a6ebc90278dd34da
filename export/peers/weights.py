"""The networks of a `shapes` bundle as torch modules again, from nothing but the bundle: what peers run."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import nn

from pyengine.bundle import Bundle
from pyengine.errors import BundleError

from ..families.shapes.autoencoder import Decoder, FrameDecoder
from ..families.shapes.denoiser import Denoiser, DenoiserConfig
from ..families.shapes.text_encoder import PromptEncoder, TextEncoder

OP = "FrameWindowAttention"
HALF = ".fp16"  # ends the name of an initialiser that is stored in half precision and cast


@dataclass
class PeerModules:
    """float32, evaluation mode, the very weights of the bundle."""

    denoiser: Denoiser
    text_encoder: PromptEncoder
    decoder: Decoder


def load_modules(bundle: Bundle) -> PeerModules:
    """Modules of a bundle of family `shapes`, filled from its portable ONNX files. Raises BundleError."""
    if bundle.family != "shapes":
        raise BundleError(
            f"expected a bundle of family shapes but got {bundle.family!r}: other families have no peers"
        )
    config = denoiser_config(bundle)
    modules = PeerModules(
        Denoiser(config), PromptEncoder(TextEncoder(config.depth, config.width, config.heads)), Decoder()
    )
    parts = (
        ("denoiser", modules.denoiser),
        ("text_encoder", modules.text_encoder),
        ("decoder", FrameDecoder(modules.decoder)),
    )
    for name, module in parts:
        fill(module.eval(), onnx.load(bundle.path(bundle.component(name).portable)), name)
    return modules


def denoiser_config(bundle: Bundle) -> DenoiserConfig:
    """The sizes of the denoiser, read off the shapes and attributes in the manifest."""
    component, latent = bundle.component("denoiser"), bundle.latent
    if component.cut is None or latent is None:
        raise BundleError(
            f"expected {OP} in the denoiser of bundle '{bundle.name}' but it has none; export it again"
        )
    tokens, heads, head_size = (int(size) for size in component.inputs["ring_key.0"].shape[2:])
    steps = [step for step in component.cut.steps if step.op == OP]
    side = round(tokens**0.5)
    hidden = _initializers(onnx.load(bundle.path(component.portable)))["blocks.0.mlp_in.bias"].size
    return DenoiserConfig(
        latent_channels=latent.channels,
        latent_size=latent.height,
        patch=latent.height // side,
        width=heads * head_size,
        depth=len(steps),
        heads=heads,
        mlp_ratio=hidden // (heads * head_size),
        rope_theta=float(steps[0].attributes["theta"]),
    )


def fill(module: nn.Module, model: onnx.ModelProto, name: str) -> None:
    """Copies every parameter from the initialisers of an exported module.

    The exporter keeps parameter names, but for the weight of a Linear, which it transposes under a new name:
    that is the matrix of the product to which the named bias is added.
    """
    values = _initializers(model)
    producer = {output: node for node in model.graph.node for output in node.output}
    for node in model.graph.node:
        if node.op_type != "Add":
            continue
        for bias, product in (tuple(node.input), tuple(reversed(node.input))):
            source = producer.get(product)
            if (
                bias.endswith(".bias")
                and source is not None
                and source.op_type == "MatMul"
                and source.input[1] in values
            ):
                values[f"{bias.removesuffix('bias')}weight"] = values[source.input[1]].T
    with torch.no_grad():
        for key, parameter in module.named_parameters():
            if key not in values or values[key].shape != tuple(parameter.shape):
                raise BundleError(
                    f"expected {key} {list(parameter.shape)} in {name}.onnx but it is not there (equal "
                    "parameters, as an untrained network has them, are merged): export a trained bundle"
                )
            parameter.copy_(torch.from_numpy(np.array(values[key], np.float32)))


def _initializers(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {
        tensor.name.removesuffix(HALF): numpy_helper.to_array(tensor) for tensor in model.graph.initializer
    }
