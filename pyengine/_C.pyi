"""Types of the compiled module; csrc/bindings/module.cc has the docstrings, export/ops/ the meaning."""

from typing import Any, Literal

from numpy.typing import NDArray

Array = NDArray[Any]

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
    scope: Literal["temporal", "frame"] | str = "temporal",
    mask: Literal["bidirectional", "noise_causal", "ranged"] | str = "noise_causal",
    theta: float = 10000.0,
    rotary_dim: int = 0,
    interleaved: bool = True,
    epsilon: float = 1e-6,
    scale: float = 0.0,
) -> None: ...
def relative_attention(
    qkv: Array,
    key_table: Array | None = None,
    value_table: Array | None = None,
    *,
    out: Array,
    transposed: bool = False,
) -> None: ...
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
) -> None: ...
def ring_append(key: Array, value: Array, ring_key: Array, ring_value: Array, append_slot: Array) -> None: ...
def cpu_isa() -> str: ...
def supported_isas() -> list[str]: ...
def set_cpu_isa(name: str) -> None: ...
def threads() -> int: ...
def set_threads(count: int) -> None: ...
