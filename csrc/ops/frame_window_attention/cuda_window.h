// Where rows are, who sees whom, and rotary angles, for every CUDA kernel of the op.
#pragma once

#include "core/cuda/warp.h"
#include "ops/frame_window_attention/cuda_params.h"

namespace pyengine::ops::cuda {

using namespace pyengine::cuda;

enum Part { kQuery, kKey, kValue };

// The stream of a batch entry; streams see nothing of each other.
PYENGINE_DEVICE int stream_of(const AttentionParams& p, int b) {
  return b % p.streams;
}

// A frame of a stream is named by its source: ring slot r is r, active frame f is ring + f.
PYENGINE_DEVICE int64_t index_of(const AttentionParams& p, int stream, int source) {
  return source < p.ring ? p.ring_index[stream * p.ring + source]
                         : p.frame_index[stream * p.frames + source - p.ring];
}

// Whether active frame `i` sees `source`, given their indices.
PYENGINE_DEVICE bool sees(const AttentionParams& p, int stream, int i, int source, int64_t index_i,
                          int64_t index_s) {
  if (index_i < 0 || index_s < 0) return false;
  if (p.mask != Mask::bidirectional && source >= p.ring) {
    const float* level = p.level + stream * p.frames;
    if (!(level[source - p.ring] <= level[i])) return false;
  }
  if (p.mask != Mask::ranged) return true;
  const int64_t distance = index_i - index_s;
  return distance >= 0 && distance < p.reach[stream * p.frames + i];
}
PYENGINE_DEVICE bool sees(const AttentionParams& p, int stream, int i, int source) {
  return sees(p, stream, i, source, index_of(p, stream, p.ring + i), index_of(p, stream, source));
}

template <class T>
PYENGINE_DEVICE const T* active_row(const AttentionParams& p, int b, int f, int n, Part part, int h) {
  const int64_t row = ((static_cast<int64_t>(b) * p.frames + f) * p.tokens + n) * 3 + part;
  return static_cast<const T*>(p.qkv) + (row * p.heads + h) * p.head_dim;
}
// The ring of the stream of b, keys or values, and a row of it in values of whatever it holds.
PYENGINE_DEVICE void* ring_of(const AttentionParams& p, int b, Part part) {
  void* const* table = part == kKey ? p.key_table : p.value_table;
  return table ? table[stream_of(p, b)] : part == kKey ? p.ring_key : p.ring_value;
}
PYENGINE_DEVICE int64_t slot_offset(const AttentionParams& p, int b, int r, int n, int h) {
  const int64_t branch = b / p.streams;
  return (((branch * p.ring + r) * p.tokens + n) * p.heads + h) * p.head_dim;
}
template <class T>
PYENGINE_DEVICE T* out_row(const AttentionParams& p, int b, int f, int n, int h) {
  return static_cast<T*>(p.out) +
         (((static_cast<int64_t>(b) * p.frames + f) * p.tokens + n) * p.heads + h) * p.head_dim;
}

// Cosine and sine of pair k at a position. The phase is an integer that wraps where a turn is full, so it is
// as exact at frame 10^9 as at frame 1, and only its last step is done in floats.
PYENGINE_DEVICE Pair cosine_sine(const AttentionParams& p, int64_t position, int k) {
  const uint64_t phase = static_cast<uint64_t>(position) * p.frequency[k];
  const float half_turns = static_cast<float>(static_cast<int32_t>(phase >> 32)) * 0x1p-31f;
  Pair y;
  sine_cosine_pi(half_turns, &y.y, &y.x);
  return y;
}

// The pair that value d of a row belongs to, and whether it is the second of it; d < rotary_dim.
PYENGINE_DEVICE int pair_of(const AttentionParams& p, int d, bool* second) {
  const int half = p.rotary_dim / 2;
  *second = p.rotation == Rotation::interleaved ? d % 2 : d >= half;
  if (p.rotation == Rotation::interleaved) return d / 2;
  return d < half ? d : d - half;
}
PYENGINE_DEVICE int partner_of(const AttentionParams& p, int d) {
  const int half = p.rotary_dim / 2;
  return p.rotation == Rotation::interleaved ? (d ^ 1) : d < half ? d + half : d - half;
}

// One warp writes the key, normalised and not rotated, and the value of an active frame into a ring slot.
template <class T, class R>
PYENGINE_DEVICE void append_row(const AttentionParams& p, int b, int f, int n, int h, int slot) {
  const T *key = active_row<T>(p, b, f, n, kKey, h), *value = active_row<T>(p, b, f, n, kValue, h);
  R* ring_key = static_cast<R*>(ring_of(p, b, kKey)) + slot_offset(p, b, slot, n, h);
  R* ring_value = static_cast<R*>(ring_of(p, b, kValue)) + slot_offset(p, b, slot, n, h);
  float norm = 1;
  if (p.k_gain) {
    float squares = 0;
    for (int d = lane_index(); d < p.head_dim; d += kWarp) squares += to_float(key[d]) * to_float(key[d]);
    norm = inverse_root(sum_over<kWarp>(squares) * p.inverse_dim + p.epsilon);
  }
  const bool scaled = sizeof(R) == 1;
  const float key_scale = scaled ? 1 / p.key_scale[h] : 1, value_scale = scaled ? 1 / p.value_scale[h] : 1;
  for (int d = lane_index(); d < p.head_dim; d += kWarp) {
    if constexpr (sizeof(R) == sizeof(T)) {
      ring_key[d] = p.k_gain ? from_float<R>(to_float(key[d]) * norm * p.k_gain[d]) : key[d];
      ring_value[d] = value[d];
    } else {
      // What a ring of the model's own type would hold, then quantised.
      const float k =
          p.k_gain ? to_float(from_float<T>(to_float(key[d]) * norm * p.k_gain[d])) : to_float(key[d]);
      ring_key[d] = from_float<R>(k * key_scale);
      ring_value[d] = from_float<R>(to_float(value[d]) * value_scale);
    }
  }
}
template <class T>
PYENGINE_DEVICE void append_row(const AttentionParams& p, int b, int f, int n, int h) {
  const int64_t slot = p.append_slot[stream_of(p, b) * p.frames + f];
  if (slot < 0 || slot >= p.ring) return;
  if (p.key_scale)
    append_row<T, float8_e4m3>(p, b, f, n, h, static_cast<int>(slot));
  else
    append_row<T, T>(p, b, f, n, h, static_cast<int>(slot));
}

constexpr float kLowest = -3e38f;  // finite: a row of -inf scores has weights 0, not NaN

}  // namespace pyengine::ops::cuda
