"""Types of the compiled module for NVIDIA devices; csrc/bindings/cuda_module.cc has the docstrings, export/ops/ the
meaning. The module exists only where the package was built with CUDA.

Arrays are on the device, C-contiguous, and stay the caller's. Ops are queued on `stream` and read indices, levels
and slots when they run, so that they may be captured in a CUDA graph: values are not checked (a slot out of range is
taken as -1). A `float8_e4m3` ring holds value / scale of its head, with scales float32 [heads].
"""

from typing import Any, Literal, Protocol

class Array(Protocol):
    @property
    def pointer(self) -> int: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...

def device_count() -> int: ...
def check_device() -> None: ...
def frame_window_attention(
    qkv: Array,
    level: Array,
    frame_index: Array,
    ring_key: Array,
    ring_value: Array,
    ring_index: Array,
    out: Array,
    *,
    append_slot: Array | None = None,
    q_gain: Array | None = None,
    k_gain: Array | None = None,
    reach: Array | None = None,
    ring_key_scale: Array | None = None,
    ring_value_scale: Array | None = None,
    workspace: Array | None = None,
    scope: Literal["temporal", "frame"] | str = "temporal",
    mask: Literal["bidirectional", "noise_causal", "ranged"] | str = "noise_causal",
    theta: float = 10000.0,
    rotary_dim: int = 0,
    interleaved: bool = True,
    epsilon: float = 1e-6,
    scale: float = 0.0,
    stream: int = 0,
) -> None: ...
def frame_window_attention_workspace(
    *inputs: Array | None, scope: Literal["temporal", "frame"] | str = "temporal"
) -> int: ...
def attention_launch(
    *,
    scope: str,
    dtype: str,
    batch: int,
    frames: int,
    tokens: int,
    heads: int,
    head_dim: int,
    ring: int,
    processors: int,
    block_bytes: int,
    processor_bytes: int,
    may_split: bool = False,
) -> dict[str, Any]: ...
def denoise_step(
    sample: Array,
    prediction: Array,
    weights: Array,
    sample_scale: Array,
    prediction_scale: Array,
    noise_scale: Array,
    noise: Array | None = None,
    *,
    out: Array,
    stream: int = 0,
) -> None: ...
def ring_append(
    key: Array,
    value: Array,
    ring_key: Array,
    ring_value: Array,
    append_slot: Array,
    *,
    ring_key_scale: Array | None = None,
    ring_value_scale: Array | None = None,
    stream: int = 0,
) -> None: ...
