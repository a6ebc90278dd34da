// FrameWindowAttention, what a kernel sees: raw pointers, sizes and the tables that op.cc prepares once per
// call.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/bfloat16.h"

namespace pyengine::ops {

constexpr int kLane = 16;  // tables are padded to this many floats; the widest vector is this wide

enum class Rotation { none, interleaved, halves };

struct FrameWindowAttentionParams {
  const void* qkv;        // [batch, frames, tokens, 3, heads, head_dim]
  void* const* ring_key;  // [batch] -> [ring, tokens, heads, head_dim], read, then appended to
  void* const* ring_value;
  void* out;  // [batch, frames, tokens, heads * head_dim]
  bool is_bfloat16;
  int64_t batch, streams, frames, tokens, heads, head_dim, ring;  // batch entry b is of stream b % streams

  int64_t padded_dim;  // head_dim rounded up to kLane
  bool normalise_query, normalise_key;
  float epsilon, inverse_dim;  // inverse_dim = 1 / head_dim
  const float*
      query_gain;  // [padded_dim] gain * score scale * log2(e): scores are exponents of 2; 0 in the padding
  const float* key_gain;                         // [padded_dim] gain or 1; 0 in the padding
  int64_t pair_stride;                           // pairs of lanes, padded to kLane
  const float *query_pair_gain, *key_pair_gain;  // [2, pair_stride] the same of even, then of odd lanes

  // A frame of a stream is named by its source: a ring slot r is r, active frame f is ring + f.
  Rotation rotation;
  int64_t rotary_dim;
  const float* const* rotary;  // [streams, ring + frames] -> [2, padded_dim]: cos, then sin with the sign of
                               // its lane; after them, where lanes are interleaved, [2, pair_stride] of pairs

  // Per stream, the frames that any query sees, ring first; absent frames and empty slots are not in the
  // list.
  int64_t key_stride;         // capacity of the lists, a multiple of 2 * kLane
  const int32_t* key_source;  // [streams, key_stride]
  const int32_t* key_count;   // [streams]
  const int32_t*
      key_end;        // [streams, frames] one past the last list entry that the frame sees; 0 = sees nothing
  const float* bias;  // [streams, frames, key_stride] 0 where visible, else -inf

  const int32_t* append_slot;  // [streams, frames] or null
};

// Temporal items are (batch, token) pairs; frame items are (batch, head, query frame) triples, which read the
// whole ring of their batch and head, so `append` runs over all (batch, frame) pairs after them. Temporal
// items append for themselves.
struct FrameWindowAttentionKernel {
  size_t (*temporal_scratch)(const FrameWindowAttentionParams& p);  // bytes, 64-byte aligned
  void (*temporal)(const FrameWindowAttentionParams& p, int64_t begin, int64_t end, void* scratch);
  size_t (*frame_scratch)(const FrameWindowAttentionParams& p);
  void (*frame)(const FrameWindowAttentionParams& p, int64_t begin, int64_t end, void* scratch);
  void (*append)(const FrameWindowAttentionParams& p, int64_t begin, int64_t end);
};

}  // namespace pyengine::ops
