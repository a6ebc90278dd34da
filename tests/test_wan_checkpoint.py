"""Wan's released files and what is like them: strict, safe, one tensor at a time. Real names and layouts, tiny sizes."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from wan_golden import autoencoder, full_keys, manifest, text_encoder, transformer

from pyengine.errors import ConfigError, InputError
from pyengine.export.families.wan import CausalWan, TextEncoder, VideoAutoencoder, renames
from pyengine.export.families.wan.checkpoint import (
    Weights,
    autoencoder_weights,
    text_encoder_weights,
    transformer_weights,
)
from pyengine.export.families.wan.text_folder import ORIGINAL, text_source

HINT = "check the release"
WRAP = "_fsdp_wrapped_module."


@cache
def dit_state() -> dict[str, Tensor]:
    return {name: value.clone() for name, value in transformer().state_dict().items()}


def trained(state: dict[str, Tensor], wrapper: str = "") -> dict[str, Tensor]:
    """As a trainer's wrapper names them; the wrapper of FSDP around every block."""
    return {
        "model." + (name.replace(".", f".{wrapper}", 1) if name.startswith("blocks.") else name): value
        for name, value in state.items()
    }


def save(folder: Path, name: str, value: Any, *, sizes: bool = True) -> Path:
    torch.save(value, folder / name)
    if sizes:
        config = manifest()["dit"]["config"]
        (folder / "config.json").write_text(
            json.dumps({"num_heads": config["num_heads"], "text_len": config["text_len"]})
        )
    return folder / name


def assert_same(weights: Weights, state: dict[str, Tensor]) -> None:
    with torch.device("meta"):
        module = CausalWan(**weights.config)
    assert module.config == transformer().config
    weights.tensors.check(module, HINT)
    for name, value in weights.tensors.load(module).state_dict().items():
        assert torch.equal(value, state[name])


def diffusers_transformer(name: str) -> str:
    """The table of the specification, from the original's names to diffusers'."""
    pairs = [
        ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
        ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
        ("time_projection.1", "condition_embedder.time_proj"),
        ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
        ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
        ("head.modulation", "scale_shift_table"),
        ("head.head", "proj_out"),
        ("self_attn.o", "attn1.to_out.0"),
        ("cross_attn.o", "attn2.to_out.0"),
        *[
            (f"{ours}.{part}.", f"{theirs}.to_{part}.")
            for ours, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2"))
            for part in "qkv"
        ],
        ("self_attn", "attn1"),
        ("cross_attn", "attn2"),
        ("norm3", "norm2"),
        ("ffn.0", "ffn.net.0.proj"),
        ("ffn.2", "ffn.net.2"),
        ("modulation", "scale_shift_table"),
    ]
    for ours, theirs in pairs:
        name = name.replace(ours, theirs)
    return name


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(lambda s: {"generator_ema": trained(s)}, id="self_forcing_dmd"),
        pytest.param(lambda s: {"generator": trained(s)}, id="causvid"),
        pytest.param(
            lambda s: {
                "generator": trained(dict.fromkeys(s, torch.zeros(1))),
                "generator_ema": trained(s, WRAP),
                "critic": {},
                "step": 7,
            },
            id="rolling_forcing_dmd",
        ),
        pytest.param(lambda s: {"generator": trained(s, "_checkpoint_wrapped_module.")}, id="longlive_base"),
        pytest.param(lambda s: {"model": trained(s, "_orig_mod.")}, id="ode_init"),
        pytest.param(lambda s: s, id="plain"),
        pytest.param(
            lambda s: {f"model.diffusion_model.{name}": value for name, value in s.items()}, id="comfyui"
        ),
        pytest.param(
            lambda s: {diffusers_transformer(name): value for name, value in s.items()}, id="diffusers"
        ),
    ],
)
def test_every_layout_of_the_transformer(tmp_path: Path, content: Callable[[dict[str, Tensor]], Any]) -> None:
    assert_same(transformer_weights(save(tmp_path, "model.pt", content(dit_state()))), dit_state())


def test_raw_weights_beside_the_average(tmp_path: Path) -> None:
    other = {name: value + 1 for name, value in dit_state().items()}
    path = save(tmp_path, "model.pt", {"generator": trained(other), "generator_ema": trained(dit_state())})
    assert_same(transformer_weights(path), dit_state())
    assert_same(transformer_weights(path, averaged=False), other)


def test_a_folder_of_numbered_parts(tmp_path: Path) -> None:
    state = dit_state()
    names = sorted(state)
    parts = {"a-00001-of-00002.safetensors": names[::2], "a-00002-of-00002.safetensors": names[1::2]}
    for part, held in parts.items():
        save_file({name: state[name].bfloat16() for name in held}, tmp_path / part)
    index = {"weight_map": {name: part for part, held in parts.items() for name in held}}
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    save(tmp_path, "other.pt", {})  # writes config.json
    rounded = {name: value.bfloat16().float() for name, value in state.items()}
    assert_same(transformer_weights(tmp_path), rounded)
    index["weight_map"]["head.head.bias"] = "../elsewhere.safetensors"
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="no files beside it"):
        transformer_weights(tmp_path)


def sparse(path: Path, shapes: dict[str, list[int]], width: int = 4, dtype: str = "F32") -> Path:
    """A safetensors file of full size that takes no room: a header, and a hole."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + width * int(torch.Size(shape).numel())
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    head = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        file.truncate(8 + len(head) + end)
    return path


@pytest.mark.parametrize(
    ("key", "sizes"),
    [("dit_1.3B", (1536, 8960, 12, 30)), ("dit_14B", (5120, 13824, 40, 40))],
)
def test_released_sizes_are_read_off_the_shapes(tmp_path: Path, key: str, sizes: tuple[int, ...]) -> None:
    weights = transformer_weights(sparse(tmp_path / "diffusion_pytorch_model.safetensors", full_keys()[key]))
    config = weights.config
    assert tuple(config[name] for name in ("dim", "ffn_dim", "num_heads", "num_layers")) == sizes
    with torch.device("meta"):
        weights.tensors.check(CausalWan(**config), HINT)
    assert not weights.tensors.read("head.head.bias").any()


def test_released_autoencoder_and_text_encoder(tmp_path: Path) -> None:
    vae = autoencoder_weights(sparse(tmp_path / "vae.safetensors", full_keys()["vae"]))
    text = text_encoder_weights(
        sparse(tmp_path / "t5.safetensors", full_keys()["umt5_xxl_encoder"], 2, "BF16")
    )
    with torch.device("meta"):
        vae.tensors.check(VideoAutoencoder(**vae.config), HINT)
        text.tensors.check(TextEncoder(**text.config), HINT)
    assert (vae.config["dim"], text.config["encoder_layers"], text.config["num_heads"]) == (96, 24, 64)


def lora_state(rank: int = 4, prefix: str = "base_model.model.", adapter: str = "") -> dict[str, Tensor]:
    """A peft file as LongLive's: every linear layer of the blocks."""
    random = torch.Generator().manual_seed(3)
    found = {}
    for name, value in dit_state().items():
        if name.startswith("blocks.") and value.ndim == 2:
            path = prefix + name.removesuffix(".weight")
            found[f"{path}.lora_A{adapter}.weight"] = torch.randn(rank, value.shape[1], generator=random)
            found[f"{path}.lora_B{adapter}.weight"] = torch.randn(value.shape[0], rank, generator=random)
    return found


@pytest.mark.parametrize(
    ("wrap", "prefix", "adapter"),
    [
        (lambda state: {"generator_lora": state}, "base_model.model.", ""),
        (lambda state: state, "base_model.model.model.", ".default"),
    ],
)
def test_lora_is_merged(
    tmp_path: Path, wrap: Callable[[dict[str, Tensor]], Any], prefix: str, adapter: str
) -> None:
    base = save(tmp_path, "longlive_base.pt", {"generator": trained(dit_state())})
    update = lora_state(prefix=prefix, adapter=adapter)
    weights = transformer_weights(base, save(tmp_path, "lora.pt", wrap(update)))
    name = "blocks.1.cross_attn.o"
    up, down = (update[f"{prefix}{name}.lora_{half}{adapter}.weight"] for half in "BA")
    want = dit_state()[f"{name}.weight"] + up @ down
    assert torch.equal(weights.tensors.read(f"{name}.weight"), want)
    assert torch.equal(weights.tensors.read("head.head.bias"), dit_state()["head.head.bias"])
    with torch.device("meta"):
        weights.tensors.check(CausalWan(**weights.config), HINT)


def test_a_lora_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    base = save(tmp_path, "base.pt", {"generator": trained(dit_state())})
    update = lora_state()
    first = "base_model.model.blocks.0.ffn.0"
    cases = {
        "for a matrix of": {f"{first}.lora_A.weight": update[f"{first}.lora_A.weight"]},
        r"expected an update of \[112, 64\]": {
            f"{first}.lora_A.weight": torch.zeros(4, 64),
            f"{first}.lora_B.weight": torch.zeros(64, 4),
        },
        "but got blocks.0.ffn.0.bias": {"blocks.0.ffn.0.bias": torch.zeros(3)},
    }
    for message, state in cases.items():
        with pytest.raises(InputError, match=message):
            transformer_weights(base, save(tmp_path, "lora.pt", state))


@pytest.mark.parametrize(
    ("names", "what"),
    [
        ({"patch_embedding.weight": (64, 16, 1, 2, 2), "vace_blocks.0.q": (1,)}, "Wan-VACE"),
        ({"patch_embedding.weight": (64, 36, 1, 2, 2), "img_emb.proj.0.weight": (1,)}, "image-to-video"),
        ({"patch_embedding.weight": (64, 36, 1, 2, 2)}, "reads 36 channels"),
        ({"patch_embedding.weight": (64, 48, 1, 2, 2)}, "Wan 2.2's 5B"),
        ({"base_model.model.blocks.0.self_attn.q.lora_A.weight": (4, 4)}, "a LoRA.*--lora"),
        ({"decoder.upsamples.0.residual.0.gamma": (4, 1, 1, 1)}, "an autoencoder: give it as --vae"),
        ({"token_embedding.weight": (4, 4)}, "--text-encoder"),
        ({"spatial_blocks.0.attn.qkv.weight": (4, 4)}, "export opensora"),
        ({"double_blocks.0.img_mod.lin.weight": (4, 4)}, "HunyuanVideo"),
        ({"base_model.conv_in.weight": (4, 4)}, "export lvdm` or `streamingt2v"),
        ({"transformer_blocks.0.attn1.to_q.weight": (4, 4)}, "another family"),
        ({"wte.weight": (4, 4)}, r"something else \(it begins with wte.weight\)"),
    ],
)
def test_files_of_other_systems_are_named(
    tmp_path: Path, names: dict[str, tuple[int, ...]], what: str
) -> None:
    path = save(tmp_path, "model.pt", {name: torch.zeros(shape) for name, shape in names.items()})
    with pytest.raises(InputError, match=what):
        transformer_weights(path)


def test_what_is_no_file_of_that_kind_is_refused(tmp_path: Path) -> None:
    dit = save(tmp_path, "dit.pt", dit_state())
    with pytest.raises(InputError, match=r"expected Wan 2\.1's autoencoder"):
        autoencoder_weights(dit)
    with pytest.raises(InputError, match="expected Wan's models_t5"):
        text_encoder_weights(dit)
    with pytest.raises(InputError, match="there is none; give the file itself"):
        transformer_weights(tmp_path / ".." / tmp_path.name)
    patched = {
        "encoder.conv1.weight": torch.zeros(4, 12, 3, 3, 3),
        "conv2.weight": torch.zeros(48, 48, 1, 1, 1),
    }
    with pytest.raises(InputError, match=r"the autoencoder of Wan 2\.2"):
        autoencoder_weights(save(tmp_path, "vae.pth", patched))
    latents = {"encoder.conv1.weight": torch.zeros(4, 3, 3, 3, 3), "conv2.weight": torch.zeros(8, 8, 1, 1, 1)}
    with pytest.raises(InputError, match="latents of 16 channels"):
        autoencoder_weights(save(tmp_path, "vae.pth", latents, sizes=False))


def test_a_checkpoint_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    state = dict(dit_state())
    state["blocks.1.extra"] = state.pop("blocks.0.norm3.weight")
    state["head.head.bias"] = torch.zeros(3)
    weights = transformer_weights(save(tmp_path, "model.pt", state))
    with torch.device("meta"):
        module = CausalWan(**weights.config)
    message = r"lacks blocks.0.norm3.weight and has the unexpected blocks.1.extra and has another shape for head.head.bias"
    with pytest.raises(InputError, match=message):
        weights.tensors.check(module, HINT)
    del state["time_embedding.0.weight"]
    with pytest.raises(InputError, match=r"lacks time_embedding\.0\.weight"):
        transformer_weights(save(tmp_path, "model.pt", state))
    with pytest.raises(InputError, match=r"once in .* but it is there twice"):
        transformer_weights(save(tmp_path, "model.pt", dit_state() | trained(dit_state())))
    (tmp_path / "config.json").unlink()
    with pytest.raises(ConfigError, match="whole heads of 128"):
        transformer_weights(save(tmp_path, "model.pt", dit_state(), sizes=False))
    data = save(tmp_path, "model.pt", dit_state()).read_bytes()
    (tmp_path / "model.pt").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match="the file ends after"):
        transformer_weights(tmp_path / "model.pt")


def test_autoencoder_of_the_original_file(tmp_path: Path) -> None:
    state = {name: value.clone() for name, value in autoencoder().state_dict().items()}
    weights = autoencoder_weights(save(tmp_path, "Wan2.1_VAE.pth", state, sizes=False).parent)
    with torch.device("meta"):
        module = VideoAutoencoder(**weights.config)
    weights.tensors.check(module, HINT)
    assert {key: weights.config[key] for key in ("dim", "mean")} == {
        key: manifest()["vae"]["config"][key] for key in ("dim", "mean")
    }
    assert all(torch.equal(weights.tensors.read(name), value) for name, value in state.items())


@pytest.mark.slow  # imports diffusers
def test_diffusers_folders_give_the_same_networks(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    theirs = diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        text_dim=24,
        freq_dim=32,
        ffn_dim=48,
        num_layers=2,
        rope_max_seq_len=32,
    ).eval()
    theirs.save_pretrained(tmp_path / "transformer")
    weights = transformer_weights(tmp_path)
    ours = CausalWan(**weights.config)
    weights.tensors.check(ours, HINT)
    weights.tensors.load(ours)
    x, context = torch.randn(1, 16, 3, 4, 6), torch.randn(1, 512, 24)
    with torch.no_grad():
        want = theirs(x, torch.tensor([625.0]), context).sample
        got = ours(x, torch.full((1, 3), 625.0), context, [3])
    assert float((got - want).abs().max()) < 2e-5
    theirs = diffusers.AutoencoderKLWan(base_dim=16, z_dim=16).eval()
    theirs.save_pretrained(tmp_path / "vae")
    weights = autoencoder_weights(tmp_path)
    vae = weights.tensors.load(VideoAutoencoder(**weights.config))
    z = torch.randn(1, 16, 2, 2, 3)
    mean, std = (torch.tensor(weights.config[key])[:, None, None, None] for key in ("mean", "std"))
    with torch.no_grad():
        want = theirs.decode(z * std + mean).sample
        assert float((vae.decode(z).clamp(-1, 1) - want).abs().max()) < 2e-5


@pytest.mark.slow  # imports diffusers and transformers
def test_names_of_diffusers_and_transformers_at_full_size() -> None:
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    config = transformers.UMT5Config(
        vocab_size=256384,
        d_model=4096,
        d_kv=64,
        d_ff=10240,
        num_heads=64,
        num_layers=24,
        feed_forward_proj="gated-gelu",
    )
    with torch.device("meta"):
        parts = {
            "dit_14B": (diffusers.WanTransformer3DModel(), renames.transformer),
            "vae": (diffusers.AutoencoderKLWan(), renames.autoencoder),
        }
        text = transformers.UMT5EncoderModel(config)
    for key, (module, rename) in parts.items():
        got = {rename(name): list(value.shape) for name, value in module.state_dict().items()}
        assert got == full_keys()[key]
    got = {renames.umt5(name): shape for name, shape in full_keys()["umt5_xxl_encoder"].items()}
    theirs = {name: list(value.shape) for name, value in text.state_dict().items()}
    theirs.pop("encoder.embed_tokens.weight", None)
    assert got == theirs


@pytest.mark.slow  # imports transformers
def test_the_original_text_encoder_becomes_a_folder_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    state = {name: value.bfloat16() for name, value in text_encoder().state_dict().items()}
    given = tmp_path / "Wan2.1-T2V-1.3B"
    (given / "google" / "umt5-xxl").mkdir(parents=True)
    save(given, ORIGINAL, state, sizes=False)
    with pytest.raises(InputError, match="expected UMT5's tokenizer"):
        text_source(str(given), tmp_path / "bundle")
    (given / "google" / "umt5-xxl" / "spiece.model").write_bytes(b"pieces")
    folder = Path(text_source(str(given), tmp_path / "bundle"))
    assert (folder / "spiece.model").read_bytes() == b"pieces"
    ours = TextEncoder(**manifest()["umt5"]["config"])
    ours.load_state_dict({name: value.float() for name, value in state.items()})
    theirs = transformers.UMT5EncoderModel.from_pretrained(folder, dtype=torch.float32).eval()
    ids, mask = torch.arange(40)[None], (torch.arange(40) < 30).long()[None]
    with torch.no_grad():
        want = theirs(input_ids=ids, attention_mask=mask).last_hidden_state * mask[..., None]
        assert float((ours(ids, mask) - want).abs().max()) < 2e-5


def test_text_encoders_that_transformers_reads_are_taken_as_they_are(tmp_path: Path) -> None:
    assert text_source("google/umt5-xxl", tmp_path) == "google/umt5-xxl"
    (tmp_path / "text_encoder").mkdir()
    (tmp_path / "text_encoder" / "config.json").write_text("{}")
    assert text_source(str(tmp_path), tmp_path / "bundle") == str(tmp_path)
    assert text_source(str(tmp_path / "text_encoder"), tmp_path / "bundle") == str(tmp_path / "text_encoder")
    (tmp_path / "tokenizer").mkdir()
    assert text_source(str(tmp_path / "text_encoder"), tmp_path / "bundle") == str(tmp_path)
