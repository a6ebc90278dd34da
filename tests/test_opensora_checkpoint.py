"""Reading checkpoints: strictly, lazily, with one sentence for what is wrong. And how captions are cleaned."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import bs4
import numpy as np
import opensora_family as family
import opensora_golden as golden
import pytest
import torch
from safetensors.torch import load_file, save_file

from pyengine.bundle.bundle import Cleaning
from pyengine.cli import main
from pyengine.errors import BackendUnavailable, BundleError, PromptError
from pyengine.export.deferred import Deferred
from pyengine.export.families.opensora import STDiT3, load_autoencoder, load_stdit3, presets
from pyengine.export.families.opensora.checkpoint import Weights, empty
from pyengine.export.families.opensora.export import text_source
from pyengine.text.captions import clean_caption, cleaned_prompt

CONFIG = golden.manifest()["stdit3"]["config"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return family.checkpoint(tmp_path / "stdit3", golden.stdit3(), {"model_type": "STDiT3", **CONFIG})


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Replaces, adds or (None) removes tensors of a checkpoint; `__` stands for a dot."""
    known = load_file(folder / "model.safetensors")
    for name, value in tensors.items():
        key = name.replace("__", ".")
        if value is None:
            del known[key]
        else:
            known[key] = value
    save_file(known, folder / "model.safetensors")


def test_a_checkpoint_is_read_whole(folder: Path) -> None:
    loaded = load_stdit3(folder)
    assert not loaded.training
    assert all(
        torch.equal(value, golden.stdit3().state_dict()[name]) for name, value in loaded.state_dict().items()
    )


def test_an_autoencoder_is_read_whole(tmp_path: Path) -> None:
    source = family.autoencoder()
    loaded = load_autoencoder(family.checkpoint(tmp_path, source, family.autoencoder_config()))
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_half_precision_checkpoints_are_read_as_float32(folder: Path) -> None:
    half = {name: value.bfloat16() for name, value in golden.stdit3().state_dict().items()}
    save_file(half, folder / "model.safetensors")
    loaded = load_stdit3(folder)
    assert loaded.t_block[1].weight.dtype == torch.float32
    assert torch.equal(loaded.t_block[1].weight, half["t_block.1.weight"].float())
    assert Weights.open(folder).numpy("t_block.1.weight").dtype == np.float32


def test_shards_are_found_by_their_index(folder: Path) -> None:
    known = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(known)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: known[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(load_stdit3(folder).t_block[1].weight, known["t_block.1.weight"])
    index["weight_map"]["t_block.1.weight"] = "../a.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BundleError, match="expected files inside"):
        load_stdit3(folder)


def test_one_sentence_names_what_differs(folder: Path) -> None:
    change(folder, t_block__1__bias=None, extra__weight=torch.zeros(2), x_embedder__proj__bias=torch.zeros(3))
    with pytest.raises(
        BundleError,
        match=r"expected the 89 tensors of STDiT3 in .* but it lacks t_block\.1\.bias and has the unexpected extra\.weight and "
        r"has another shape for x_embedder\.proj\.bias \(expected \[64\] but got \[3\]\); check that",
    ):
        load_stdit3(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "config.json").unlink(), "expected .*config.json but it cannot be read"),
        (
            lambda path: (path / "config.json").write_text("[]"),
            "expected an object in .*config.json but got list",
        ),
        (
            lambda path: (path / "model.safetensors").write_bytes(b"no"),
            "expected .*model.safetensors to be a safetensors file",
        ),
        (
            lambda path: (path / "model.safetensors").unlink(),
            "expected .*model.safetensors to be a safetensors file",
        ),
    ],
)
def test_damaged_folders_are_refused(folder: Path, damage, message: str) -> None:
    damage(folder)
    with pytest.raises(BundleError, match=message):
        load_stdit3(folder)


def test_the_command_refuses_in_one_sentence(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "export",
        "opensora",
        "--vae",
        str(tmp_path),
        "--text-encoder",
        "t5",
        "--output",
        str(tmp_path / "out"),
    ]
    assert main([*words, "--checkpoint", str(folder), "--size", "wide"]) == 2
    assert "expected a size such as 240x426 (height x width) but got 'wide'" in capsys.readouterr().err
    assert main([*words, "--checkpoint", str(folder)]) == 2
    assert "config.json" in capsys.readouterr().err
    words[words.index("--vae") + 1] = str(family.checkpoints()["vae"])
    assert main([*words[:-1], str(folder), "--checkpoint", str(folder)]) == 2
    assert "to be empty but it holds config.json" in capsys.readouterr().err
    assert main([*words, "--checkpoint", str(folder), "--steps", "31"]) == 2
    assert "whose number divides the 31 steps but got 30" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()  # said before anything is written
    odd = family.checkpoint(
        tmp_path / "odd", STDiT3(**CONFIG | {"hidden_size": 60}), CONFIG | {"hidden_size": 60}
    )
    assert main([*words, "--checkpoint", str(odd)]) == 2
    assert (
        "expected heads of an even size, whose channels are rotated in pairs, but got 15"
        in capsys.readouterr().err
    )
    shutil.copytree(folder, tmp_path / "other")
    change(tmp_path / "other", rope__freqs=torch.ones(8))
    arguments = ["--checkpoint", str(tmp_path / "other"), "--vae", str(family.checkpoints()["vae"])]
    assert (
        main(["export", "opensora", *arguments, "--text-encoder", "t5", "--output", str(tmp_path / "new")])
        == 2
    )
    assert "expected rope.freqs of base 10000" in capsys.readouterr().err


def test_the_bundle_finds_a_text_encoder_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "t5").mkdir()
    monkeypatch.chdir(tmp_path)
    assert text_source("t5") == str(tmp_path / "t5")
    assert text_source("DeepFloyd/t5-v1_1-xxl") == "DeepFloyd/t5-v1_1-xxl"


def test_deferred_weights_take_no_memory() -> None:
    with torch.device("meta"):
        full = STDiT3()
    Deferred.of(full, lambda name: np.zeros(0))
    held = {parameter.untyped_storage().nbytes() for parameter in full.parameters()}
    assert held == {4}  # one number each, for 1.2 G parameters
    assert sum(parameter.numel() for parameter in full.parameters()) == 1208872772


def test_a_config_that_is_no_model_is_refused() -> None:
    with pytest.raises(BundleError, match=r"config\.json does not describe a STDiT3"):
        empty(STDiT3, {"hidden_size": 30, "num_heads": 4})


@pytest.mark.parametrize(
    ("caption", "cleaned"),
    [
        ("A Fox", "a fox"),
        ("see https://example.com/x now", "see now"),
        ("visit www.site.org/page today", "visit today"),
        ("<b>bold</b> &amp; plain", "bold plain"),
        ("hi @someone there", "hi there"),
        ("\u201cquoted\u201d \u2014 dash", '"quoted" - dash'),
        ("a\u4e2d\u6587b", "ab"),
        ("one-two_three-four_five", "one two three four five"),
        ("photo img_12.jpg here", "photo here"),
        ("wait... what", "wait what"),
        ("id 12345678 #12 x1y2z", "id"),
        ("free shipping worldwide, page 3", "worldwide,"),
        ("size 10x20 cm", "size cm"),
        ("a,b", "a, b"),
        ("<script>x</script>shown", "shown"),
        ("bread &amp butter", "bread butter"),
        ("fish &lt chips", "fish < chips"),
        ("3 &#39 4", "3 ' 4"),
        ("\ufb01re", "fire"),
        ("fox.jpg", ""),
    ],
)
@pytest.mark.filterwarnings("error")
def test_captions_are_cleaned_as_in_training(caption: str, cleaned: str) -> None:
    assert clean_caption(caption) == cleaned


def test_a_prompt_carries_its_aesthetic_score() -> None:
    cleaning = presets.CLEANING
    assert cleaned_prompt("A fox.", cleaning) == "a fox. aesthetic score: 6.5."
    assert cleaned_prompt("a fox aesthetic score: 5.0.", cleaning) == "a fox aesthetic score: 5.0."


def test_a_bundle_without_cleaning_takes_a_prompt_as_it_is() -> None:
    assert cleaned_prompt("A  Fox & a hen.", None) == "A  Fox & a hen."
    assert (
        cleaned_prompt("A  Fox & a hen.", Cleaning(suffix=" In the style of X."))
        == "A  Fox & a hen. In the style of X."
    )
    assert cleaned_prompt("A Fox, in style", Cleaning(suffix=" X.", unless="style")) == "A Fox, in style"


@pytest.mark.parametrize("package", ["bs4", "ftfy"])
def test_cleaning_needs_its_packages(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        BackendUnavailable, match=rf"needs the package {package}: pip install 'pyengine-video\[opensora\]'"
    ):
        clean_caption("plain")


def test_markup_that_the_parser_rejects_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def reject(*_: object, **__: object) -> None:  # which markup that is depends on Python's version
        raise bs4.ParserRejectedMarkup("unknown status keyword")

    monkeypatch.setattr(bs4, "BeautifulSoup", reject)
    with pytest.raises(
        PromptError, match=r"markup that cannot be read \('a <!\[foo\]> b'\); leave out '<!\['"
    ):
        clean_caption("a <![foo]> b")
