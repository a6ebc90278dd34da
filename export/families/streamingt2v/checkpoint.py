"""Where each tensor of a bundle comes from: the released files and their repacks, read strictly and one tensor at a time.

    weights = Weights.released("streaming_t2v.ckpt")
    weights |= Weights.second_stage("MS-Vid2Vid-XL/")
    weights.check(root)                          # names and shapes, in one sentence where they differ
    weights.read("base_model.conv_in.weight")    # float32, straight from the file

Names are those of `Networks.parts`: a prefix and the checkpoint's own. Half of streaming_t2v.ckpt is optimizer state, which is not read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from pyengine.errors import InputError

from ...checkpoints import Source, TensorFile, open_tensors
from ...checkpoints import Weights as FileWeights
from ...checkpoints.names import early_autoencoder, text_model
from .renames import latent_diffusion_autoencoder, open_clip_text

TEXT_LAYERS, AUTOENCODER_LEVELS = 23, 4
IMAGE, TEXT, FIRST_STAGE = "image_encoder.", "text_encoder.", "first_stage_model."
# OpenCLIP's own text tower and what belongs to it: beside the image tower in the release, where nothing uses them.
UNUSED_CLIP = (
    "token_embedding.",
    "positional_embedding",
    "text_projection",
    "ln_final.",
    "logit_scale",
    "transformer.",
    "attn_mask",
)
UNET_FILE, CLIP_FILE, VAE_FILE = (
    "non_ema_0035000.pth",
    "open_clip_pytorch_model.bin",
    "v2-1_512-ema-pruned.ckpt",
)
FIRST_FILES = (
    "unet/diffusion_pytorch_model.safetensors",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.fp16.bin",
)
# Prefixes of the third-party repack of the second stage's fp16 weights, by ours.
VIDXTEND = {"unet.": "base_model.", "controlnet.": "unet."}
STREAMING_SVD = ("model.diffusion_model.", "conditioner.embedders.", "first_stage_model.")


@dataclass(frozen=True)
class Weights(FileWeights):
    """Sources by the names of `Networks.parts`."""

    def __or__(self, other: Weights) -> Weights:
        return Weights({**self.sources, **other.sources}, self.half)

    @classmethod
    def released(cls, path: str | Path) -> Weights:
        """streaming_t2v.ckpt or the VidXTend repack. Raises InputError for any other file, also for one of StreamingSVD."""
        file = open_tensors(path)
        _refuse_streaming_svd(file)
        repacked = any(name.startswith("controlnet.") for name in file.tensors)
        found = {}
        for name in file.tensors:
            prefix = name.partition(".")[0] + "."
            ours = VIDXTEND.get(prefix, prefix) if repacked else prefix
            rest = name.removeprefix(prefix)
            rest = (
                text_model(rest) if prefix == TEXT else early_autoencoder(rest) if prefix == "vae." else rest
            )
            if (prefix == IMAGE and _is_unused_clip(rest.removeprefix("model."))) or rest.endswith(
                "position_ids"
            ):
                continue
            found[ours + rest] = Source(file, name)
        return cls(found)

    @classmethod
    def image_tower(cls, path: str | Path) -> Weights:
        """The image tower of a file of OpenCLIP's ViT-H/14, which the VidXTend repack lacks. Raises InputError."""
        file = open_tensors(path)
        names = [name for name in file.tensors if name.startswith("visual.")]
        return cls({f"{IMAGE}model.{name}": Source(file, name) for name in names})

    @classmethod
    def first_stage(cls, folder: str | Path) -> Weights:
        """The UNet of a diffusers folder of damo-vilab/text-to-video-ms-1.7b. Raises InputError."""
        path = next((Path(folder) / name for name in FIRST_FILES if (Path(folder) / name).is_file()), None)
        if path is None:
            raise InputError(
                f"[checkpoint] expected {FIRST_FILES[0]} in {folder} but there is none; give the folder of "
                "damo-vilab/text-to-video-ms-1.7b"
            )
        file = open_tensors(path)
        return cls({f"first.{name}": Source(file, name) for name in file.tensors})

    @classmethod
    def second_stage(cls, folder: str | Path, layers: int = TEXT_LAYERS) -> Weights:
        """The three files of MS-Vid2Vid-XL. Raises InputError that names what the folder lacks."""
        missing = [name for name in (UNET_FILE, CLIP_FILE, VAE_FILE) if not (Path(folder) / name).is_file()]
        if missing:
            raise InputError(
                f"[checkpoint] expected the files of MS-Vid2Vid-XL in {folder} but it lacks {', '.join(missing)}; give the folder "
                "of ali-vilab/MS-Vid2Vid-XL"
            )
        unet, clip, vae = (open_tensors(Path(folder) / name) for name in (UNET_FILE, CLIP_FILE, VAE_FILE))
        found = {f"enhancer.{name}": Source(unet, name) for name in unet.tensors}
        for name in clip.tensors:
            for renamed in open_clip_text(name, layers):
                found[f"enhancer_text.{renamed.name}"] = Source(clip, name, renamed.part)
        for name in vae.tensors:
            if name.startswith(FIRST_STAGE) and not name.startswith(f"{FIRST_STAGE}loss."):
                ours = latent_diffusion_autoencoder(name.removeprefix(FIRST_STAGE), AUTOENCODER_LEVELS)
                found[f"enhancer_vae.{ours}"] = Source(vae, name)
        return cls(found)

    def check(self, parts: Mapping[str, nn.Module]) -> None:
        """Raises InputError in one sentence where the networks by prefix have tensors that are missing, unexpected or of other shapes."""
        wanted = {
            f"{prefix}.{text_model(name) if 'text' in prefix else name}": tuple(value.shape)
            for prefix, part in parts.items()
            for name, value in part.state_dict().items()
        }
        self.compare(wanted, ", ".join(parts))

    def read(self, name: str) -> Tensor:
        """One tensor as float32. Raises InputError for a file that is cut off, and for a value that fp16 does not hold."""
        prefix, _, rest = name.partition(".")
        value = self.sources[f"{prefix}.{text_model(rest) if 'text' in prefix else rest}"].read().float()
        return self.rounded(value, name)


def reader(
    weights: Weights, derived: Mapping[str, Callable[[Callable[[str], Tensor]], Tensor]], root: nn.Module
) -> Callable[[str], Tensor]:
    """Reads any parameter below `root`: of a file, in the shape that the network has it in, or derived from such."""
    shapes = {name: tuple(value.shape) for name, value in root.named_parameters()}

    def read(name: str) -> Tensor:
        if name in derived:
            return weights.rounded(derived[name](read), name)
        value = weights.read(name)
        return value.reshape(shapes[name]) if name in shapes else value

    return read


def _refuse_streaming_svd(file: TensorFile) -> None:
    if all(any(name.startswith(prefix) for name in file.tensors) for prefix in STREAMING_SVD):
        raise InputError(
            f"[checkpoint] expected StreamingT2V's streaming_t2v.ckpt but {file.path} is a checkpoint of StreamingSVD, which makes "
            "video of a picture by other networks and is not built here; download PAIR/StreamingT2V"
        )


def _is_unused_clip(name: str) -> bool:
    return name.startswith(UNUSED_CLIP)
