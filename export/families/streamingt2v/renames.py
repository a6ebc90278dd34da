"""Other names of the same tensors: OpenCLIP's text tower, and the autoencoder of latent diffusion.

Each function maps the name in a file to the name here, or to None for what is not used. What is stored as one tensor and read as three
has three names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple


class Renamed(NamedTuple):
    """The name here, and which part of the stored tensor's first axis it is: (index, parts)."""

    name: str
    part: tuple[int, int] = (0, 1)


_CLIP_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_CLIP_TOP = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}


def open_clip_text(name: str, layers: int) -> Iterator[Renamed]:
    """Of the text tower, as `CLIPTextModel` names it; its first so many layers. Nothing for other tensors of the file."""
    if name in _CLIP_TOP:
        yield Renamed(_CLIP_TOP[name])
    found = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+?)(_|\.)(weight|bias)", name)
    if found is None or int(found[1]) >= layers:
        return
    base = f"encoder.layers.{found[1]}"
    if found[2] == "attn.in_proj":
        for index, which in enumerate("qkv"):
            yield Renamed(f"{base}.self_attn.{which}_proj.{found[4]}", (index, 3))
    elif found[2] in _CLIP_LAYER:
        yield Renamed(f"{base}.{_CLIP_LAYER[found[2]]}.{found[4]}")


_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def latent_diffusion_autoencoder(name: str, levels: int) -> str:
    """Of `first_stage_model`, as diffusers names it. Decoder levels count the other way there."""
    name = re.sub(r"^(encoder\.)down\.(\d+)\.", r"\1down_blocks.\2.", name)
    name = re.sub(r"^(decoder\.)up\.(\d+)\.", lambda f: f"{f[1]}up_blocks.{levels - 1 - int(f[2])}.", name)
    name = re.sub(r"\.block\.(\d+)\.", r".resnets.\1.", name).replace(".nin_shortcut.", ".conv_shortcut.")
    name = name.replace(".downsample.conv.", ".downsamplers.0.conv.").replace(
        ".upsample.conv.", ".upsamplers.0.conv."
    )
    name = re.sub(
        r"\.mid\.attn_1\.(\w+)\.",
        lambda f: f".mid_block.attentions.0.{_ATTENTION.get(f[1], f[1])}.",
        name,
    )
    name = re.sub(r"\.mid\.block_(\d)\.", lambda f: f".mid_block.resnets.{int(f[1]) - 1}.", name)
    return name.replace(".norm_out.", ".conv_norm_out.")
