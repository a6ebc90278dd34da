"""The CUDA module without a GPU: what is refused, what heuristics choose, what a machine without a driver is told."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from arrays import cast
from cuda_arrays import CudaOps, TensorArray

from pyengine.export.ops.frame_window_attention_cases import AttentionCase

ROOT = Path(__file__).parents[2]
H200 = {"processors": 132, "block_bytes": 227 << 10, "processor_bytes": 228 << 10}
RTX = {"processors": 128, "block_bytes": 99 << 10, "processor_bytes": 100 << 10}


def launch(ops: CudaOps, device: dict[str, int], **shape: Any) -> dict[str, Any]:
    sizes = {"scope": "temporal", "dtype": "bfloat16", "batch": 2, "frames": 35, "tokens": 1024, "heads": 16}
    return ops.module.attention_launch(**{**sizes, "head_dim": 72, "ring": 8, **shape}, **device)


@pytest.mark.parametrize("device", [H200, RTX], ids=["h200", "rtx"])
@pytest.mark.parametrize("head_dim", [64, 72, 128])
@pytest.mark.parametrize("frames", [1, 8, 16, 20, 35, 48, 64])
def test_temporal_launch_fits_and_overlaps(
    emulated_ops: CudaOps, device: dict[str, int], head_dim: int, frames: int
) -> None:
    got = launch(emulated_ops, device, frames=frames, head_dim=head_dim)
    assert got["kernel"] == "temporal"
    assert got["shared_bytes"] <= device["block_bytes"]
    assert got["team"] * got["sequences"] <= 4
    assert got["team"] == min(4, 1 << max(0, (-(-frames // 16) - 1).bit_length()))
    blocks = min(2 if head_dim == 128 else 3, device["processor_bytes"] // (got["shared_bytes"] + 1024))
    assert blocks >= 1
    # One wave: blocks are persistent.
    assert got["grid"][0] * got["grid"][1] <= device["processors"] * blocks + 1
    if device is H200 and head_dim < 128:
        assert got["stages"] == 2
        assert blocks >= 2


def test_kernel_for_every_shape(emulated_ops: CudaOps) -> None:
    for changes in ({"dtype": "float32"}, {"head_dim": 40}, {"head_dim": 256}, {"frames": 2000}):
        assert launch(emulated_ops, H200, **changes)["kernel"] == "rows"
    assert launch(emulated_ops, H200, scope="frame")["kernel"] == "frame"


def test_warpgroups_where_they_suit(emulated_ops: CudaOps) -> None:
    def kernel(**changes: Any) -> str:
        shape = {"scope": "frame", "head_dim": 128, "tokens": 1560, "warpgroups": True, **changes}
        return str(launch(emulated_ops, H200, **shape)["kernel"])

    assert kernel() == kernel(head_dim=64) == "frame_group"
    for changes in ({"warpgroups": False}, {"head_dim": 72}, {"tokens": 63}):
        assert kernel(**changes) == "frame"
    assert kernel(dtype="float32") == "rows"
    assert kernel(scope="temporal", tokens=16) == "temporal"


def test_frame_launch(emulated_ops: CudaOps) -> None:
    video = {
        "scope": "frame",
        "batch": 1,
        "frames": 3,
        "tokens": 1560,
        "heads": 12,
        "head_dim": 128,
        "ring": 18,
    }
    for device in (H200, RTX):
        got = launch(emulated_ops, device, **video)
        assert got["query_tiles"] == 2
        assert got["shared_bytes"] <= device["block_bytes"]
        assert got["grid"] == (3 * 13, 12, 1)
        assert got["splits"] == 1
    few = {**video, "frames": 1, "tokens": 256, "ring": 64, "heads": 8}
    assert launch(emulated_ops, H200, **few)["splits"] == 1  # nowhere to put the parts
    got = launch(emulated_ops, H200, **few, may_split=True)
    assert got["query_tiles"] == 1
    assert got["splits"] > 1
    assert got["grid"] == (4, 8, got["splits"])
    assert got["workspace_bytes"] == got["splits"] * 256 * 8 * (128 + 2) * 4


def arguments(ops: CudaOps, **changes: torch.Tensor | None) -> dict[str, Any]:
    inputs = cast(AttentionCase("good", frames=3, ring=2).make_inputs(), torch.float32)
    inputs |= {"out": torch.zeros(2, 3, 4, 128), **changes}
    return {name: ops.put(value) for name, value in inputs.items()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qkv": torch.zeros(2, 3, 4, 2, 2, 64)}, r"qkv \[batch, frames, tokens, 3, heads, head_dim\]"),
        ({"qkv": torch.zeros(2, 3, 4, 3, 2, 64).int()}, "qkv of dtype float32, float16 or bfloat16 but got int32"),
        ({"level": torch.zeros(1, 4)}, r"level of shape \[1,3\] but got float32 \[1,4\]"),
        ({"frame_index": torch.zeros(1, 3)}, "frame_index of dtype int64 but got float32"),
        ({"ring_key": torch.zeros(2, 2, 4, 2, 64).half()}, "ring_key of dtype float32 but got float16"),
        ({"q_gain": torch.zeros(63)}, "q_gain of shape"),
        ({"reach": torch.zeros(1, 3).long()}, 'reach exactly when mask is "ranged"'),
        ({"out": torch.zeros(2, 3, 4, 127)}, "out of shape"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(
    emulated_ops: CudaOps, changes: dict[str, torch.Tensor], message: str
) -> None:
    with pytest.raises(ValueError, match=r"^\[frame_window_attention\] expected " + message):
        emulated_ops.module.frame_window_attention(**arguments(emulated_ops, **changes))


def test_arrays_of_the_wrong_kind_are_named(emulated_ops: CudaOps) -> None:
    good = arguments(emulated_ops)
    with pytest.raises(ValueError, match=r"expected level to be an array on the device, .* but got Tensor"):
        emulated_ops.module.frame_window_attention(**{**good, "level": torch.zeros(2, 3)})
    with pytest.raises(ValueError, match="scope to be one of temporal, frame but got 'space'"):
        emulated_ops.module.frame_window_attention(**good, scope="space")
    bad = SimpleNamespace(bases=TensorArray(torch.zeros(2)), shape=(1, 2, 4, 2, 64), dtype="float32")
    with pytest.raises(
        ValueError, match=r"ring_key.bases of dtype int64, one address per stream, but got float32"
    ):
        emulated_ops.module.frame_window_attention(**{**good, "ring_key": bad})
    step = {"sample": torch.zeros(1, 4, 2), "prediction": torch.zeros(2, 1, 4, 2), "weights": torch.zeros(3)}
    step |= {name: torch.zeros(1, 4) for name in ("sample_scale", "prediction_scale", "noise_scale")}
    arrays = {name: TensorArray(value) for name, value in step.items()}
    with pytest.raises(ValueError, match=r"^\[denoise_step\] expected weights of shape \[2,1\]"):
        emulated_ops.module.denoise_step(**arrays, out=TensorArray(torch.zeros(1, 4, 2)))
    ring = {"key": torch.zeros(2, 5, 3, 2, 8), "value": torch.zeros(2, 5, 3, 2, 7)}
    ring |= {name: torch.zeros(2, 7, 3, 2, 8) for name in ("ring_key", "ring_value")}
    with pytest.raises(ValueError, match=r"^\[ring_append\] expected value of shape"):
        emulated_ops.module.ring_append(
            **{name: TensorArray(value) for name, value in ring.items()},
            append_slot=TensorArray(torch.zeros(1, 5).long()),
        )


def test_without_a_driver_one_clear_sentence() -> None:
    module = pytest.importorskip("pyengine._cuda", reason="pyengine was built without CUDA")
    if module.device_count():
        pytest.skip("this machine has a GPU")
    with pytest.raises(
        RuntimeError, match=r"^\[cuda\] expected an NVIDIA device with its driver but got: .*; install"
    ):
        module.check_device()
    array = TensorArray(torch.zeros(1, 2, 4))
    scales = TensorArray(torch.zeros(1, 2))
    with pytest.raises(RuntimeError, match=r"^\[cuda\] expected an NVIDIA device"):
        module.denoise_step(array, TensorArray(torch.zeros(1, 1, 2, 4)), TensorArray(torch.zeros(1, 1)), scales, scales, scales,
                            out=array)  # fmt: skip


def test_importing_pyengine_does_not_need_cuda() -> None:
    code = "import pyengine, sys; assert 'pyengine._cuda' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")


REPORT = """
ptxas info    : Compiling entry function '_ZN8pyengine3ops4cuda12frame_kernelINS_8bfloat16ELi128ELi2EEEvNS1_15AttentionParamsE' for 'sm_90a'
ptxas info    : Function properties for _ZN8pyengine
    48 bytes stack frame, {spills} bytes spill stores, 96 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 48 bytes cumulative stack size
"""


@pytest.mark.skipif(os.name == "nt", reason="runs a shell script")
@pytest.mark.parametrize("spills", [0, 64])
def test_build_reports_registers_and_fails_on_spills(tmp_path: Path, spills: int) -> None:
    script = ROOT / "csrc/cmake/ptxas_report.py"
    fake = tmp_path / "nvcc"
    text = REPORT.format(spills=spills).replace("96 bytes", f"{spills} bytes")
    fake.write_text(f"#!/bin/sh\ntouch x.o\ncat >&2 <<'END'\n{text}\nEND\n")
    fake.chmod(0o755)
    command = [sys.executable, str(script), "compile", str(tmp_path / "reports"), str(fake)]
    done = subprocess.run([*command, "-c", "x.cu", "-o", "x.o"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == (1 if spills else 0), done.stderr
    assert (tmp_path / "x.o").exists() == (spills == 0)
    assert ("frame_kernel bfloat16 128 2 spills 128 bytes" in done.stderr) == (spills > 0)
    table = subprocess.run(
        [sys.executable, str(script), "print", str(tmp_path / "reports")],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    words = ["frame_kernel", "bfloat16", "128", "2", "255", "48", str(2 * spills)]
    assert table.splitlines()[1].split() == words


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_a_kernel_compiles_with_nvcc(tmp_path: Path) -> None:
    """The smallest one: the rest is compiled by .ci/run."""
    source = ROOT / "csrc/ops/ring_append/cuda.cu"
    command = [
        "nvcc",
        "-std=c++17",
        "-arch=sm_80",
        f"-I{ROOT / 'csrc'}",
        "-c",
        str(source),
        "-o",
        str(tmp_path / "x.o"),
    ]
    subprocess.run(command, check=True, capture_output=True)
