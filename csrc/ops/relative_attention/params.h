// RelativeAttention, what a kernel sees: raw pointers, sizes, and tables that op.cc expands once per call.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/bfloat16.h"

namespace pyengine::ops {

constexpr int kRelativeLane = 16;  // rows are padded to this many floats; the widest vector is this wide

struct RelativeAttentionParams {
  const void* qkv;  // [batch, frames, places, 3, heads, head_dim]
  void* out;        // [batch, frames, places, heads * head_dim]
  bool is_bfloat16, transposed;
  int64_t batch, frames, places, heads, head_dim;
  int64_t padded_frames, padded_dim;  // rounded up to kRelativeLane
  float query_scale;                  // log2(e) / sqrt(head_dim): scores are exponents of 2

  // Column c stands for the distance c - (frames - 1), so what frame i needs for all j is a contiguous slice
  // from column frames - 1 - i. Null without tables.
  int64_t key_columns;  // frames - 1 + padded_frames
  const float* keys;  // [head_dim, key_columns]; transposed: of the opposite distance, times D^(-1/4) log2(e)
  const float* values;  // [2 * frames - 1, padded_dim]
};

// Items are (batch, place) pairs.
struct RelativeAttentionKernel {
  size_t (*scratch)(const RelativeAttentionParams& p);  // bytes, 64-byte aligned
  void (*run)(const RelativeAttentionParams& p, int64_t begin, int64_t end, void* scratch);
};

}  // namespace pyengine::ops
