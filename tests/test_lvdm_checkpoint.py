"""Released checkpoint files: strict, safe, with aliases and dotless averages. Layout by specification, tiny sizes."""

from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lvdm_golden import MANIFEST
from safetensors.torch import load_file, save_file

from pyengine.errors import ConfigError, InputError
from pyengine.export.families.lvdm import Autoencoder3D, UNet
from pyengine.export.families.lvdm import checkpoint as checkpoint_module
from pyengine.export.families.lvdm.checkpoint import BUFFERS, aliases, convert, load_checkpoint, load_part
from pyengine.export.families.lvdm.export import fill
from pyengine.export.families.lvdm.released import Configuration

UNET = MANIFEST["models"]["unet_pred"]["config"] | {"channel_mult": [1, 2]}
AUTOENCODER = {"n_hiddens": 16, "downsample": [2, 2, 2]}


def modules() -> tuple[UNet, Autoencoder3D]:
    return UNet(**UNET), Autoencoder3D(**AUTOENCODER)


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    """What a checkpoint of these sizes holds. The average is the raw weight plus one."""
    torch.manual_seed(0)
    unet, autoencoder = modules()
    made = {f"model.diffusion_model.{k}": v for k, v in unet.state_dict().items()}
    made |= {
        "model_ema." + f"diffusion_model.{k}".replace(".", ""): v + 1 for k, v in unet.state_dict().items()
    }
    made |= {
        "model_ema.decay": torch.tensor(0.9),
        "model_ema.num_updates": torch.tensor(3, dtype=torch.int32),
    }
    for name, value in autoencoder.state_dict().items():
        made[f"first_stage_model.{name}"] = value
        if name.endswith(".conv.weight"):
            made[f"first_stage_model.{name.replace('.conv.weight', '.weight')}"] = value
    return made | {name: torch.zeros(1000) for name in BUFFERS}


@pytest.fixture(scope="module")
def file(state: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lvdm") / "tiny.ckpt"
    torch.save({"state_dict": state, "epoch": 1, "global_step": 2}, path)
    return path


def test_raw_and_averaged_weights_are_chosen_by_name(file: Path, state: dict[str, torch.Tensor]) -> None:
    unet, autoencoder = modules()
    loaded = load_checkpoint(file)
    key = "input_blocks.0.0.weight"
    for weights, offset in (("raw", 0), ("ema", 1)):
        load_part(unet, loaded, "unet", weights)
        torch.testing.assert_close(unet.state_dict()[key], state[f"model.diffusion_model.{key}"] + offset)
    load_part(autoencoder, loaded, "autoencoder")
    assert len(aliases(autoencoder)) == sum(k.startswith("first_stage_model.") for k in state) - len(
        autoencoder.state_dict()
    )


def test_a_file_in_the_format_before_zip_is_read(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / "old.ckpt"
    torch.save({"state_dict": state}, path, _use_new_zipfile_serialization=False)
    loaded = load_checkpoint(path)
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_an_autoencoder_file_has_no_prefix_and_a_loss(tmp_path: Path) -> None:
    _, autoencoder = modules()
    bare = dict(autoencoder.state_dict()) | {"loss.perceptual.weight": torch.zeros(3)}
    path = tmp_path / "ae.ckpt"
    torch.save(bare, path)
    load_part(Autoencoder3D(**AUTOENCODER), load_checkpoint(path), "autoencoder")


def without(state: dict[str, torch.Tensor], key: str) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state.items() if name != key}


def test_missing_unexpected_and_misshapen_tensors_are_named(state: dict[str, torch.Tensor]) -> None:
    unet, _ = modules()
    key = "model.diffusion_model.out.2.bias"
    with pytest.raises(
        InputError, match=r"expected model\.diffusion_model\.out\.2\.bias and 0 more but the file lacks"
    ):
        load_part(unet, without(state, key), "unet")
    with pytest.raises(InputError, match=r"but got model\.diffusion_model\.extra and 0 more"):
        load_part(unet, state | {"model.diffusion_model.extra": torch.zeros(1)}, "unet")
    with pytest.raises(InputError, match=r"shapes of this configuration but got out.2.bias \[5\]"):
        load_part(unet, state | {key: torch.zeros(5)}, "unet")
    plain = {name: value for name, value in state.items() if not name.startswith("model_ema.")}
    with pytest.raises(InputError, match="averaged weights but the file has none"):
        load_part(unet, plain, "unet", "ema")


class Trap:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("sprung"),))


def test_a_file_that_would_run_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"x": Trap()}}, "trap.ckpt")
    Path("plain.ckpt").write_bytes(pickle.dumps(Trap()))
    Path("cut.ckpt").write_bytes(b"PK\x03\x04")
    torch.save({"state_dict": {"x": "words"}}, "words.ckpt")
    for name in ("trap.ckpt", "plain.ckpt", "cut.ckpt", "words.ckpt", "missing.ckpt"):
        with pytest.raises(InputError, match=r"^\[checkpoint\] expected [^\n\x1b]+; download it again$"):
            load_checkpoint(Path(name))
    with pytest.raises(InputError, match="holds more than tensors, and none of that was run"):
        load_checkpoint(Path("trap.ckpt"))
    assert not Path("sprung").exists()


def test_random_weights_are_announced(capsys: pytest.CaptureFixture[str]) -> None:
    fill(SimpleNamespace(unets={}), None, "raw")
    assert capsys.readouterr().err.startswith("no --checkpoint: the weights are random")
    with pytest.raises(ConfigError, match="expected 2 checkpoints but got 1"):
        fill(SimpleNamespace(unets={"prediction": None, "interpolation": None}), ["pred.ckpt"], "ema")


def test_conversion_to_safetensors(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = Configuration(UNET, AUTOENCODER, 1.0, 0.0)
    monkeypatch.setattr(checkpoint_module, "configuration", lambda name: tiny)
    convert(file, "tiny", "ema", tmp_path)
    unet, autoencoder = modules()
    unet.load_state_dict(load_file(tmp_path / "unet.safetensors"))
    autoencoder.load_state_dict(load_file(tmp_path / "autoencoder.safetensors"))
    save_file(unet.state_dict(), tmp_path / "bare.safetensors")
    load_part(unet, load_checkpoint(tmp_path / "bare.safetensors"), "unet")
