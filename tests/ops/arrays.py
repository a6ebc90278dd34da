"""Moving test data between torch and the numpy arrays that pyengine._C takes (bfloat16 as uint16)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from pyengine import _C

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Half a unit in the last place of values around 1: what remains when torch happens to be exact.
FLOOR = {"float32": 1e-6, "bfloat16": 4e-3}


def to_numpy(x: torch.Tensor) -> np.ndarray:
    """A C-contiguous copy; bfloat16 becomes its uint16 bit pattern."""
    x = x.contiguous()
    return (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy().copy()


def from_numpy(x: np.ndarray) -> torch.Tensor:
    """float64 values of a float32 or bfloat16 array."""
    t = torch.from_numpy(x)
    return (t.view(torch.bfloat16) if x.dtype == np.uint16 else t).double()


def cast(inputs: dict[str, torch.Tensor | None], dtype: torch.dtype) -> dict[str, Any]:
    """`inputs` with their float64 tensors in `dtype`."""
    return {k: v.to(dtype) if v is not None and v.dtype == torch.float64 else v for k, v in inputs.items()}


def error(x: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest absolute difference."""
    return float((x.double() - exact).abs().max()) if exact.numel() else 0.0


def assert_as_good_as_torch(
    got: np.ndarray, torch_got: torch.Tensor, exact: torch.Tensor, dtype: str
) -> None:
    """The rule of this project: at most twice the error that plain PyTorch makes in the same dtype."""
    ours, theirs = error(from_numpy(got), exact), error(torch_got, exact)
    assert ours <= 2 * theirs + FLOOR[dtype], f"error {ours:.3g}, torch in {dtype} {theirs:.3g}"


def rings_of(ring: np.ndarray, streams: int) -> list[np.ndarray]:
    """The rings of a batch [branches * streams, ...], each in memory of its own."""
    return [ring[stream::streams].copy() for stream in range(streams)]


def batch_of(rings: list[np.ndarray]) -> np.ndarray:
    """What `rings_of` took apart."""
    return np.concatenate(list(np.stack(rings, 1)))


def run_attention(
    inputs: dict[str, torch.Tensor | None], append_slot: list[list[int]] | None = None, **attributes: Any
) -> dict[str, np.ndarray]:
    """_C.frame_window_attention on torch inputs, with a ring per stream: its out and the rings afterwards."""
    arrays: dict[str, Any] = {k: None if v is None else to_numpy(v) for k, v in inputs.items()}
    for name in ("q_gain", "k_gain"):
        gain = inputs[name]
        arrays[name] = None if gain is None else gain.float().numpy()
    batch, frames, tokens, _, heads, head_dim = arrays["qkv"].shape
    streams = arrays["frame_index"].shape[0]
    for name in ("ring_key", "ring_value"):
        arrays[name] = rings_of(arrays[name], streams)
    arrays["out"] = np.full((batch, frames, tokens, heads * head_dim), 7, arrays["qkv"].dtype)
    slots = None if append_slot is None else np.array(append_slot)
    _C.frame_window_attention(**arrays, append_slot=slots, **attributes)
    return {"out": arrays["out"]} | {name: batch_of(arrays[name]) for name in ("ring_key", "ring_value")}
