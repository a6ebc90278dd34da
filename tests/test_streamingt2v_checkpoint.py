"""The released files and their repacks: strict, safe, and one tensor at a time. Layout and names by specification, tiny sizes."""

from __future__ import annotations

import copy
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from streamingt2v_family import CONFIG, SIZES, networks
from torch import Tensor, nn

from pyengine.cli import main
from pyengine.errors import ConfigError, InputError
from pyengine.export.families.lvdm.autoencoder2d import AutoencoderKL
from pyengine.export.families.streamingt2v.assembly import Networks, Tower, assemble
from pyengine.export.families.streamingt2v.cached import derivations, fill
from pyengine.export.families.streamingt2v.checkpoint import (
    CLIP_FILE,
    UNET_FILE,
    VAE_FILE,
    Weights,
    reader,
)
from pyengine.export.families.streamingt2v.export import Files, empty_networks, export_bundle
from pyengine.export.families.streamingt2v.renames import latent_diffusion_autoencoder
from pyengine.export.layers.frame_autoencoder import FrameAutoencoder
from pyengine.export.parity import parity

transformers = pytest.importorskip("transformers")
TEXT: dict[str, Any] = {
    "vocab_size": 6, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 77, "hidden_act": "gelu",
}  # fmt: skip
NULL = torch.tensor([0, 1, *[2] * 75])
# By the specification, of the published image tower file and of what the release carries beside it.
LEFTOVERS = {
    "token_embedding.weight": (6, 32), "positional_embedding": (77, 32), "text_projection": (32, 32),
    "ln_final.weight": (32,), "ln_final.bias": (32,), "logit_scale": (),
}  # fmt: skip


@cache
def tower() -> nn.Module:
    torch.manual_seed(9)
    return transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT)).eval()


def tower_state() -> dict[str, Tensor]:
    return {name.removeprefix("text_model."): value for name, value in tower().state_dict().items()}


@cache
def released() -> dict[str, Tensor]:
    """What streaming_t2v.ckpt has under `state_dict`."""
    found = {}
    parts = networks().parts()
    for prefix in ("base_model", "unet", "resampler", "image_encoder", "vae"):
        found |= {f"{prefix}.{name}": value for name, value in parts[prefix].state_dict().items()}
    found |= {f"text_encoder.text_model.{name}": value for name, value in tower_state().items()}
    return found | {f"image_encoder.model.{name}": torch.zeros(shape) for name, shape in LEFTOVERS.items()}


def save(path: Path, state: dict[str, Tensor]) -> Path:
    moments = {index: {"step": 3, "exp_avg": torch.ones(50)} for index in range(4)}
    torch.save({"state_dict": state, "optimizer_states": [{"state": moments}], "global_step": 7}, path)
    return path


def open_clip() -> dict[str, Tensor]:
    """open_clip_pytorch_model.bin: both towers, the text's with a layer more than is used."""
    found = {
        name: value.clone()
        for name, value in released().items()
        if name.startswith("image_encoder.model.visual.")
    }
    found = {name.removeprefix("image_encoder.model."): value for name, value in found.items()}
    state = tower_state()
    found |= {
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "ln_final.weight": state["final_layer_norm.weight"],
        "ln_final.bias": state["final_layer_norm.bias"],
        "text_projection": torch.zeros(32, 32),
        "logit_scale": torch.tensor(4.6),
    }
    for layer in range(TEXT["num_hidden_layers"] + 1):
        ours = f"encoder.layers.{min(layer, TEXT['num_hidden_layers'] - 1)}"
        theirs = f"transformer.resblocks.{layer}"
        for kind in ("weight", "bias"):
            q, k, v = (state[f"{ours}.self_attn.{which}_proj.{kind}"] for which in "qkv")
            found[f"{theirs}.attn.in_proj_{kind}"] = torch.cat([q, k, v])
            for name, renamed in {
                "attn.out_proj": "self_attn.out_proj", "ln_1": "layer_norm1", "ln_2": "layer_norm2",
                "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
            }.items():  # fmt: skip
                found[f"{theirs}.{name}.{kind}"] = state[f"{ours}.{renamed}.{kind}"]
    return found


def first_stage_names() -> dict[str, str]:
    """Names in latent diffusion of the tiny autoencoder's tensors, from the module that has them."""
    with torch.device("meta"):
        theirs = AutoencoderKL(ch=32, ch_mult=[1, 1, 1, 1], num_res_blocks=1)
    return {name: latent_diffusion_autoencoder(name, 4) for name in theirs.state_dict()}


def enhancer_folder(folder: Path) -> Path:
    folder.mkdir()
    parts = networks().parts()
    torch.save(dict(parts["enhancer"].state_dict()), folder / UNET_FILE)
    torch.save(open_clip(), folder / CLIP_FILE)
    ours = parts["enhancer_vae"].state_dict()
    state = {
        f"first_stage_model.{theirs}": ours[name][..., None, None]
        if ".attn_1." in theirs and ours[name].ndim == 2
        else ours[name]
        for theirs, name in first_stage_names().items()
    }
    torch.save(
        {"state_dict": state | {"model.diffusion_model.x": torch.zeros(2), "betas": torch.zeros(3)}},
        folder / VAE_FILE,
    )
    return folder


def first_folder(folder: Path) -> Path:
    (folder / "unet").mkdir(parents=True)
    state = networks().parts()["first"].state_dict()
    save_file(
        {name: value.contiguous() for name, value in state.items()},
        folder / "unet/diffusion_pytorch_model.safetensors",
    )
    return folder


def empty(files: Files) -> Networks:
    return empty_networks(files, NULL, CONFIG, TEXT)


def check(files: Files) -> Weights:
    weights = files.weights(half=False, layers=TEXT["num_hidden_layers"])
    weights.check(empty(files).parts())
    return weights


@pytest.fixture(scope="module")
def all_files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("files")
    return Files(
        save(folder / "streaming_t2v.ckpt", released()),
        enhancer_folder(folder / "enhancer"),
        first_folder(folder / "first"),
    )


def test_every_network_is_filled_from_the_released_files(all_files: Files) -> None:
    weights = check(all_files)
    wanted = {
        f"{prefix}.{name}": value
        for prefix, part in networks().parts().items()
        for name, value in part.state_dict().items()
    }
    for prefix in ("text_encoder", "enhancer_text"):
        wanted |= {f"{prefix}.{name}": value for name, value in tower_state().items()}
    assert set(weights.sources) == set(wanted)
    for name, value in wanted.items():
        got = weights.read(name)
        assert got.dtype == torch.float32
        assert torch.equal(got.reshape(value.shape), value), name


def test_tables_and_products_are_derived_from_the_file(all_files: Files) -> None:
    weights = check(all_files)
    root, _ = assemble(empty(all_files), SIZES)
    read = reader(weights, derivations(root), root)
    own = copy.deepcopy(networks())
    filled, _ = assemble(own, SIZES)
    fill(filled)
    for name in derivations(root):
        torch.testing.assert_close(read(name), filled.get_parameter(name), rtol=1e-5, atol=1e-6)


def test_values_are_rounded_to_fp16_where_they_are_stored_so(all_files: Files) -> None:
    weights = all_files.weights(half=True, layers=2)
    name = "base_model.conv_in.weight"
    assert torch.equal(weights.read(name), released()[name].half().float())
    root, _ = assemble(empty(all_files), SIZES)
    rows = reader(weights, derivations(root), root)("component_denoiser.table.rows")
    assert torch.equal(rows, rows.half().float())


def test_the_repack_is_read_with_an_image_tower_from_elsewhere(all_files: Files, tmp_path: Path) -> None:
    back = {"base_model.": "unet.", "unet.": "controlnet."}
    state = {}
    for name, value in released().items():
        prefix = name.partition(".")[0] + "."
        if prefix != "image_encoder.":
            state[back.get(prefix, prefix) + name.removeprefix(prefix)] = value.half().contiguous().clone()
    path = tmp_path / "vidxtend.fp16.safetensors"
    save_file(state, path)
    with pytest.raises(ConfigError, match="expected --image-encoder or --enhancer"):
        Files(path).weights(half=True)
    tower_file = tmp_path / "clip.bin"
    torch.save(open_clip(), tower_file)
    weights = check(Files(path, image_encoder=tower_file))
    for name in ("base_model.conv_in.weight", "unet.conv_in.weight"):
        assert torch.equal(weights.read(name), released()[name].half().float())
    assert "image_encoder.model.visual.proj" in check(Files(path, all_files.enhancer)).sources


def test_older_names_of_the_same_tensors_are_known(tmp_path: Path) -> None:
    state = dict(released())
    early = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for name in [n for n in state if n.startswith("vae.") and ".attentions.0." in n]:
        renamed = re.sub(r"(to_q|to_k|to_v|to_out\.0)", lambda found: early[found[0]], name)
        state[renamed] = state.pop(name)
    state["text_encoder.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    check(Files(save(tmp_path / "a.ckpt", state)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"unet.conv_in.bias": None}, r"lacks unet\.conv_in\.bias"),
        ({"base_model.more": torch.zeros(2)}, r"has the unexpected base_model\.more"),
        (
            {"unet.conv_in.bias": torch.zeros(3)},
            r"another shape for unet\.conv_in\.bias \(expected \[64\] but got \[3\]\)",
        ),
        (
            dict.fromkeys(("resampler.context_embedding.0.bias", "unet.conv_in.bias")),
            r"lacks resampler.*, unet\.conv_in\.bias",
        ),
    ],
)
def test_what_differs_is_named_in_one_sentence(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    state = {name: value for name, value in (released() | change).items() if value is not None}
    with pytest.raises(InputError, match=said) as error:
        check(Files(save(tmp_path / "a.ckpt", state)))
    assert "\n" not in str(error.value)


def test_a_checkpoint_of_streaming_svd_is_refused_by_name(tmp_path: Path) -> None:
    """Names by section 11 of the specification."""
    names = (
        "model.diffusion_model.input_blocks.0.0.weight", "controlnet.input_blocks.0.0.weight",
        "conditioner.embedders.0.open_clip.model.visual.proj", "conditioner.embedders.3.encoder.conv_in.weight",
        "first_stage_model.encoder.conv_in.weight",
    )  # fmt: skip
    path = tmp_path / "model.safetensors"
    save_file({name: torch.zeros(2) for name in names}, path)
    with pytest.raises(InputError, match="is a checkpoint of StreamingSVD"):
        Files(path).weights(half=True)


def test_a_file_that_is_cut_off_names_the_tensor(tmp_path: Path) -> None:
    path = save(tmp_path / "a.ckpt", released())
    weights = Weights.released(path)
    place = weights.sources["unet.conv_in.weight"].file.tensors["unet.conv_in.weight"]
    with path.open("r+b") as file:
        file.truncate(place.start + 8)
    with pytest.raises(InputError, match=r"bytes of unet\.conv_in\.weight in .* ends after 8 of them"):
        Files(path).weights(half=True)


def test_a_value_that_fp16_does_not_hold_is_refused(tmp_path: Path) -> None:
    state = released() | {"unet.conv_in.bias": torch.full((64,), 1e6)}
    weights = Files(save(tmp_path / "a.ckpt", state)).weights(half=True)
    with pytest.raises(InputError, match=r"unet\.conv_in\.bias has others; use --weights fp32"):
        weights.read("unet.conv_in.bias")


def test_folders_that_lack_a_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / CLIP_FILE).touch()
    with pytest.raises(InputError, match=f"lacks {UNET_FILE}, {VAE_FILE}"):
        Weights.second_stage(tmp_path)
    with pytest.raises(InputError, match="give the folder of damo-vilab"):
        Weights.first_stage(tmp_path)


@torch.no_grad()
def test_an_autoencoder_of_latent_diffusion_is_the_same_under_its_names_here() -> None:
    torch.manual_seed(1)
    theirs = AutoencoderKL(ch=32, ch_mult=[1, 2, 2, 2], num_res_blocks=1).eval()
    ours = FrameAutoencoder(block_out_channels=(32, 64, 64, 64), layers_per_block=1).eval()
    own = ours.state_dict()
    state = {latent_diffusion_autoencoder(name, 4): value for name, value in theirs.state_dict().items()}
    assert set(state) == set(own)
    ours.load_state_dict({name: value.reshape(own[name].shape) for name, value in state.items()})
    z, frames = torch.randn(1, 4, 3, 2), torch.randn(1, 3, 16, 24)
    torch.testing.assert_close(ours.decode(z), theirs.decode(z))
    torch.testing.assert_close(ours.moments(frames).chunk(2, 1)[0], theirs.encode(frames)[0])


def test_the_command_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = [
        "export",
        "streamingt2v",
        "--checkpoint",
        str(tmp_path / "none.ckpt"),
        "--output",
        str(tmp_path / "b"),
    ]
    for more, said in {
        (): "expected --tokenizer or --first",
        ("--tokenizer", str(tmp_path)): "expected CLIP's tokenizer",
        ("--size", "250x256", "--tokenizer", str(tmp_path)): "expected CLIP's tokenizer",
    }.items():
        assert main([*base, *more]) != 0
        assert said in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


@pytest.mark.slow
@torch.no_grad()
def test_components_from_files_are_those_from_memory(
    all_files: Files, tmp_path: Path, plan_cache: Path
) -> None:
    """Exported from weights on disk, run as portable ONNX and as a plan, against the modules in memory."""
    names = (
        "text_encoder",
        "enhancer_text_encoder",
        "appearance",
        "condition",
        "decoder",
        "enhancer_decoder",
    )
    bundle = export_bundle(
        all_files,
        tmp_path / "bundle",
        "{}",
        NULL,
        sizes=SIZES,
        half=False,
        config=CONFIG,
        text=TEXT,
        only=names,
    )
    own = copy.deepcopy(networks())
    own = Networks(**{**vars(own), "text": Tower(tower(), NULL), "enhancer_text": Tower(tower(), NULL)})
    root, parts = assemble(own, SIZES)
    fill(root)
    modules = {name: (parts[name].module, parts[name].inputs) for name in names}
    parity(bundle, modules, precisions=("fp32",), cache_dir=plan_cache).check()
