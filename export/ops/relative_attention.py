"""RelativeAttention: the frames of a clip attend to each other at each place, with learned vectors for clipped distances.

    qkv          [B, T, N, 3, H, D]   batch, frames, places, heads, head size
    key_table    [2 L + 1, D]         optional, with value_table: the vector of distance n is row clip(n, -L, L) + L
    value_table  [2 L + 1, D]
 -> out          [B, T, N, H * D]

Every frame sees every frame. The score of frame i on frame j is q_i . k_j / sqrt(D) plus, with Rk = key_table:
    transposed 0   q_i . Rk[j - i] / sqrt(D)       Shaw et al. 2018, arXiv:1803.02155
    transposed 1   q_j . Rk[i - j] * D^(-1/4)      as LVDM's unconditional models were trained; the softmax is over j all the same
and out_i = sum_j weight_ij (v_j + value_table[j - i]). No mask, no ring, no state: other than FrameWindowAttention, whose window has
noise levels and rotary positions and no use for tables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
import onnx.parser
import torch
from torch import Tensor

from .frame_window_attention import accumulator
from .spec import DOMAIN, VERSION, OpSpec

ATTRIBUTES: dict[str, Any] = {"transposed": 0}


@dataclass(frozen=True)
class RelativeCase:
    """Sizes of one case; `reach` None leaves the tables out."""

    name: str
    batch: int = 1
    frames: int = 4
    places: int = 3
    heads: int = 2
    head_dim: int = 16
    reach: int | None = 4
    transposed: bool = False

    @property
    def attributes(self) -> dict[str, Any]:
        return {"transposed": int(self.transposed)}

    @property
    def operations(self) -> float:
        """Of scores and sums, those of the tables included."""
        pairs = self.batch * self.places * self.heads * self.frames**2
        return pairs * self.head_dim * (4.0 if self.reach is None else 7.0)

    def __str__(self) -> str:
        return self.name

    def make_inputs(self, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor | None]:
        """Inputs by name, of bfloat16 values, so that every dtype starts from the same numbers."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).bfloat16().to(dtype)

        qkv = normal(self.batch, self.frames, self.places, 3, self.heads, self.head_dim)
        if self.reach is None:
            return {"qkv": qkv, "key_table": None, "value_table": None}
        rows = (2 * self.reach + 1, self.head_dim)
        return {"qkv": qkv, "key_table": normal(*rows), "value_table": normal(*rows)}


CASES = (
    RelativeCase("short"),
    RelativeCase("short_transposed", transposed=True),
    RelativeCase("one_frame", frames=1, transposed=True),
    RelativeCase("one_place_one_head", places=1, heads=1),
    RelativeCase("clipped", frames=7, reach=2),
    RelativeCase("clipped_transposed", frames=7, reach=2, transposed=True),
    RelativeCase("far_reach", frames=3, reach=16, transposed=True),
    RelativeCase("odd_head", head_dim=5, batch=2, heads=3),
    RelativeCase("head_40", head_dim=40, frames=16, reach=16, places=5, heads=8),
    RelativeCase("head_72_transposed", head_dim=72, frames=5, reach=5, batch=2, transposed=True),
    RelativeCase("no_tables", reach=None, frames=5),
    RelativeCase("many_places", places=67, head_dim=24, transposed=True),
)
BENCH_CASES = (
    RelativeCase("sky_16x16", frames=4, places=256, heads=4, head_dim=128, transposed=True),
    RelativeCase("sky_4x4", frames=4, places=16, heads=4, head_dim=256, transposed=True),
    RelativeCase(
        "interp_8x8_batch8", batch=8, frames=5, places=64, heads=4, head_dim=192, reach=5, transposed=True
    ),
    RelativeCase("t2v_32x32", frames=16, places=1024, heads=8, head_dim=40, reach=16),
    RelativeCase("t2v_8x8", frames=16, places=64, heads=8, head_dim=160, reach=16),
)


def distances(frames: int, reach: int) -> list[list[int]]:
    """Row of a table for the distance from frame i (row) to frame j (column)."""
    return [[min(max(j - i, -reach), reach) + reach for j in range(frames)] for i in range(frames)]


def reference(
    qkv: Tensor,
    key_table: Tensor | None = None,
    value_table: Tensor | None = None,
    *,
    transposed: bool = False,
) -> tuple[Tensor]:
    """(out,), differentiable; see the module's docstring. Works in any float dtype."""
    if (key_table is None) != (value_table is None):
        raise ValueError("[relative_attention] expected both tables or none but got one")
    batch, frames, places, _, heads, head_dim = qkv.shape
    q, k, v = (part.permute(0, 2, 3, 1, 4) for part in qkv.unbind(3))  # [B, N, H, T, D]
    scores = q @ k.transpose(-1, -2) * head_dim**-0.5
    if key_table is not None and value_table is not None:
        rows = torch.tensor(distances(frames, key_table.shape[0] // 2), device=qkv.device)
        # At (i, d) the product of query i with the vector of the distance to frame d.
        relative = torch.einsum("bnhid,ijd->bnhij", q, key_table[rows])
        scores = scores + (relative.mT * head_dim**-0.25 if transposed else relative * head_dim**-0.5)
    weights = torch.softmax(scores.to(accumulator(qkv.dtype)), -1).to(qkv.dtype)
    out = weights @ v
    if key_table is not None and value_table is not None:
        out = out + torch.einsum("bnhij,ijd->bnhid", weights, value_table[rows])
    return (out.permute(0, 3, 1, 2, 4).reshape(batch, frames, places, heads * head_dim),)


def relative_attention(
    qkv: Tensor,
    key_table: Tensor | None = None,
    value_table: Tensor | None = None,
    *,
    transposed: bool = False,
) -> Tensor:
    """`reference`, or one opaque RelativeAttention node while `torch.onnx.export` is running."""
    if not torch.onnx.is_in_onnx_export():
        return reference(qkv, key_table, value_table, transposed=transposed)[0]
    inputs = [qkv] if key_table is None or value_table is None else [qkv, key_table, value_table]
    batch, frames, places, _, heads, head_dim = qkv.shape
    (out,) = torch.onnx.ops.symbolic_multi_out(
        f"{DOMAIN}::RelativeAttention",
        inputs,
        {"transposed": int(transposed)},
        dtypes=[qkv.dtype],
        shapes=[[batch, frames, places, heads * head_dim]],
        version=VERSION,
    )
    return out


# The relative terms are products of row i with a matrix of its own, so frames come first: one batched product each.
_SPLIT = """
    i0 = Constant<value = int64 {0}>()
    i1 = Constant<value = int64 {1}>()
    i2 = Constant<value = int64 {2}>()
    ax0 = Constant<value = int64[1] {0}>()
    ax1 = Constant<value = int64[1] {1}>()
    wide = Cast<to = 1>(qkv)
    q = Gather<axis = 3>(wide, i0)
    k = Gather<axis = 3>(wide, i1)
    v = Gather<axis = 3>(wide, i2)
    q_rows = Transpose<perm = [0, 2, 3, 1, 4]>(q)
    k_rows = Transpose<perm = [0, 2, 3, 4, 1]>(k)
    v_rows = Transpose<perm = [0, 2, 3, 1, 4]>(v)
    size_i = Shape<start = -1>(qkv)
    size = Cast<to = 1>(size_i)
    root = Sqrt(size)
    scale = Reciprocal(root)
    q_scaled = Mul(q_rows, scale)
    content = MatMul(q_scaled, k_rows)
"""
_TABLES = """
    frames_1 = Shape<start = 1, end = 2>(qkv)
    frames_0 = Squeeze(frames_1, ax0)
    place = Range(i0, frames_0, i1)
    row = Unsqueeze(place, ax1)
    column = Unsqueeze(place, ax0)
    distance = Sub(column, row)
    rows_1 = Shape<start = 0, end = 1>(key_table)
    two = Constant<value = int64[1] {2}>()
    reach = Div(rows_1, two)
    lowest = Neg(reach)
    not_low = Max(distance, lowest)
    clipped = Min(not_low, reach)
    index = Add(clipped, reach)
    key_wide = Cast<to = 1>(key_table)
    value_wide = Cast<to = 1>(value_table)
    keys_of = Gather<axis = 0>(key_wide, index)
    values_of = Gather<axis = 0>(value_wide, index)
    keys_t = Transpose<perm = [0, 2, 1]>(keys_of)
    q_first = Transpose<perm = [1, 0, 2, 3, 4]>(q)
    first_shape = Shape(q_first)
    minus_one = Constant<value = int64[1] {-1}>()
    flat_shape = Concat<axis = 0>(frames_1, minus_one, size_i)
    q_flat = Reshape(q_first, flat_shape)
    by_distance_flat = MatMul(q_flat, keys_t)
    score_shape_head = Shape<start = 0, end = 4>(q_first)
    score_shape = Concat<axis = 0>(score_shape_head, frames_1)
    by_distance = Reshape(by_distance_flat, score_shape)
"""
# by_distance [i, B, N, H, j] is q_i . Rk[j - i]; transposed, it is read as the score of j on i.
_TEXTBOOK = """
    relative = Transpose<perm = [1, 2, 3, 0, 4]>(by_distance)
    relative_scaled = Mul(relative, scale)
"""
_TRANSPOSED = """
    relative = Transpose<perm = [1, 2, 3, 4, 0]>(by_distance)
    sigma = Sqrt(scale)
    relative_scaled = Mul(relative, sigma)
"""
_RELATIVE_VALUES = """
    scores = Add(content, relative_scaled)
    weights = Softmax<axis = -1>(scores)
    plain = MatMul(weights, v_rows)
    weights_first = Transpose<perm = [3, 0, 1, 2, 4]>(weights)
    weights_shape = Concat<axis = 0>(frames_1, minus_one, frames_1)
    weights_flat = Reshape(weights_first, weights_shape)
    by_value_flat = MatMul(weights_flat, values_of)
    by_value = Reshape(by_value_flat, first_shape)
    from_table = Transpose<perm = [1, 2, 3, 0, 4]>(by_value)
    attended = Add(plain, from_table)
"""


def _onnx_function(
    attributes: Mapping[str, Any], node_inputs: Sequence[str] | None = None, opset: int = 18
) -> onnx.FunctionProto:
    transposed = bool({**ATTRIBUTES, **attributes}["transposed"])
    given = [name for name in (node_inputs or ("qkv",)) if name]
    text = _SPLIT
    if len(given) == 1:
        text += """
    weights = Softmax<axis = -1>(content)
    attended = MatMul(weights, v_rows)
    """
    else:
        text += _TABLES + (_TRANSPOSED if transposed else _TEXTBOOK) + _RELATIVE_VALUES
    text += """
    out_frames = Transpose<perm = [0, 3, 1, 2, 4]>(attended)
    out_shape = Constant<value = int64[4] {0, 0, 0, -1}>()
    out_wide = Reshape(out_frames, out_shape)
    out = CastLike(out_wide, qkv)
    """
    header = f'<opset_import: ["" : {opset}, "{DOMAIN}" : {VERSION}], domain: "{DOMAIN}">'
    signature = "RelativeAttention <transposed> (qkv, key_table, value_table) => (out)"
    return onnx.parser.parse_function(f"{header}\n{signature} {{\n{text}\n}}")


SPEC = OpSpec(
    name="RelativeAttention",
    inputs=("qkv",),
    optional_inputs=("key_table", "value_table"),
    working=("qkv",),
    outputs=("out",),
    attributes=ATTRIBUTES,
    reference=reference,
    entry=relative_attention,
    onnx_function=_onnx_function,
    cases=CASES,
    bench_cases=BENCH_CASES,
)
