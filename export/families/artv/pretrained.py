"""ART-V on Stable Diffusion 2.1: the networks without memory for their weights, and where each weight comes from.

What is not the base's is in one file, under the names of `denoiser.Denoiser`: adapter, mask head, anchor encoder, the keys and values of
the anchor in each cross-attention, and the embedding of the references' noise level. Nothing of the kind was released; without such a file
all of it is zero, and every frame is a picture of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from pyengine.bundle.bundle import Video
from pyengine.errors import ConfigError, InputError

from ...checkpoints import Source, TensorFile, Weights, open_tensors
from ...clip import text_tower
from ...layers.frame_autoencoder import FrameAutoencoder
from .assembly import Modules
from .base import Base
from .config import REFERENCES, AdapterConfig, ArtvConfig
from .denoiser import Denoiser
from .masked import NoiseTable

SHRINKS = 8  # pixels per latent place
FPS = 8.0
EXAMPLE = "a boat sails on a calm lake at sunset"
CLOSED = -30.0  # bias of a mask that takes nothing of the reference
# Of the small model's steps nothing is known at this size: those of Stable Diffusion's own pipeline, and its guidance.
METHOD = {"steps": 25, "spacing": "leading", "guidance": 7.5, "augmentation": 0}
UNTRAINED = (
    "without trained adapter weights only the first frame would follow the prompt as ART-V does: each later one would be a picture of its "
    "own, that sees no frame before it; give --adapter FILE, or --untrained to go on"
)


@dataclass(frozen=True)
class Sizes:
    """Sizes that an adapter's file says. Those of an untrained one are the defaults."""

    adapter: AdapterConfig
    anchor_width: int = 1024
    anchor_hidden: int = 128
    anchor_halvings: int = 2

    @classmethod
    def untrained(cls, widths: tuple[int, ...]) -> Sizes:
        return cls(AdapterConfig(widths=widths, references=REFERENCES))

    @classmethod
    def of(cls, file: TensorFile, base: Base) -> Sizes:
        """Raises InputError for a file that is no adapter of ART-V."""
        shapes = {name: place.shape for name, place in file.tensors.items()}
        try:
            entering = shapes["adapter.conv_in.weight"][1]
            anchor = shapes["anchor.proj.weight"]
        except (KeyError, IndexError):
            raise InputError(
                f"[adapter] expected adapter.conv_in.weight and anchor.proj.weight in {file.path}, as ART-V's weights here have them, but "
                "they are not there; a T2I-Adapter alone does not do"
            ) from None
        channels = base.unet.channels
        in_pixels = entering % (3 * SHRINKS**2) == 0
        per_reference = 3 * SHRINKS**2 if in_pixels else channels
        if entering % per_reference:
            raise InputError(
                f"[adapter] expected references of {3 * SHRINKS**2} or {channels} channels each in {file.path} but all have {entering}"
            )
        blocks = {name.split(".")[4] for name in shapes if name.startswith("adapter.body.0.resnets.")}
        halvings = {name.split(".")[2] for name in shapes if name.startswith("anchor.halves.")}
        adapter = AdapterConfig(
            channels=3 if in_pixels else channels,
            unshuffle=SHRINKS if in_pixels else 1,
            widths=base.unet.widths,
            blocks=len(blocks),
            references=entering // per_reference,
        )
        return cls(adapter, anchor[0], anchor[1], len(halvings))


@dataclass(frozen=True)
class Pretrained:
    """Networks on the meta device, and the reader of their weights by name below `root`."""

    modules: Modules
    root: nn.Module
    read: Callable[[str], Tensor]


def pretrained(
    base: Base,
    adapter: str | Path | None,
    tokenizer: str,
    null: Tensor,
    *,
    untrained: bool = False,
    latent: tuple[int, int] | None = None,
    half: bool = True,
) -> Pretrained:
    """The networks of a folder with an adapter's file, or with zeros in its place where `untrained`.

    latent  height and width; those of the base's training without. Raises ConfigError, InputError.
    """
    if adapter is None and not untrained:
        raise ConfigError(UNTRAINED)
    file = None if adapter is None else open_tensors(adapter)
    sizes = Sizes.untrained(base.unet.widths) if file is None else Sizes.of(file, base)
    config = ArtvConfig(
        replace(base.unet, anchor_width=sizes.anchor_width),
        sizes.adapter,
        base.predicts,
        base.betas,
        base.timesteps,
    )
    with torch.device("meta"):
        denoiser = Denoiser(config, sizes.anchor_hidden, sizes.anchor_halvings)
        vae = FrameAutoencoder(**base.vae)
    denoiser.table = NoiseTable(config)
    text = text_tower(base.text)
    root = nn.ModuleDict({"denoiser": denoiser, "vae": vae, "text_encoder": text}).eval()
    weights = Weights({**base.weights.sources, **_own(file, denoiser)}, half)
    wanted = {_source(name): tuple(value.shape) for name, value in root.state_dict().items()}
    if file is None:
        wanted = {name: shape for name, shape in wanted.items() if not name.startswith("artv.")}
    weights.compare(wanted, "the UNet, the VAE and the text encoder" + (" and ART-V" if file else ""))
    side = base.sample
    size = latent or (side, side)
    modules = Modules(
        denoiser,
        text,
        null,
        vae,
        size,
        Video(SHRINKS * size[0], SHRINKS * size[1], FPS, 1),
        tokenizer,
        len(null),
        EXAMPLE,
        scale=base.scale,
        method=METHOD,
    )
    return Pretrained(modules, root, _reader(weights, dict(root.named_parameters())))


def is_own(name: str) -> bool:
    """Whether a parameter of `Denoiser` is ART-V's and not Stable Diffusion's."""
    return (
        not name.startswith("unet.") or "_anchor." in name or name.startswith("unet.augmentation_embedding.")
    )


def _own(file: TensorFile | None, denoiser: Denoiser) -> dict[str, Source]:
    return {} if file is None else {f"artv.{name}": Source(file, name) for name in file.tensors}


def _source(name: str) -> str:
    """Where a parameter below the root comes from."""
    prefix, _, rest = name.partition(".")
    if prefix == "denoiser":
        return f"artv.{rest}" if is_own(rest) else rest
    return f"{prefix}.{rest.removeprefix('text_model.')}" if prefix == "text_encoder" else name


def _reader(weights: Weights, parameters: Mapping[str, Tensor]) -> Callable[[str], Tensor]:
    def read(name: str) -> Tensor:
        source, shape = _source(name), parameters[name].shape
        if source in weights.sources:
            return weights.rounded(weights.sources[source].read().float().reshape(shape), name)
        closed = name == "denoiser.mask.conv_out.bias"
        return torch.full(shape, CLOSED) if closed else torch.zeros(shape)

    return read
