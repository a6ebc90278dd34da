// RelativeAttention: the frames of a clip attend to each other at each place, with learned vectors for
// clipped distances. export/ops/relative_attention.py says what it means in torch and in ONNX.
#pragma once

#include "core/tensor.h"

namespace pyengine::ops {

struct RelativeAttention {
  Tensor qkv;  // [batch, frames, places, 3, heads, head_dim] float32 or bfloat16; on a device also float16
  Tensor key_table;         // [2 * reach + 1, head_dim] float32, or absent together with value_table
  Tensor value_table;       // likewise
  Tensor out;               // [batch, frames, places, heads * head_dim], dtype of qkv, written
  bool transposed = false;  // the relative-key term as LVDM was trained, not the textbook's
};

void relative_attention(const RelativeAttention& op);  // throws std::invalid_argument

}  // namespace pyengine::ops
