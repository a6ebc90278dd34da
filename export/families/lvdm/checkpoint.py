"""Released `.ckpt` files, read without running anything in them, loaded strictly, converted to safetensors.

A diffusion checkpoint holds, under `state_dict` or bare:

    model.diffusion_model.*   the UNet
    model_ema.*               its moving average: `diffusion_model` + name with every dot removed; not in text to video
    first_stage_model.*       the autoencoder, in an `ae_*.ckpt` without prefix and beside `loss.*`
    cond_stage_model.*        CLIP, text to video only
    and twelve schedule buffers, which are computed here.

The published scripts use the raw weights for short clips and the average for long videos; here the caller says which.

`python -m pyengine.export.families.lvdm.checkpoint short_sky.ckpt --configuration sky --weights ema --output sky`
"""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Mapping
from pathlib import Path
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pyengine.errors import InputError

from .autoencoder2d import AutoencoderKL
from .autoencoder3d import Autoencoder3D
from .released import configuration
from .unet import UNet

UNET, AVERAGE, AUTOENCODER, TEXT = (
    "model.diffusion_model.",
    "model_ema.",
    "first_stage_model.",
    "cond_stage_model.",
)
BUFFERS = frozenset(
    {
        "betas",
        "alphas_cumprod",
        "alphas_cumprod_prev",
        "sqrt_alphas_cumprod",
        "sqrt_one_minus_alphas_cumprod",
        "log_one_minus_alphas_cumprod",
        "sqrt_recip_alphas_cumprod",
        "sqrt_recipm1_alphas_cumprod",
        "posterior_variance",
        "posterior_log_variance_clipped",
        "posterior_mean_coef1",
        "posterior_mean_coef2",
    }
)


def load_checkpoint(path: Path) -> dict[str, Tensor]:
    """Every tensor of a .ckpt or .safetensors file by its name. Raises InputError; a pickle that is more than data is refused."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    except (OSError, RuntimeError, pickle.UnpicklingError, SafetensorError, EOFError, ValueError) as error:
        raise InputError(
            f"[checkpoint] expected a file of plain tensors but cannot read {path} ({_reason(error)}); download it again"
        ) from error
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(
            f"[checkpoint] expected tensors by name in {path} but got something else; download it again"
        )
    return state


def _reason(error: Exception) -> str:
    """In our words where PyTorch's are long, or advise to run what the file holds."""
    if isinstance(error, pickle.UnpicklingError):
        return "it holds more than tensors, and none of that was run"
    if isinstance(error, RuntimeError):
        return "it is no whole file of torch.save"
    return (str(error) or type(error).__name__).splitlines()[0]


def load_part(module: nn.Module, state: Mapping[str, Tensor], part: str, weights: str = "raw") -> None:
    """Loads `unet` or `autoencoder` of a checkpoint into its module, strictly. Raises InputError that names what differs.

    weights  "raw" or, of a UNet, "ema"
    """
    given = tensors_of(module, state, part, weights)
    own = module.state_dict()
    differing = [f"{name} {list(given[name].shape)}" for name in own if given[name].shape != own[name].shape]
    if differing:
        raise InputError(
            f"[checkpoint] expected the shapes of this configuration but got {', '.join(differing[:3])}"
        )
    module.load_state_dict(given, strict=True)


def tensors_of(module: nn.Module, state: Mapping[str, Tensor], part: str, weights: str) -> dict[str, Tensor]:
    """The module's tensors by its own names. Raises InputError for missing and for unexpected ones."""
    if part not in ("unet", "autoencoder") or weights not in ("raw", "ema"):
        raise InputError(f"[checkpoint] expected unet or autoencoder, raw or ema, but got {part}, {weights}")
    names = list(module.state_dict())
    bare = not any(key.startswith((UNET, AUTOENCODER)) for key in state)
    prefix = "" if bare else UNET if part == "unet" else AUTOENCODER
    if part == "unet" and weights == "ema":
        # The dotless names cannot be read back, but they can be made from the names we know.
        wanted = {name: AVERAGE + f"diffusion_model.{name}".replace(".", "") for name in names}
        if not any(key.startswith(AVERAGE) for key in state):
            raise InputError(
                "[checkpoint] expected averaged weights but the file has none; use --weights raw"
            )
    else:
        wanted = {name: prefix + name for name in names}
    missing = [key for key in wanted.values() if key not in state]
    if missing:
        raise InputError(
            f"[checkpoint] expected {missing[0]} and {len(missing) - 1} more but the file lacks them"
        )
    used = set(wanted.values()) | {prefix + alias for alias in aliases(module)}
    own = AVERAGE if part == "unet" and weights == "ema" else prefix
    extra = [key for key in state if key.startswith(own) and key not in used and not _ignored(key, bare)]
    if extra:
        raise InputError(
            f"[checkpoint] expected this configuration's names only but got {extra[0]} and {len(extra) - 1} more"
        )
    return {name: state[key] for name, key in wanted.items()}


def aliases(module: nn.Module) -> list[str]:
    """Second names under which the release stores a padded convolution's weight: `X.weight` beside `X.conv.weight`."""
    return [
        name.replace(".conv.weight", ".weight")
        for name in module.state_dict()
        if name.endswith(".conv.weight")
    ]


def _ignored(key: str, bare: bool) -> bool:
    if key in (f"{AVERAGE}decay", f"{AVERAGE}num_updates") or key in BUFFERS:
        return True
    return key.startswith((f"{AUTOENCODER}loss.", "loss.")) if bare or key.startswith(AUTOENCODER) else False


def convert(source: Path, name: str, weights: str, folder: Path) -> None:
    """Writes `unet.safetensors` and `autoencoder.safetensors` by the modules' own names, and `text_encoder.safetensors`."""
    config = configuration(name)
    with torch.device("meta"):
        unet = UNet(**config.unet)
        autoencoder = (AutoencoderKL if config.is_text else Autoencoder3D)(**config.autoencoder)
    state = load_checkpoint(source)
    folder.mkdir(parents=True, exist_ok=True)
    parts: list[tuple[str, nn.Module, str]] = [("unet", unet, weights), ("autoencoder", autoencoder, "raw")]
    for part, module, which in parts:
        given = tensors_of(module, state, part, which)
        save_file({key: value.contiguous() for key, value in given.items()}, folder / f"{part}.safetensors")
    text = {
        key.removeprefix(TEXT): value.contiguous() for key, value in state.items() if key.startswith(TEXT)
    }
    if text:
        save_file(text, folder / "text_encoder.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--configuration", required=True)
    parser.add_argument("--weights", choices=("raw", "ema"), required=True)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    convert(arguments.checkpoint, arguments.configuration, arguments.weights, arguments.output)


if __name__ == "__main__":
    main()
