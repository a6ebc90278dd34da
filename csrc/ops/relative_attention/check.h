// What RelativeAttention expects of its tensors, on any device.
#pragma once

#include "core/dtype.h"
#include "ops/relative_attention/op.h"

namespace pyengine::ops {

inline void check_op(const RelativeAttention& op, Place place) {
  constexpr Expect expect{"relative_attention"};
  const Tensor& qkv = op.qkv;
  check(qkv.rank == 6 && qkv.shape[3] == 3,
        "[relative_attention] expected qkv [batch, frames, places, 3, heads, head_dim] but got ", qkv);
  check_float("relative_attention", "qkv", qkv, place);
  expect.layout("qkv", qkv);
  check(qkv.size() > 0, "[relative_attention] expected qkv with values but got ", qkv);
  const int64_t heads = qkv.shape[4], dim = qkv.shape[5];
  expect.output("out", op.out, qkv.dtype, {qkv.shape[0], qkv.shape[1], qkv.shape[2], heads * dim});
  check(static_cast<bool>(op.key_table) == static_cast<bool>(op.value_table),
        "[relative_attention] expected key_table and value_table or neither but got one");
  if (!op.key_table) return;
  const int64_t rows = op.key_table.shape[0];
  check(op.key_table.rank == 2 && rows % 2 == 1,
        "[relative_attention] expected key_table [2 * reach + 1, head_dim] but got ", op.key_table);
  expect.input("key_table", op.key_table, DType::float32, {rows, dim});
  expect.input("value_table", op.value_table, DType::float32, {rows, dim});
}

}  // namespace pyengine::ops
