"""The ONNX function body of FrameWindowAttention: what it means to a runtime that does not have our kernel.

Norms, angles and softmax are float32 and `out` is cast back, so the body serves float32, float16 and bfloat16
graphs. B, S, F, N and R may be symbolic. The body is written for one set of attributes and of optional inputs:
ONNX cannot branch on a string.

What a stream has of its own (angles, mask) is never repeated for its branches: the batch [branches * S, ...] is
seen as [branches, S, ...], or with the next axis merged as [branches, S * P, ...], and broadcast.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx
import onnx.parser

from .spec import DOMAIN, VERSION

INPUTS = ("qkv", "level", "frame_index", "ring_key", "ring_value", "ring_index", "q_gain", "k_gain", "reach")
OUTPUTS = ("out", "key", "value")
ABSENT = 2**62  # larger than any index

SPLIT = f"""
    i0 = Constant<value = int64 {{0}}>()
    i1 = Constant<value = int64 {{1}}>()
    i2 = Constant<value = int64 {{2}}>()
    query = Gather<axis = 3>(qkv, i0)
    key_in = Gather<axis = 3>(qkv, i1)
    value = Gather<axis = 3>(qkv, i2)
    query_wide = Cast<to = 1>(query)
    key_wide = Cast<to = 1>(key_in)
    value_wide = Cast<to = 1>(value)
    present = GreaterOrEqual(index, i0)
    absent = Constant<value = int64 {{{ABSENT}}}>()
    index_or_absent = Where(present, index, absent)
    ax0 = Constant<value = int64[1] {{0}}>()
    ax1 = Constant<value = int64[1] {{1}}>()
    ax2 = Constant<value = int64[1] {{2}}>()
    base = ReduceMin<keepdims = 1>(index_or_absent, ax1)
    end = Constant<value = int64[1] {{{2**31 - 1}}}>()
    rest = Constant<value = int64[1] {{-1}}>()
    streams = Shape<start = 0, end = 1>(frame_index)
    index_f = Unsqueeze(frame_index, ax2)
    index_k = Unsqueeze(index, ax1)
    present_f = GreaterOrEqual(index_f, i0)
    present_k = Unsqueeze(present, ax1)
    seen_present = And(present_f, present_k)
"""

# The frames that are visible: ring first, if there is one.
WITH_RING = """
    ring_key_wide = Cast<to = 1>(ring_key)
    ring_value_wide = Cast<to = 1>(ring_value)
    index = Concat<axis = 1>(ring_index, frame_index)
    ring_shape = Shape<start = 1>(ring_index)
"""
WITHOUT_RING = """
    index = Identity(frame_index)
    ring_shape = Constant<value = int64[1] {0}>()
"""


def _norm(name: str, gain: str | None, epsilon: float) -> str:
    """{name}_wide -> {name}_normal, RMS-normalised over the last axis if there is a gain."""
    if gain is None:
        return f"{name}_normal = Identity({name}_wide)"
    return f"""
    {name}_square = Mul({name}_wide, {name}_wide)
    {name}_axis = Constant<value = int64[1] {{-1}}>()
    {name}_mean = ReduceMean<keepdims = 1>({name}_square, {name}_axis)
    {name}_epsilon = Constant<value = float {{{epsilon!r}}}>()
    {name}_shifted = Add({name}_mean, {name}_epsilon)
    {name}_root = Sqrt({name}_shifted)
    {name}_unit = Div({name}_wide, {name}_root)
    {name}_gain = Cast<to = 1>({gain})
    {name}_normal = Mul({name}_unit, {name}_gain)
    """


def _angles(theta: float, rotary_dim: int) -> str:
    """cosine, sine [S * P, 1, 1, rotary_dim / 2] of all frames of each stream, and the part of the active ones."""
    frequency = [theta ** (-2 * i / rotary_dim) for i in range(rotary_dim // 2)]
    values = ", ".join(repr(value) for value in frequency)
    return f"""
    offset = Sub(index, base)
    position_i = Where(present, offset, i0)
    position = Cast<to = 1>(position_i)
    position_column = Unsqueeze(position, ax2)
    frequency = Constant<value = float[{len(frequency)}] {{{values}}}>()
    angle = Mul(position_column, frequency)
    cosine = Cos(angle)
    sine = Sin(angle)
    cosine_active = Slice(cosine, ring_shape, end, ax1)
    sine_active = Slice(sine, ring_shape, end, ax1)
    angle_shape = Constant<value = int64[4] {{-1, 1, 1, {len(frequency)}}}>()
    cosine_k = Reshape(cosine, angle_shape)
    sine_k = Reshape(sine, angle_shape)
    cosine_q = Reshape(cosine_active, angle_shape)
    sine_q = Reshape(sine_active, angle_shape)
    """


def _rotate(name: str, which: str, rotary_dim: int, interleaved: bool) -> str:
    """{name}_all [B, P, N, H, D] -> {name}_rotated, by cosine_{which} and sine_{which}."""
    if interleaved:
        first, second, step = (0, rotary_dim), (1, rotary_dim), 2
    else:
        first, second, step = (0, rotary_dim // 2), (rotary_dim // 2, rotary_dim), 1
    text = f"""
    {name}_whole = Shape({name}_all)
    {name}_frames = Shape<start = 1, end = 2>({name}_all)
    {name}_inner = Shape<start = 2>({name}_all)
    {name}_rows = Mul(streams, {name}_frames)
    {name}_merged = Concat<axis = 0>(rest, {name}_rows, {name}_inner)
    {name}_streams = Reshape({name}_all, {name}_merged)
    {name}_last = Constant<value = int64[1] {{-1}}>()
    {name}_step = Constant<value = int64[1] {{{step}}}>()
    {name}_a0 = Constant<value = int64[1] {{{first[0]}}}>()
    {name}_a1 = Constant<value = int64[1] {{{first[1]}}}>()
    {name}_b0 = Constant<value = int64[1] {{{second[0]}}}>()
    {name}_b1 = Constant<value = int64[1] {{{second[1]}}}>()
    {name}_a = Slice({name}_streams, {name}_a0, {name}_a1, {name}_last, {name}_step)
    {name}_b = Slice({name}_streams, {name}_b0, {name}_b1, {name}_last, {name}_step)
    {name}_ac = Mul({name}_a, cosine_{which})
    {name}_bs = Mul({name}_b, sine_{which})
    {name}_bc = Mul({name}_b, cosine_{which})
    {name}_as = Mul({name}_a, sine_{which})
    {name}_y = Sub({name}_ac, {name}_bs)
    {name}_z = Add({name}_bc, {name}_as)
    {name}_t0 = Constant<value = int64[1] {{{rotary_dim}}}>()
    {name}_tail = Slice({name}_streams, {name}_t0, end, {name}_last)
    """
    if not interleaved:
        joined = f"{name}_turned = Concat<axis = -1>({name}_y, {name}_z, {name}_tail)"
    else:
        joined = f"""
    {name}_y1 = Unsqueeze({name}_y, {name}_last)
    {name}_z1 = Unsqueeze({name}_z, {name}_last)
    {name}_pairs = Concat<axis = -1>({name}_y1, {name}_z1)
    {name}_flat = Constant<value = int64[5] {{0, 0, 0, 0, {rotary_dim}}}>()
    {name}_head = Reshape({name}_pairs, {name}_flat)
    {name}_turned = Concat<axis = -1>({name}_head, {name}_tail)
    """
    return f"{text}{joined}\n    {name}_rotated = Reshape({name}_turned, {name}_whole)"


def _seen(mask: str, has_ring: bool) -> str:
    """seen [S, F, R + F] bool."""
    ranged = """
    distance = Sub(index_f, index_k)
    not_later = GreaterOrEqual(distance, i0)
    reach_f = Unsqueeze(reach, ax2)
    within = Less(distance, reach_f)
    in_range = And(not_later, within)
    seen_in_range = And(seen_present, in_range)
    """
    # Ring slots count as cleaner than clean: only their index decides.
    ring_levels = """
    slots = Shape(ring_index)
    ring_level = ConstantOfShape<value = float[1] {-1.0}>(slots)
    level_k2 = Concat<axis = 1>(ring_level, level)
    """
    causal = (
        (ring_levels if has_ring else "level_k2 = Identity(level)")
        + """
    level_k = Unsqueeze(level_k2, ax1)
    level_f = Unsqueeze(level, ax2)
    cleaner = LessOrEqual(level_k, level_f)
    """
    )
    if mask == "bidirectional":
        return "seen = Identity(seen_present)"
    if mask == "noise_causal":
        return causal + "seen = And(cleaner, seen_present)"
    if mask == "ranged":
        return ranged + causal + "seen = And(cleaner, seen_in_range)"
    raise ValueError(f"expected mask bidirectional, noise_causal or ranged but got {mask!r}")


ROWS_TEMPORAL = """
    q_rows = Transpose<perm = [0, 2, 3, 1, 4]>(query_rotated)
    k_rows = Transpose<perm = [0, 2, 3, 4, 1]>(key_rotated)
    v_rows = Transpose<perm = [0, 2, 3, 1, 4]>(value_all)
    seen_rows = Unsqueeze(seen, ax1)
"""
OUT_TEMPORAL = "out_frames = Transpose<perm = [0, 3, 1, 2, 4]>(attended)"

ROWS_FRAME = """
    flat = Constant<value = int64[4] {0, 0, -1, 0}>()
    flat_last = Constant<value = int64[4] {0, 0, 0, -1}>()
    q_frames = Transpose<perm = [0, 3, 1, 2, 4]>(query_rotated)
    k_frames = Transpose<perm = [0, 3, 4, 1, 2]>(key_rotated)
    v_frames = Transpose<perm = [0, 3, 1, 2, 4]>(value_all)
    query_shape = Shape(query_rotated)
    B = Gather(query_shape, ax0)
    F = Gather(query_shape, ax1)
    N = Gather(query_shape, ax2)
    P = Shape<start = 1>(index)
    H_at = Constant<value = int64[1] {3}>()
    D_at = Constant<value = int64[1] {4}>()
    H = Gather(query_shape, H_at)
    D = Gather(query_shape, D_at)
    FN = Mul(F, N)
    PN = Mul(P, N)
    q_shape = Concat<axis = 0>(B, H, FN, D)
    k_shape = Concat<axis = 0>(B, H, D, PN)
    v_shape = Concat<axis = 0>(B, H, PN, D)
    q_rows = Reshape(q_frames, q_shape)
    k_rows = Reshape(k_frames, k_shape)
    v_rows = Reshape(v_frames, v_shape)
    ax24 = Constant<value = int64[2] {2, 4}>()
    seen_5 = Unsqueeze(seen, ax24)
    seen_full = Concat<axis = 0>(streams, F, N, P, N)
    seen_tokens = Expand(seen_5, seen_full)
    seen_shape = Concat<axis = 0>(streams, ax1, FN, PN)
    seen_rows = Reshape(seen_tokens, seen_shape)
"""
OUT_FRAME = """
    split_shape = Concat<axis = 0>(B, H, F, N, D)
    split = Reshape(attended, split_shape)
    out_frames = Transpose<perm = [0, 2, 3, 1, 4]>(split)
"""


def onnx_function(
    attributes: Mapping[str, Any], node_inputs: Sequence[str], opset: int
) -> onnx.FunctionProto:
    """The body for these attributes (all of them) and for the optional inputs that `node_inputs` names."""
    given = {name for name, value in zip(INPUTS, node_inputs, strict=False) if value}
    rotary_dim, scope = int(attributes["rotary_dim"]), attributes["scope"]
    if scope not in ("temporal", "frame"):
        raise ValueError(f"expected scope temporal or frame but got {scope!r}")
    interleaved = bool(attributes["interleaved"])
    epsilon = float(attributes["epsilon"])
    has_ring = "ring_index" in given
    parts = [
        WITH_RING if has_ring else WITHOUT_RING,
        SPLIT,
        _norm("query", "q_gain" if "q_gain" in given else None, epsilon),
        _norm("key", "k_gain" if "k_gain" in given else None, epsilon),
        "key = CastLike(key_normal, qkv)",
        "query_all = Identity(query_normal)",
        "key_all = Concat<axis = 1>(ring_key_wide, key_normal)"
        if has_ring
        else "key_all = Identity(key_normal)",
        "value_all = Concat<axis = 1>(ring_value_wide, value_wide)"
        if has_ring
        else "value_all = Identity(value_wide)",
    ]
    if rotary_dim:
        parts += [_angles(float(attributes["theta"]), rotary_dim)]
        parts += [
            _rotate("query", "q", rotary_dim, interleaved),
            _rotate("key", "k", rotary_dim, interleaved),
        ]
    else:
        parts += ["query_rotated = Identity(query_all)", "key_rotated = Identity(key_all)"]
    parts += [_seen(attributes["mask"], has_ring), ROWS_TEMPORAL if scope == "temporal" else ROWS_FRAME]
    scale = float(attributes["scale"])
    if scale:
        parts += [f"scale = Constant<value = float {{{scale!r}}}>()"]
    else:
        parts += [
            "head_dim_i = Shape<start = -1>(qkv)",
            "head_dim = Cast<to = 1>(head_dim_i)",
            "head_root = Sqrt(head_dim)",
            "scale = Reciprocal(head_root)",
        ]
    # A finite fill and a second masking: a row that sees nothing is exactly zero, not NaN.
    parts += [
        "q_scaled = Mul(q_rows, scale)",
        "scores_batch = MatMul(q_scaled, k_rows)",  # [B, N, H, F, R + F] or [B, H, F * N, (R + F) * N]
        "batch_shape = Shape(scores_batch)",
        "inner_shape = Shape<start = 1, end = -2>(scores_batch)",
        "inner = ReduceProd<keepdims = 1>(inner_shape)",
        "pair_shape = Shape<start = -2>(scores_batch)",
        "stream_shape = Concat<axis = 0>(rest, streams, inner, pair_shape)",
        "scores = Reshape(scores_batch, stream_shape)",  # [branches, S, inner, queries, keys]
        "lowest = Constant<value = float {-3e38}>()",
        "scores_seen = Where(seen_rows, scores, lowest)",
        "weights = Softmax<axis = -1>(scores_seen)",
        "zero = Constant<value = float {0.0}>()",
        "weights_seen = Where(seen_rows, weights, zero)",
        "weights_batch = Reshape(weights_seen, batch_shape)",
        "attended = MatMul(weights_batch, v_rows)",
        OUT_TEMPORAL if scope == "temporal" else OUT_FRAME,
        "out_shape = Constant<value = int64[4] {0, 0, 0, -1}>()",
        "out_wide = Reshape(out_frames, out_shape)",
        "out = CastLike(out_wide, qkv)",
    ]
    body = "\n".join(parts)
    header = f'<opset_import: ["" : {opset}, "{DOMAIN}" : {VERSION}], domain: "{DOMAIN}">'
    declared = ", ".join(sorted(attributes))
    signature = f"FrameWindowAttention <{declared}> ({', '.join(INPUTS)}) => ({', '.join(OUTPUTS)})"
    return onnx.parser.parse_function(f"{header}\n{signature} {{\n{body}\n}}")
