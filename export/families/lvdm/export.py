"""From modules to a bundle: `pyengine export lvdm --configuration sky ...`, or the small trained one with --training DIR."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pyengine.bundle.bundle import Bundle, Latent, Text, Video, write_manifest
from pyengine.errors import BackendUnavailable, BundleError, ConfigError
from pyengine.schedule.samplers import Prediction

from ...clip import clip_tokenizer
from ...graph import Inputs, export_component, round_weights
from ...output import prepared
from ...weights import WeightStore
from ..shapes import autoencoder as causal
from ..shapes import modules as shapes
from ..shapes.recipe import FPS, HEIGHT, WIDTH
from .autoencoder2d import AutoencoderKL
from .autoencoder3d import Autoencoder3D
from .checkpoint import load_checkpoint, load_part
from .components import Denoiser, Embedding, TextEncoder, VideoDecoder, folded_parameters
from .released import Configuration, configuration
from .small import BETAS, INTERPOLATION, PREDICTION, PREDICTS
from .unet import UNet

VERSION = "1"
RELEASED_FPS = 8.0
CLIP_TOKENS = 77
TIMESTEPS = 1000
# Of two levels: the exact decoder, and the published loop with its bugs, which decodes so.
WHOLE_PRESETS = {"whole": {"decode": "whole"}, "released": {"decode": "whole", "behaviour": "released"}}
# Of the small model. Half of the released steps, for a minute of video in less than one. Two known keys show a velocity, one does not. The
# released guidance of 0.1 would double the cost of a call, and its frames look no better.
SMALL_METHOD = {"steps": 25, "guidance": 0.0, "known": 2}


@dataclass
class Modules:
    """The networks of one bundle. `unets` by level: prediction, and interpolation for two-level models.

    `autoencoder`: a published one or, for the small model, the causal decoder of `shapes`, which remembers.
    """

    unets: dict[str, UNet]
    autoencoder: Autoencoder3D | AutoencoderKL | causal.Decoder
    clip_frames: dict[str, int]
    latent_size: tuple[int, int]  # height, width
    scale_factor: float
    shift_factor: float
    betas: tuple[float, float]
    fps: float
    predicts: Prediction = "epsilon"
    text: nn.Module | None = None  # the text tower, where there is one
    empty_prompt: Tensor | None = None  # its ids for ""

    def parts(self) -> list[nn.Module]:
        return [*self.unets.values(), self.autoencoder, *([self.text] if self.text is not None else [])]

    def rounded(self) -> Modules:
        """Weights rounded to fp16, as the bundle keeps them; evaluation mode."""
        for part in self.parts():
            round_weights(part.eval())
        return self

    @property
    def frames_per_latent(self) -> int:
        if isinstance(self.autoencoder, causal.Decoder):
            return causal.FRAMES_PER_LATENT
        return self.autoencoder.factors[0] if isinstance(self.autoencoder, Autoencoder3D) else 1

    @property
    def shrinks(self) -> int:
        """Pixels per latent, height and width alike."""
        return self.autoencoder.factors[1] if isinstance(self.autoencoder, Autoencoder3D) else 8


def components(modules: Modules) -> dict[str, tuple[nn.Module, Inputs]]:
    """Each component's module with example inputs, as export and parity take them."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    parts: dict[str, tuple[nn.Module, Inputs]] = {}
    branches, streams = 2, 3
    for name, unet in modules.unets.items():
        frames = modules.clip_frames[name]
        inputs: dict[str, Any] = {"timesteps": torch.tensor([981, 1])}
        if unet.num_classes is not None:
            inputs["level"] = torch.tensor([100, 100]).clamp(max=unet.num_classes - 1)
        embedding = Embedding(unet)
        parts[f"{name}_embedding"] = (embedding, inputs)
        with torch.no_grad():
            values = embedding(**inputs).shape[-1]
        inputs = {
            "latents": normal(streams, frames, unet.out_channels, *modules.latent_size),
            "embedding": normal(branches, streams, values),
        }
        if unet.in_channels > unet.out_channels:
            inputs["mask"] = torch.eye(branches, frames)[:, None].repeat(1, streams, 1)
        if unet.context_dim is not None:
            with torch.no_grad():
                texts = unet.text_keys(normal(branches * streams, CLIP_TOKENS, unet.context_dim))
            texts = [text.unflatten(0, (branches, streams)) for text in texts]
            inputs["text_key"], inputs["text_value"] = texts[::2], texts[1::2]
        parts[name] = (Denoiser(unet), inputs)
    chunk = max(2, modules.clip_frames["prediction"])
    channels = modules.unets["prediction"].out_channels
    latents = {"latents": normal(chunk, channels, *modules.latent_size)}
    if isinstance(modules.autoencoder, causal.Decoder):
        memory = {name: normal(*shape) for name, shape in modules.autoencoder.memory_shapes.items()}
        parts["decoder"] = (causal.FrameDecoder(modules.autoencoder), latents | memory)
    else:
        decoder = VideoDecoder(modules.autoencoder, modules.scale_factor, modules.shift_factor)
        parts["decoder"] = (decoder, latents)
    if modules.text is not None and modules.empty_prompt is not None:
        encoder = TextEncoder(modules.text, modules.unets["prediction"], modules.empty_prompt)
        parts["text_encoder"] = (encoder, {"ids": modules.empty_prompt.flip(0)})
    return parts


def export_bundle(
    modules: Modules,
    folder: Path,
    name: str,
    method: Mapping[str, Any],
    tokenizer: str | None = None,
    only: tuple[str, ...] | None = None,
) -> Bundle:
    """Write the bundle into a new or empty folder, or over an earlier bundle. `tokenizer`: its JSON. `only`: no other components.

    Raises OutputError.
    """
    prepared(folder)
    store = WeightStore()
    exported = {}
    layers = 0
    for component, (module, inputs) in components(modules).items():
        layers = max(layers, len(inputs.get("text_key", ())))
        if only is not None and component not in only:
            continue
        arguments = {"module": module, "inputs": inputs, "folder": folder, "name": component, "store": store}
        exported[component] = export_component(**arguments, **_axes(component, inputs, layers))  # type: ignore[arg-type]
    store.write(folder)
    text = None
    if modules.text is not None and tokenizer is not None:
        (folder / "tokenizer.json").write_text(tokenizer)
        text = Text("tokenizer.json", CLIP_TOKENS, example="a boat sails on a calm lake at sunset")
    height, width = (size * modules.shrinks for size in modules.latent_size)
    return write_manifest(
        folder,
        name=name,
        family="lvdm",
        version=VERSION,
        components=exported,
        video=Video(height, width, modules.fps, modules.frames_per_latent),
        latent=Latent(modules.unets["prediction"].out_channels, *modules.latent_size),
        text=text,
        method=method,
        branches=("condition" if modules.text is None else "prompt", "null"),
    )


def _axes(component: str, inputs: Inputs, layers: int) -> dict[str, Any]:
    """Names of the outputs, and the axes that a build chooses."""
    if component == "decoder":
        memory = [name for name in inputs if name != "latents"]
        return {
            "outputs": ["frames", *(f"{name}.next" for name in memory)],
            "dynamic": {"latents": {0: "chunk"}},
            "state": {name: f"{name}.next" for name in memory},
            "working": [f"{name}*" for name in memory],
        }
    if component == "text_encoder":
        pairs = [name for i in range(layers) for name in (f"text_key.{i}", f"text_value.{i}")]
        return {"outputs": pairs, "working": pairs}
    if component.endswith("_embedding"):
        return {"outputs": ["projected"], "dynamic": {name: {0: "steps"} for name in inputs}}
    axes = {name: {0: "streams"} if name == "latents" else {0: "branches", 1: "streams"} for name in inputs}
    texts = ["text_key*", "text_value*"] if layers else []
    return {"outputs": ["prediction"], "dynamic": axes, "working": texts}


def clip_method(modules: Modules, guidance: float) -> dict[str, Any]:
    """One clip of a short or text-to-video model, as the released scripts sample it with DDIM."""
    return _method(modules) | {
        "name": "clip",
        "stride": 1,
        "chunk_frames": modules.clip_frames["prediction"],
        "guidance": guidance,
        "guidance_form": "text",
        "perturbation": None,
    }


def long_method(modules: Modules, guidance: float = 0.1, perturbation: int | None = 100) -> dict[str, Any]:
    """Two levels, with the released guidance and perturbation."""
    stride = modules.clip_frames["interpolation"] - 1
    remembers, common = isinstance(modules.autoencoder, causal.Decoder), _method(modules)
    return common | {
        "name": "hierarchical",
        "stride": stride,
        "chunk_frames": stride,
        "guidance": guidance,
        "guidance_form": "original",
        "perturbation": perturbation,
        "levels": modules.unets["interpolation"].num_classes,
        # A decoder with a memory takes each latent once, in order: exact, and bounded however long the video is.
        "decode": "streamed" if remembers else "windowed",
        "presets": common["presets"] | ({} if remembers else WHOLE_PRESETS),
    }


def _method(modules: Modules) -> dict[str, Any]:
    return {
        "steps": 50,
        "timesteps": TIMESTEPS,
        "eta": 1.0,
        "betas": list(modules.betas),
        "predicts": modules.predicts,
        "clip_frames": modules.clip_frames["prediction"],
        "known": 1,
        "clips_per_round": 1,
        "left_context": 2,
        "decode": "windowed",
        "behaviour": "intended",
        "presets": {"ddpm": {"steps": TIMESTEPS}},
    }


def random_modules(
    configurations: Mapping[str, Configuration], latent_size: tuple[int, int] = (32, 32), seed: int = 0
) -> Modules:
    """Untrained networks with the zero-initialised layers filled, so that every path counts."""
    torch.manual_seed(seed)
    first = configurations["prediction"]
    autoencoder: Autoencoder3D | AutoencoderKL = (
        AutoencoderKL(**first.autoencoder) if first.is_text else Autoencoder3D(**first.autoencoder)
    )
    unets = {level: UNet(**each.unet) for level, each in configurations.items()}
    for part in (autoencoder, *unets.values()):
        for parameter in part.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.02)
    return Modules(
        unets,
        autoencoder,
        {level: each.clip_frames for level, each in configurations.items()},
        latent_size,
        first.scale_factor,
        first.shift_factor,
        first.betas,
        RELEASED_FPS,
    )


def trained_modules(folder: Path, source: Bundle) -> Modules:
    """The networks of a folder of `training.lvdm.train_shapes`, and the decoder of the bundle whose latents they were trained on."""
    modules = _small_modules(shapes.load_modules(source).decoder)
    for name, unet in modules.unets.items():
        unet.load_state_dict(load_file(folder / name / "average.safetensors"))
    return modules


def load_modules(bundle: Bundle) -> Modules:
    """The networks of a bundle of the small model again, from nothing but its portable ONNX files. Raises BundleError."""
    if (
        bundle.family != "lvdm"
        or "interpolation" not in bundle.components
        or "coarse" not in bundle.component("decoder").inputs
    ):
        raise BundleError(
            f"expected a bundle of the small LVDM, such as shapes-lvdm, but got '{bundle.name}'"
        )
    modules = _small_modules(causal.Decoder())
    for name, unet in modules.unets.items():
        values = shapes.weights_of(bundle, name) | shapes.weights_of(bundle, f"{name}_embedding")
        shapes.fill(Denoiser(unet), values | folded_parameters(unet, values), name)
    assert isinstance(modules.autoencoder, causal.Decoder)
    decoder = causal.FrameDecoder(modules.autoencoder)
    shapes.fill(decoder, shapes.weights_of(bundle, "decoder"), "decoder")
    return modules.rounded()


def _small_modules(decoder: causal.Decoder) -> Modules:
    """The small model without its weights."""
    return Modules(
        {"prediction": UNet(**PREDICTION), "interpolation": UNet(**INTERPOLATION)},
        decoder,
        {"prediction": 4, "interpolation": 5},
        (HEIGHT // causal.SPATIAL_FACTOR, WIDTH // causal.SPATIAL_FACTOR),
        1.0,
        0.0,
        BETAS,
        FPS,
        predicts=PREDICTS,
    )


def run(arguments: argparse.Namespace) -> int:
    """The command's work: export, then say how large the bundle is."""
    name, tokenizer = arguments.configuration, None
    bundle_name = "shapes-lvdm" if name is None else f"lvdm-{name}"
    if (arguments.training is None) == (arguments.configuration is None):
        raise ConfigError("expected --training or --configuration but got both or neither")
    if (name == "text2video") != (arguments.clip is not None):
        raise ConfigError(
            "expected --clip with --configuration text2video, and with no other, but got "
            f"{'no --clip' if arguments.clip is None else f'--clip with {name}'}; "
            "text to video reads openai/clip-vit-large-patch14"
        )
    if arguments.training is not None:
        modules = trained_modules(Path(arguments.training), Bundle.load(arguments.autoencoder))
    else:
        levels = (
            {"prediction": "sky_pred", "interpolation": "sky_interp"}
            if name == "long"
            else {"prediction": name}
        )
        modules = random_modules({level: configuration(which) for level, which in levels.items()})
        fill(modules, arguments.checkpoint, arguments.weights)
        if arguments.clip is not None:
            tokenizer = add_clip(modules, Path(arguments.clip))
    method = (
        long_method(modules)
        if len(modules.unets) == 2
        else clip_method(modules, 15.0 if modules.text else 1.0)
    )
    if arguments.training is not None:
        method |= SMALL_METHOD
    bundle = export_bundle(modules.rounded(), Path(arguments.output), bundle_name, method, tokenizer)
    size = sum(path.stat().st_size for path in bundle.folder.iterdir())
    print(f"{bundle.folder}: {len(bundle.files) + 1} files, {size / 1e6:.1f} MB")
    return 0


def fill(modules: Modules, checkpoints: list[str] | None, weights: str) -> None:
    """Loads released checkpoints strictly, one per level; the first has the autoencoder."""
    if checkpoints is None:
        print("no --checkpoint: the weights are random, which is good for measuring alone", file=sys.stderr)
        return
    if len(checkpoints) != len(modules.unets):
        raise ConfigError(f"expected {len(modules.unets)} checkpoints but got {len(checkpoints)}")
    for index, (path, unet) in enumerate(zip(checkpoints, modules.unets.values(), strict=True)):
        state = load_checkpoint(Path(path))
        load_part(unet, state, "unet", weights)
        if index == 0:
            load_part(modules.autoencoder, state, "autoencoder", "raw")


def add_clip(modules: Modules, folder: Path) -> str:
    """The text tower of a local CLIP folder. Returns the tokenizer as JSON, which pads to 77 tokens with CLIP's own pad token.

    Raises BackendUnavailable without `transformers`, BundleError for a folder that holds no CLIP.
    """
    try:
        from transformers import CLIPTextModel
    except ImportError as error:
        raise BackendUnavailable(
            f"a CLIP folder is read by transformers ({error}): pip install 'pyengine-video[lvdm]'"
        ) from error
    try:
        modules.text = CLIPTextModel.from_pretrained(folder, local_files_only=True)
        tokenizer, modules.empty_prompt = clip_tokenizer(folder, CLIP_TOKENS)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BundleError(
            f"expected openai/clip-vit-large-patch14 at '{folder}' but it cannot be read ({reason}); download it again"
        ) from error
    return tokenizer
