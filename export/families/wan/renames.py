"""Names of Wan's tensors in the files that are about, and what other systems' files look like.

The original's names are ours. Trainers wrap them (`model.`, and what FSDP, activation checkpointing and torch.compile put between),
ComfyUI puts `model.diffusion_model.` in front, and diffusers has names of its own.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.")

# diffusers' names, the longer ones first.
_TRANSFORMER = (
    ("condition_embedder.time_embedder.linear_1.", "time_embedding.0."),
    ("condition_embedder.time_embedder.linear_2.", "time_embedding.2."),
    ("condition_embedder.time_proj.", "time_projection.1."),
    ("condition_embedder.text_embedder.linear_1.", "text_embedding.0."),
    ("condition_embedder.text_embedder.linear_2.", "text_embedding.2."),
    ("proj_out.", "head.head."),
)
_BLOCK = (
    ("scale_shift_table", "modulation"),
    ("attn1.", "self_attn."),
    ("attn2.", "cross_attn."),
    ("norm2.", "norm3."),
    ("ffn.net.0.proj.", "ffn.0."),
    ("ffn.net.2.", "ffn.2."),
)
_ATTENTION = (("to_q.", "q."), ("to_k.", "k."), ("to_v.", "v."), ("to_out.0.", "o."))
_AUTOENCODER = (
    ("quant_conv.", "conv1."),
    ("post_quant_conv.", "conv2."),
)
_CODER = (
    ("conv_in.", "conv1."),
    ("conv_out.", "head.2."),
    ("norm_out.", "head.0."),
    ("mid_block.resnets.0.", "middle.0."),
    ("mid_block.resnets.1.", "middle.2."),
    ("mid_block.attentions.0.", "middle.1."),
)
_RESIDUAL = (
    ("norm1.", "residual.0."),
    ("conv1.", "residual.2."),
    ("norm2.", "residual.3."),
    ("conv2.", "residual.6."),
    ("conv_shortcut.", "shortcut."),
)
_UMT5 = (
    ("norm1.", "layer.0.layer_norm."),
    ("attn.", "layer.0.SelfAttention."),
    ("pos_embedding.embedding.", "layer.0.SelfAttention.relative_attention_bias."),
    ("norm2.", "layer.1.layer_norm."),
    ("ffn.gate.0.", "layer.1.DenseReluDense.wi_0."),
    ("ffn.fc1.", "layer.1.DenseReluDense.wi_1."),
    ("ffn.fc2.", "layer.1.DenseReluDense.wo."),
)

_LORA = "a LoRA, which is no checkpoint of its own: give it as --lora beside its base"
# What a file of another kind has, by the first prefix that fits; `what` it is.
_OTHERS = (
    (("vace_blocks.", "vace_patch_embedding."), "Wan-VACE, which edits videos by control blocks"),
    (
        ("img_emb.", "condition_embedder.image_embedder."),
        "Wan's image-to-video model, which reads CLIP features of a picture",
    ),
    (("control_adapter.", "audio_proj."), "a control or speech variant of Wan"),
    (
        ("encoder.downsamples.", "decoder.upsamples.", "decoder.up_blocks."),
        "an autoencoder: give it as --vae",
    ),
    (("encoder.block.", "shared.", "token_embedding."), "a T5 text encoder: give it as --text-encoder"),
    (("double_blocks.", "single_blocks."), "a HunyuanVideo or FLUX model"),
    (("spatial_blocks.", "temporal_blocks."), "Open-Sora's STDiT: use `pyengine export opensora`"),
    (
        ("base_model.", "conditioner.", "input_blocks.", "output_blocks."),
        "a UNet: use `pyengine export lvdm` or `streamingt2v`",
    ),
    (
        ("transformer_blocks.", "adaln_single."),
        "a diffusers transformer of another family (CogVideoX, LTX-Video and the like)",
    ),
    (("layers.", "videodit_blocks."), "another video model, such as MAGI"),
)


def plain(name: str) -> str:
    """Without what trainers and ComfyUI put around a name."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return next((name.removeprefix(prefix) for prefix in PREFIXES if name.startswith(prefix)), name)


def transformer(name: str) -> str:
    """The original's name of a tensor of the transformer."""
    name = plain(name)
    name = _swapped(name, _TRANSFORMER)
    if name == "scale_shift_table":
        return "head.modulation"
    found = re.match(r"(blocks\.\d+\.)(.+)", name)
    if found is None or not re.match(r"attn[12]\.|norm2\.|ffn\.net\.|scale_shift_table", found[2]):
        return name
    inner = _swapped(found[2], _BLOCK)
    kind = re.match(r"(self_attn|cross_attn)\.(.+)", inner)
    return found[1] + (f"{kind[1]}.{_swapped(kind[2], _ATTENTION)}" if kind else inner)


def autoencoder(name: str) -> str:
    """The original's name of a tensor of the autoencoder."""
    found = re.match(r"(encoder|decoder)\.(.+)", name)
    if found is None:
        return _swapped(name, _AUTOENCODER)
    side, inner = found[1], _swapped(found[2], _CODER)
    place = re.match(r"(down_blocks|up_blocks)\.(\d+)\.(?:(resnets|upsamplers)\.(\d+)\.)?(.+)", inner)
    if place is not None:
        level, which = int(place[2]), place[3]
        if place[1] == "down_blocks":
            inner = f"downsamples.{level}.{place[5]}"
        else:
            inner = f"upsamples.{4 * level + (3 if which == 'upsamplers' else int(place[4] or 0))}.{place[5]}"
    part = re.match(r"((?:downsamples|upsamples|middle)\.\d+\.)(.+)", inner)
    return f"{side}.{part[1]}{_swapped(part[2], _RESIDUAL)}" if part else f"{side}.{inner}"


def umt5(name: str) -> str:
    """transformers' name of a tensor of the text encoder that has the original's."""
    if name == "token_embedding.weight":
        return "shared.weight"
    if name == "norm.weight":
        return "encoder.final_layer_norm.weight"
    found = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    return name if found is None else f"encoder.block.{found[1]}.{_swapped(found[2], _UMT5)}"


def other_kind(names: Collection[str], shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """What a file that is not a causal Wan transformer holds, as far as its names tell. `names` as in the file."""
    stripped = [plain(name) for name in names]
    if any(re.search(r"\.lora_(A|B|down|up)\.", name) for name in stripped):
        return _LORA
    for prefixes, what in _OTHERS:
        if any(name.startswith(prefixes) for name in (*stripped, *names)):
            return what
    patch = shapes.get("patch_embedding.weight")
    if patch is not None and len(patch) == 5 and patch[1] == 48:
        return "Wan 2.2's 5B (LongLive 2.0 is made of it), whose autoencoder is not built here"
    if patch is not None and len(patch) == 5 and patch[1] != 16:
        return f"a Wan model that reads {patch[1]} channels, such as image-to-video"
    return None


def _swapped(name: str, pairs: Collection[tuple[str, str]]) -> str:
    return next((ours + name.removeprefix(theirs) for theirs, ours in pairs if name.startswith(theirs)), name)
