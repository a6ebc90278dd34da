// FrameWindowAttention, what a CUDA kernel sees. Unlike params.h of the CPU it holds no tables made from
// indices and levels: those are on the device and may change between replays of a graph, so kernels read
// them.
#pragma once

#include "core/cuda/index.h"
#include "ops/frame_window_attention/op.h"
#include "ops/frame_window_attention/params.h"

namespace pyengine::ops::cuda {

using pyengine::cuda::Indices;

constexpr int kMaxPairs = 128;  // rotated pairs of the largest head

struct AttentionParams {
  const void* qkv;  // [batch, frames, tokens, 3, heads, head_dim]
  void *ring_key,
      *ring_value;  // of one stream: [branches, ring, tokens, heads, head_dim], read, then appended to
  void *const *key_table, *const
                              *value_table;  // [streams] such addresses, read when the kernel runs; or null
  void* out;                                 // [batch, frames, tokens, heads, head_dim]
  const float* level;                        // [streams, frames]
  Indices frame_index, ring_index;           // [streams, frames], [streams, ring]
  Indices reach, append_slot;                // [streams, frames] or null
  const float *q_gain, *k_gain;              // [head_dim] or null
  const float *key_scale, *value_scale;      // [heads], of a ring of float8_e4m3, else null
  float* partial;                            // workspace of split keys, or null
  int batch, streams, frames, tokens, heads, head_dim, ring;
  Mask mask;
  Rotation rotation;
  int rotary_dim;
  float epsilon, inverse_dim;
  float score_scale;              // with log2(e): scores are exponents of 2
  int splits;                     // blocks that share the keys of a query
  int stages, sequences, team;    // scope temporal: see TemporalPlan
  uint64_t frequency[kMaxPairs];  // turns per frame of each rotated pair, 2^64 = one turn
};

}  // namespace pyengine::ops::cuda
