"""Files of weights are read tensor by tensor, and nothing in them is run."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from pyengine.errors import InputError
from pyengine.export.checkpoints import TensorFile, open_tensors
from pyengine.export.checkpoints import files as files_module
from pyengine.export.checkpoints.pickle_data import Unknown, read_pickle


def state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    shared = torch.randn(6, 5)
    return {
        "a.weight": torch.randn(40, 30),
        "a.bias": torch.randn(40).half(),
        "b": torch.randn(3, 4).bfloat16(),
        "transposed": torch.randn(7, 4).t(),
        "part": shared[2:4, 1:],
        "whole": shared,
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "counts": torch.arange(5),
        "flags": torch.tensor([True, False]),
    }


def equal(file: TensorFile, wanted: dict[str, Tensor]) -> None:
    assert set(file.tensors) == set(wanted)
    for name, value in wanted.items():
        got = file.read(name)
        assert got.dtype == value.dtype
        assert torch.equal(got, value)
        assert got.is_contiguous()


@pytest.mark.parametrize("under", ["state_dict", None])
def test_an_archive_of_torch_gives_its_tensors(tmp_path: Path, under: str | None) -> None:
    path, wanted = tmp_path / "a.ckpt", state()
    torch.save({under: OrderedDict(wanted), "epoch": 3, "lr": 0.5} if under else wanted, path)
    equal(open_tensors(path), wanted)


def test_safetensors_give_their_tensors(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    wanted = {name: value.contiguous().clone() for name, value in state().items()}
    save_file(wanted, path, metadata={"format": "pt"})
    equal(open_tensors(path), wanted)


def test_parameters_are_tensors(tmp_path: Path) -> None:
    path, value = tmp_path / "a.pth", torch.nn.Parameter(torch.randn(3, 2))
    torch.save({"w": value}, path)
    equal(open_tensors(path), {"w": value.data})


class Bomb:
    """What a pickle could do: it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def test_what_a_pickle_would_run_is_not_run(tmp_path: Path) -> None:
    touched, path, wanted = tmp_path / "touched", tmp_path / "a.ckpt", state()
    torch.save({"state_dict": wanted, "callbacks": [Bomb(touched)], "path": Path("x")}, path)
    equal(open_tensors(path), wanted)
    torch.save({"state_dict": {"w": wanted["a.weight"], "bad": Bomb(touched)}}, path)
    assert set(open_tensors(path).tensors) == {"w"}
    assert not touched.exists()
    made = read_pickle(pickle.dumps({"bomb": Bomb(touched)}, 2))["bomb"]
    assert isinstance(made, Unknown)
    assert not touched.exists()


@pytest.mark.parametrize("protocol", range(2, 6))
def test_plain_data_is_what_pickle_gives(protocol: int) -> None:
    value = {
        "n": [1, -5, 2**40, -(2**70), 1.5, None, True, False],
        "t": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
        "s": ["", "ä", "x" * 300] + ([b"", b"y" * 300] if protocol > 2 else []),
        "same": [[7]] * 3,
        "d": OrderedDict(a=1, b={"c": []}),
        "many": {str(i): i for i in range(2000)},
    }
    assert read_pickle(pickle.dumps(value, protocol)) == value


def test_only_the_bytes_of_a_tensor_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Optimizer state beside the weights costs no reading."""
    path = tmp_path / "a.ckpt"
    weights = {f"w{i}": torch.randn(100, 100) for i in range(3)}
    moments = {i: {"exp_avg": torch.randn(100, 100), "exp_avg_sq": torch.randn(100, 100)} for i in range(3)}
    torch.save({"state_dict": weights, "optimizer_states": [{"state": moments}]}, path)
    file = open_tensors(path)
    read: list[int] = []
    original = Path.open

    class Counted(io.FileIO):
        def readinto(self, buffer: Any) -> int:
            read.append(len(memoryview(buffer)))
            return super().readinto(buffer)

    def opened(self: Path, *arguments: Any, **settings: Any) -> Any:
        return Counted(self) if settings.get("buffering") == 0 else original(self, *arguments, **settings)

    monkeypatch.setattr(files_module.Path, "open", opened)
    for name, value in weights.items():
        assert torch.equal(file.read(name), value)
    assert sum(read) == 3 * 40_000


def cut(path: Path, size: int) -> None:
    with path.open("r+b") as file:
        file.truncate(size)


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_a_file_that_is_cut_off_names_the_tensor(tmp_path: Path, suffix: str) -> None:
    weights = {f"layer.{i}.weight": torch.randn(64, 64) for i in range(4)}
    path = tmp_path / f"a{suffix}"
    if suffix == ".ckpt":
        torch.save({"state_dict": weights}, path)
    else:
        save_file(weights, path)
    whole = open_tensors(path)
    data = path.read_bytes()
    for name, place in whole.tensors.items():
        path.write_bytes(data)
        cut(path, place.start + 100)
        with pytest.raises(InputError, match=rf"16384 bytes of {name} in .* ends after 100 of them"):
            open_tensors(path)
    last = max(whole.tensors.values(), key=lambda place: place.start)
    if suffix == ".ckpt":
        path.write_bytes(data)
        cut(path, last.end + 5)
        with pytest.raises(InputError, match="directory at its end is missing"):
            open_tensors(path)
        first = min(whole.tensors.values(), key=lambda place: place.start)
        cut(path, first.start - 64)
        with pytest.raises(InputError, match=r"layer\.0\.weight in .* ends after 0 of them"):
            open_tensors(path)
    cut(path, 20)
    with pytest.raises(InputError, match="cannot read"):
        open_tensors(path)


def test_a_file_that_becomes_shorter_while_it_is_open_names_the_tensor(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.zeros(1000)}, path)
    file = open_tensors(path)
    cut(path, path.stat().st_size - 4)
    with pytest.raises(InputError, match=r"4000 bytes of w .* after 3996"):
        file.read("w")


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        open_tensors(tmp_path / "none.ckpt")
    plain = tmp_path / "a.ckpt"
    plain.write_bytes(pickle.dumps({"w": 1}))
    with pytest.raises(InputError, match="neither safetensors nor the zip archive"):
        open_tensors(plain)
    with zipfile.ZipFile(plain, "w") as archive:
        archive.writestr("a/readme", "hello")
    with pytest.raises(InputError, match=r"no archive of torch\.save"):
        open_tensors(plain)
    torch.save([torch.zeros(3)], plain)
    with pytest.raises(InputError, match="expected tensors by name"):
        open_tensors(plain)
    safe = tmp_path / "a.safetensors"
    safe.write_bytes(b"\xff" * 64)
    with pytest.raises(InputError, match="its header would have"):
        open_tensors(safe)
    header = b'{"w":{"dtype":"F32","shape":[4],"data_offsets":[0,12]}}'
    safe.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 12)
    with pytest.raises(InputError, match="not of the size that its shape has"):
        open_tensors(safe)


def test_a_storage_that_is_shorter_than_its_tensor_is_refused(tmp_path: Path) -> None:
    path, other = tmp_path / "a.ckpt", tmp_path / "b.ckpt"
    torch.save({"w": torch.zeros(100)}, path)
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(other, "w") as target:
        for info in source.infolist():
            data = source.read(info)
            target.writestr(info.filename, data[:40] if "/data/" in info.filename else data)
    with pytest.raises(InputError, match="w has 40 bytes of 400"):
        open_tensors(other)
