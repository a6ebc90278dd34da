"""Torch tensors as the arrays that pyengine._cuda takes, on the host (for the emulator) or on a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

NAMES = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float8_e4m3fn: "float8_e4m3",
    torch.int64: "int64",
    torch.int32: "int32",
    torch.uint8: "uint8",
}


@dataclass(frozen=True)
class TensorArray:
    """A contiguous tensor seen as an array on a device."""

    tensor: torch.Tensor

    @property
    def pointer(self) -> int:
        return self.tensor.data_ptr()

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> str:
        return NAMES.get(self.tensor.dtype, str(self.tensor.dtype))


@dataclass(frozen=True)
class CudaOps:
    """A build of the CUDA module and where its arrays have to be."""

    module: ModuleType
    device: str

    def put(self, tensor: torch.Tensor | None) -> TensorArray | None:
        """A copy on the device."""
        return None if tensor is None else TensorArray(tensor.contiguous().to(self.device, copy=True))

    def attention(
        self,
        inputs: dict[str, torch.Tensor | None],
        append_slot: list[int] | None = None,
        workspace: bool = False,
        ring_scales: tuple[torch.Tensor, torch.Tensor] | None = None,
        **attributes: Any,
    ) -> dict[str, torch.Tensor]:
        """frame_window_attention: its out and the ring afterwards. Gains are passed in float32."""
        arrays = {k: self.put(v) for k, v in inputs.items()}
        for name in ("q_gain", "k_gain"):
            gain = inputs[name]
            arrays[name] = None if gain is None else self.put(gain.float())
        if ring_scales is not None:
            arrays["ring_key_scale"], arrays["ring_value_scale"] = (self.put(s) for s in ring_scales)
        qkv = inputs["qkv"]
        assert qkv is not None
        batch, frames, tokens, _, heads, head_dim = qkv.shape
        out = self.put(torch.full((batch, frames, tokens, heads * head_dim), 7.0, dtype=qkv.dtype))
        arrays["out"] = out
        if append_slot is not None:
            arrays["append_slot"] = self.put(torch.tensor(append_slot))
        if workspace:
            scope = attributes.get("scope", "temporal")
            size = self.module.frame_window_attention_workspace(
                arrays["qkv"], arrays["ring_key"], scope=scope
            )
            arrays["workspace"] = self.put(torch.full((size,), 255, dtype=torch.uint8)) if size else None
        self.module.frame_window_attention(**arrays, **attributes)
        kept = {name: arrays[name] for name in ("out", "ring_key", "ring_value")}
        return {name: array.tensor.cpu() for name, array in kept.items() if array is not None}

    def relative_attention(
        self, inputs: dict[str, torch.Tensor | None], transposed: bool = False
    ) -> torch.Tensor:
        """Tables are passed in float32."""
        qkv = inputs["qkv"]
        assert qkv is not None
        tables = [
            None if inputs[k] is None else self.put(inputs[k].float()) for k in ("key_table", "value_table")
        ]
        batch, frames, places, _, heads, head_dim = qkv.shape
        out = self.put(torch.full((batch, frames, places, heads * head_dim), 7.0, dtype=qkv.dtype))
        assert out is not None
        self.module.relative_attention(self.put(qkv), *tables, out=out, transposed=transposed)
        return out.tensor.cpu()

    def denoise_step(self, inputs: dict[str, torch.Tensor | None], in_place: bool = False) -> torch.Tensor:
        arrays = {k: self.put(v) for k, v in inputs.items()}
        sample = arrays["sample"]
        assert sample is not None
        out = sample if in_place else TensorArray(torch.full_like(sample.tensor, float("nan")))
        self.module.denoise_step(**arrays, out=out)
        return out.tensor.cpu()

    def ring_append(self, **tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The ring's keys and values afterwards."""
        arrays = {k: self.put(v) for k, v in tensors.items()}
        self.module.ring_append(**arrays)
        key, value = arrays["ring_key"], arrays["ring_value"]
        assert key is not None
        assert value is not None
        return key.tensor.cpu(), value.tensor.cpu()
