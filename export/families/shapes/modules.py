"""The four networks of the family `shapes`: untrained, from training folders, or from a bundle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from safetensors.torch import load_file
from torch import Tensor, nn

from pyengine.bundle.bundle import Bundle
from pyengine.bundle.graph_file import load_graph
from pyengine.errors import BundleError, ConfigError

from ...graph import round_weights
from .autoencoder import Decoder, Encoder, FrameDecoder, FrameEncoder
from .denoiser import Denoiser, DenoiserConfig
from .text_encoder import PromptEncoder, TextEncoder

OP = "FrameWindowAttention"
HALF = ".fp16"  # ends the name of an initialiser that is stored in half precision and cast


@dataclass
class Modules:
    """The four networks of the family, weights rounded to what the bundle stores."""

    denoiser: Denoiser
    text_encoder: TextEncoder
    encoder: Encoder
    decoder: Decoder

    @classmethod
    def random(cls, config: DenoiserConfig | None = None, seed: int = 0) -> Modules:
        """Untrained networks for tests and benchmarks, with the zero-initialised layers filled so that every path counts."""
        config = config or DenoiserConfig()
        torch.manual_seed(seed)
        modules = cls(
            Denoiser(config), TextEncoder(config.depth, config.width, config.heads), Encoder(), Decoder()
        )
        for part in modules.parts():
            for parameter in part.parameters():
                if not parameter.any():
                    nn.init.normal_(parameter, std=0.02)
        return modules.rounded()

    @classmethod
    def trained(
        cls, autoencoder: Path | None, denoiser: Path | None, bundle: Bundle | None = None
    ) -> Modules:
        """The averaged weights of training folders; `bundle` gives those that have none. Raises ConfigError."""
        if bundle is None and (autoencoder is None or denoiser is None):
            raise ConfigError(
                "expected --autoencoder and --denoiser, or --bundle in place of one, but got neither"
            )
        config = DenoiserConfig()
        text = TextEncoder(config.depth, config.width, config.heads)
        modules = load_modules(bundle) if bundle else cls(Denoiser(config), text, Encoder(), Decoder())
        for folder, parts, weights in (
            (autoencoder, {"encoder": modules.encoder, "decoder": modules.decoder}, autoencoder_weights),
            (denoiser, {"denoiser": modules.denoiser, "text": modules.text_encoder}, averaged_weights),
        ):
            if folder is not None:
                nn.ModuleDict(parts).load_state_dict(weights(folder))
        return modules.rounded()

    def parts(self) -> tuple[nn.Module, ...]:
        return self.denoiser, self.text_encoder, self.encoder, self.decoder

    def rounded(self) -> Modules:
        """Weights rounded to fp16, as the bundle keeps them; evaluation mode."""
        for part in self.parts():
            round_weights(part.eval())
        return self


def averaged_weights(folder: Path) -> dict[str, Tensor]:
    """What a training folder ships."""
    return load_file(folder / "average.safetensors")


def autoencoder_weights(folder: Path) -> dict[str, Tensor]:
    """Encoder and decoder of a training folder, without the head that only training needs."""
    weights = averaged_weights(folder)
    return {name: value for name, value in weights.items() if not name.startswith("alignment.")}


def load_modules(bundle: Bundle) -> Modules:
    """The modules of a bundle again, from nothing but its portable ONNX files. Raises BundleError."""
    if bundle.family != "shapes":
        raise BundleError(
            f"expected a bundle of family shapes but got {bundle.family!r}: other families have no modules here"
        )
    config = denoiser_config(bundle)
    text = TextEncoder(config.depth, config.width, config.heads)
    modules = Modules(Denoiser(config), text, Encoder(), Decoder())
    # The exporter folds the encoder's last normalisation into the convolution before it; what is left changes nothing.
    nn.init.constant_(modules.encoder.norm.get_buffer("running_var"), 1 - modules.encoder.norm.eps)
    parts: dict[str, nn.Module] = {
        "denoiser": modules.denoiser,
        "text_encoder": PromptEncoder(text),
        "encoder": FrameEncoder(modules.encoder),
        "decoder": FrameDecoder(modules.decoder),
    }
    for name, module in parts.items():
        fill(module.eval(), weights_of(bundle, name), name)
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
    hidden = _initializers(load_graph(bundle.path(component.portable)))["blocks.0.mlp_in.bias"].size
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


def weights_of(bundle: Bundle, name: str) -> dict[str, np.ndarray]:
    """The initialisers of a component's portable graph by the names of the module's parameters.

    The exporter keeps parameter names, but for the weight of a Linear, which it transposes under a new name:
    that is the matrix of the product to which the named bias is added.
    """
    model = load_graph(bundle.path(bundle.component(name).portable))
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
    return values


def fill(module: nn.Module, values: Mapping[str, np.ndarray], name: str) -> None:
    """Copies every parameter of a module. Raises BundleError for one that `values` lacks or has in another shape."""
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
