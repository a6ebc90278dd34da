"""FrameWindowAttention: F active frames attend to [ring | active] frames; noise levels decide who sees whom.

    qkv          [B, F, N, 3, H, D]   batch, frames, tokens of a frame, heads, head size
    level        [S, F]               float32 noise level, 0 = clean; one row per stream
    frame_index  [S, F]               int64; -1 = absent: it is no key, and its row of `out` is zero
    ring_key     [B, R, N, H, D]      normalised, not rotated; all three ring inputs may be absent: no ring
    ring_value   [B, R, N, H, D]      finite even where the slot is empty
    ring_index   [S, R]               int64; -1 = empty slot
    q_gain, k_gain [D]                optional: RMS norm over D in float32, then this gain
    reach        [S, F]               int64, mask "ranged" only
 -> out          [B, F, N, H * D]
    key, value   [B, F, N, H, D]      what the ring keeps: the key normalised, not rotated

The batch is B = branches * S entries, branch by branch: entry b belongs to stream b % S, and streams see nothing
of each other. A stream that is not there has -1 in its whole row of `frame_index`.

Frame i sees every filled ring slot, and active frame j as `mask` says: "bidirectional" always, "noise_causal"
iff level_j <= level_i, "ranged" iff also index_i - reach_i < index_j <= index_i (which then binds ring slots
too). `scope` "temporal": a token sees the same place in those frames; "frame": all their tokens. A row that
sees nothing is exactly zero. Rotary angles are index * theta^(-2k / rotary_dim) with indices re-based to the
smallest present one of the stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .frame_window_attention_cases import BENCH_CASES, CASES
from .frame_window_attention_onnx import onnx_function
from .spec import DOMAIN, VERSION, OpSpec

ATTRIBUTES: dict[str, Any] = {
    "scope": "temporal",
    "mask": "noise_causal",
    "theta": 10000.0,
    "rotary_dim": 0,
    "interleaved": 1,
    "epsilon": 1e-6,
    "scale": 0.0,
}


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of norms, angles and softmax: float32, or float64 for float64 data."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rms_norm(x: torch.Tensor, gain: torch.Tensor | None, epsilon: float) -> torch.Tensor:
    """x [..., D] over its root mean square, times gain [D]; x itself without a gain."""
    if gain is None:
        return x
    wide = x.to(accumulator(x.dtype))
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return (wide * gain.to(wide.dtype)).to(x.dtype)


def rotate(
    x: torch.Tensor, position: torch.Tensor, theta: float, rotary_dim: int, interleaved: bool
) -> torch.Tensor:
    """Rotary embedding of x [B, P, N, H, D] by position [B, P] on its first `rotary_dim` values."""
    if rotary_dim == 0:
        return x
    wide = accumulator(x.dtype)
    exponent = torch.arange(0, rotary_dim, 2, dtype=torch.float64, device=x.device) / -rotary_dim
    base = torch.tensor(theta, dtype=torch.float64, device=x.device)
    frequency = torch.pow(base, exponent)  # [rotary_dim / 2]
    angle = (position.double()[..., None] * frequency)[:, :, None, None]  # [B, P, 1, 1, rotary_dim / 2]
    cosine, sine = angle.cos().to(wide), angle.sin().to(wide)
    head, tail = x[..., :rotary_dim].to(wide), x[..., rotary_dim:]
    if interleaved:
        first, second = head[..., 0::2], head[..., 1::2]
    else:
        first, second = head.chunk(2, -1)
    pair = (first * cosine - second * sine, second * cosine + first * sine)
    head = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat((head.to(x.dtype), tail), -1)


def visible(
    level: torch.Tensor,
    frame_index: torch.Tensor,
    ring_index: torch.Tensor,
    reach: torch.Tensor | None,
    mask: str,
) -> torch.Tensor:
    """[S, F, R + F] bool: which frames each active frame of a stream sees."""
    if mask not in ("bidirectional", "noise_causal", "ranged"):
        raise ValueError(f"expected mask bidirectional, noise_causal or ranged but got {mask!r}")
    if (mask == "ranged") != (reach is not None):
        raise ValueError(f"expected reach exactly when mask is 'ranged' but mask is {mask!r}")
    index = torch.cat((ring_index, frame_index), 1)[:, None]  # [S, 1, R + F]
    seen = (index >= 0) & (frame_index >= 0)[:, :, None]  # [S, F, R + F]
    if reach is not None:
        distance = frame_index[:, :, None] - index
        seen = seen & (distance >= 0) & (distance < reach[:, :, None])
    if mask == "bidirectional":
        return seen
    cleaner = level[:, None, :] <= level[:, :, None]  # [S, F (query), F (key)]
    ring = torch.ones_like(cleaner[:, :, :1]).expand(-1, -1, ring_index.shape[1])
    return seen & torch.cat((ring, cleaner), -1)


def reference(
    qkv: torch.Tensor,
    level: torch.Tensor,
    frame_index: torch.Tensor,
    ring_key: torch.Tensor | None,
    ring_value: torch.Tensor | None,
    ring_index: torch.Tensor | None,
    q_gain: torch.Tensor | None = None,
    k_gain: torch.Tensor | None = None,
    reach: torch.Tensor | None = None,
    *,
    scope: str = "temporal",
    mask: str = "noise_causal",
    theta: float = 10000.0,
    rotary_dim: int = 0,
    interleaved: bool = True,
    epsilon: float = 1e-6,
    scale: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(out, key, value), differentiable; see the module's docstring. Works in any float dtype."""
    if scope not in ("temporal", "frame"):
        raise ValueError(f"expected scope temporal or frame but got {scope!r}")
    batch, frames, tokens, _, heads, head_dim = qkv.shape
    streams = frame_index.shape[0]
    if batch % streams:
        raise ValueError(f"expected a batch of branches * {streams} streams but got {batch}")
    if ring_key is None or ring_value is None or ring_index is None:
        ring_key = ring_value = qkv.new_zeros(batch, 0, tokens, heads, head_dim)
        ring_index = frame_index[:, :0]
    ring = ring_index.shape[1]
    query, key, value = qkv.unbind(3)  # [B, F, N, H, D] each
    query, key = rms_norm(query, q_gain, epsilon), rms_norm(key, k_gain, epsilon)

    index = torch.cat((ring_index, frame_index), 1)  # [S, R + F]
    base = torch.where(index >= 0, index, torch.iinfo(index.dtype).max).amin(1, keepdim=True)
    position = torch.where(index >= 0, index - base, 0).repeat(batch // streams, 1)  # [B, R + F]
    keys = rotate(torch.cat((ring_key, key), 1), position, theta, rotary_dim, bool(interleaved))
    values = torch.cat((ring_value, value), 1)  # [B, R + F, N, H, D]
    query = rotate(query, position[:, ring:], theta, rotary_dim, bool(interleaved))

    seen = visible(level, frame_index, ring_index, reach, mask)
    seen = seen.repeat(batch // streams, 1, 1)  # [B, F, R + F]
    if scope == "temporal":
        to_rows, seen = (0, 2, 3, 1, 4), seen[:, None, None]  # rows [B, N, H, F, D]
        query, keys, values = (x.permute(to_rows) for x in (query, keys, values))
    else:
        seen = seen[:, None, :, None, :, None].expand(-1, 1, -1, tokens, -1, tokens)
        seen = seen.reshape(batch, 1, frames * tokens, -1)
        # [B, H, F * N, D]
        query, keys, values = (x.flatten(1, 2).transpose(1, 2) for x in (query, keys, values))

    scores = query @ keys.transpose(-1, -2) * (scale or head_dim**-0.5)
    wide = scores.to(accumulator(scores.dtype))
    # A finite fill and a second masking: a row that sees nothing is exactly zero and has a gradient.
    weights = torch.softmax(wide.masked_fill(~seen, torch.finfo(wide.dtype).min), -1)
    out = weights.masked_fill(~seen, 0).to(values.dtype) @ values
    if scope == "temporal":
        out = out.permute(0, 3, 1, 2, 4)  # [B, F, N, H, D]
    else:
        out = out.transpose(1, 2).unflatten(1, (frames, tokens))
    return out.reshape(batch, frames, tokens, heads * head_dim), key, value


def frame_window_attention(
    qkv: torch.Tensor,
    level: torch.Tensor,
    frame_index: torch.Tensor,
    ring_key: torch.Tensor | None,
    ring_value: torch.Tensor | None,
    ring_index: torch.Tensor | None,
    q_gain: torch.Tensor | None = None,
    k_gain: torch.Tensor | None = None,
    reach: torch.Tensor | None = None,
    **attributes: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`reference`, or one opaque FrameWindowAttention node while `torch.onnx.export` is running."""
    window = (qkv, level, frame_index, ring_key, ring_value, ring_index)
    if not torch.onnx.is_in_onnx_export():
        return reference(*window, q_gain=q_gain, k_gain=k_gain, reach=reach, **attributes)
    inputs: list[torch.Tensor | None] = [*window, q_gain, k_gain, reach]
    while inputs[-1] is None:
        inputs.pop()
    batch, frames, tokens, _, heads, head_dim = qkv.shape
    values = {**ATTRIBUTES, **attributes}
    values["interleaved"] = int(values["interleaved"])
    kept = [batch, frames, tokens, heads, head_dim]
    out, key, value = torch.onnx.ops.symbolic_multi_out(
        f"{DOMAIN}::FrameWindowAttention",
        inputs,
        values,
        dtypes=[qkv.dtype] * 3,
        shapes=[[batch, frames, tokens, heads * head_dim], kept, kept],
        version=VERSION,
    )
    return out, key, value


def _onnx_function(attributes: Any, node_inputs: Sequence[str] | None = None, opset: int = 18) -> Any:
    return onnx_function({**ATTRIBUTES, **attributes}, node_inputs or (), opset)


SPEC = OpSpec(
    name="FrameWindowAttention",
    inputs=("qkv", "level", "frame_index"),
    optional_inputs=("ring_key", "ring_value", "ring_index", "q_gain", "k_gain", "reach"),
    working=("qkv", "ring_key", "ring_value"),
    outputs=("out", "key", "value"),
    attributes=ATTRIBUTES,
    reference=reference,
    entry=frame_window_attention,
    onnx_function=_onnx_function,
    cases=CASES,
    bench_cases=BENCH_CASES,
)
