// FrameWindowAttention: F active frames attend to [ring | active] keys, per-frame noise levels decide who
// sees whom. export/ops/frame_window_attention.py says what it means in torch and in ONNX; this is the cut
// form, which reads the ring in place and afterwards appends to it.
#pragma once

#include "core/index.h"

namespace pyengine::ops {

enum class Scope { temporal, frame };  // the same place in other frames, or all tokens of the visible frames
enum class Mask { bidirectional, noise_causal, ranged };

struct FrameWindowAttention {
  // Batch entry b = branches * streams belongs to stream b % streams; frame_index says how many there are.
  Tensor qkv;          // [batch, frames, tokens, 3, heads, head_dim] float32 or bfloat16
  Tensor level;        // [streams, frames] float32, 0 = clean
  Tensor frame_index;  // [streams, frames] int64 or int32; -1 = absent: no key, and its out row is zero
  Rings ring_key,
      ring_value;     // [branches, ring, tokens, heads, head_dim] each, dtype of qkv; keys normalised, not
                      // rotated; all three absent: no ring
  Tensor ring_index;  // [streams, ring] int64 or int32; -1 = empty
  Tensor out;         // [batch, frames, tokens, heads * head_dim], dtype of qkv, written
  Tensor
      append_slot;  // [streams, frames] or absent: the slot that a frame's key and value go to, -1 = nowhere
  Tensor q_gain, k_gain;  // [head_dim] float32 or absent: RMS-normalise, then multiply
  Tensor reach;  // [streams, frames], Mask::ranged only: frame i sees indices (index_i - reach_i, index_i]
  Tensor ring_key_scale, ring_value_scale;  // [heads] float32, with a ring of float8_e4m3 (devices only)
  Tensor workspace;  // scratch, or absent (devices only): see frame_window_attention_workspace
  Scope scope = Scope::temporal;
  Mask mask = Mask::noise_causal;
  double theta = 10000;     // base of the rotary embedding
  int64_t rotary_dim = 0;   // even, <= head_dim; 0 = none
  bool interleaved = true;  // pairs (0,1), (2,3), ...; else (0, rotary_dim / 2), ...
  double epsilon = 1e-6;    // of the RMS norm
  double scale = 0;         // of the scores; 0 = head_dim ^ -0.5
};

void frame_window_attention(const FrameWindowAttention& op);  // throws std::invalid_argument

}  // namespace pyengine::ops
