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
class TensorRings:
    """The rings of several streams, as `pyengine.runtime.cuda.memory.RingTable` describes them."""

    tensors: list[torch.Tensor]
    bases: TensorArray

    @staticmethod
    def of(batch: torch.Tensor, streams: int, device: str) -> TensorRings:
        """A copy of `batch` [branches * streams, ...] on the device, taken apart into streams."""
        tensors = [batch[stream::streams].to(device, copy=True).contiguous() for stream in range(streams)]
        return TensorRings(tensors, TensorArray(torch.tensor([t.data_ptr() for t in tensors], device=device)))

    @property
    def tensor(self) -> torch.Tensor:
        """All of them as one batch again."""
        return torch.cat(list(torch.stack(self.tensors, 1)))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensors[0].shape)

    @property
    def dtype(self) -> str:
        return NAMES[self.tensors[0].dtype]


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
        append_slot: list[list[int]] | None = None,
        workspace: bool = False,
        ring_scales: tuple[torch.Tensor, torch.Tensor] | None = None,
        **attributes: Any,
    ) -> dict[str, torch.Tensor]:
        """frame_window_attention: its out and the rings afterwards. Gains are passed in float32, the rings of
        several streams in a table.
        """
        arrays: dict[str, Any] = {k: self.put(v) for k, v in inputs.items()}
        index = inputs["frame_index"]
        if index is not None and len(index) > 1:
            for name in ("ring_key", "ring_value"):
                arrays[name] = TensorRings.of(inputs[name], len(index), self.device)
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
            size = self.module.frame_window_attention_workspace(**arrays, **attributes)
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
        """The rings' keys and values afterwards."""
        arrays: dict[str, Any] = {k: self.put(v) for k, v in tensors.items()}
        streams = len(tensors["append_slot"])
        if streams > 1:
            for name in ("ring_key", "ring_value"):
                arrays[name] = TensorRings.of(tensors[name], streams, self.device)
        self.module.ring_append(**arrays)
        return arrays["ring_key"].tensor.cpu(), arrays["ring_value"].tensor.cpu()
