// The kernel for everything: any head size up to 256, any dtype. One warp per query row, 32 keys at a time,
// float32 throughout. Also the kernel that appends after scope "frame".
#pragma once

#include "ops/frame_window_attention/cuda_window.h"

namespace pyengine::ops::cuda {

constexpr int kRowsWarps = 4;
constexpr int kRowValues = 256 / kWarp;  // of a lane, at most

struct RowsScratch {  // of one warp
  float query[256];   // normalised, scaled
  float turned[256];  // scope frame: also rotated to the frame at hand
  float weight[kWarp];
};

template <class T>
PYENGINE_DEVICE float ring_value_at(const void* ring, int64_t offset, int d, const float* scale, int h) {
  if (scale) return to_float(static_cast<const float8_e4m3*>(ring)[offset + d]) * scale[h];
  return to_float(static_cast<const T*>(ring)[offset + d]);
}

// Keys or values of one source and token, as floats.
template <class T>
struct RowReader {
  const AttentionParams& p;
  const T* row;    // active, else null
  int64_t offset;  // in the ring
  const void* ring;
  const float* scale;
  int h;

  PYENGINE_DEVICE RowReader(const AttentionParams& params, int b, int source, int n, int head, Part part)
      : p(params), h(head) {
    const bool in_ring = source < p.ring;
    row = in_ring ? nullptr : active_row<T>(p, b, source - p.ring, n, part, h);
    offset = in_ring ? slot_offset(p, b, source, n, h) : 0;
    ring = in_ring ? ring_of(p, b, part) : nullptr;
    scale = part == kKey ? p.key_scale : p.value_scale;
  }
  PYENGINE_DEVICE float operator[](int d) const {
    return row ? to_float(row[d]) : ring_value_at<T>(ring, offset, d, scale, h);
  }
};

// The score of this lane's key. Rotation by the difference of positions: R_i q . R_j k = R_{i-j} q . k.
template <class T>
PYENGINE_DEVICE float score(const AttentionParams& p, const float* query, int b, int source, int n, int h,
                            bool rotates, int64_t distance) {
  const RowReader<T> key(p, b, source, n, h, kKey);
  const bool normalises = p.k_gain && source >= p.ring;
  float dot = 0, squares = 0;
  const auto add = [&](int d, float q) {
    const float k = key[d];
    dot += q * (normalises ? p.k_gain[d] : 1) * k;
    squares += k * k;
  };
  const int rotated = rotates ? p.rotary_dim : 0;
  for (int k = 0; k < rotated / 2; ++k) {
    const int first = p.rotation == Rotation::interleaved ? 2 * k : k, second = partner_of(p, first);
    const Pair turn = cosine_sine(p, distance, k);
    add(first, query[first] * turn.x - query[second] * turn.y);
    add(second, query[second] * turn.x + query[first] * turn.y);
  }
  for (int d = rotated; d < p.head_dim; ++d) add(d, query[d]);
  return normalises ? dot * inverse_root(squares * p.inverse_dim + p.epsilon) : dot;
}

struct RowSoftmax {
  float max = kLowest, sum = 0;
  float value[kRowValues] = {};
};

// 32 keys: lane l has the score of (source, token); source < 0 = none.
template <class T>
PYENGINE_DEVICE void add_keys(const AttentionParams& p, RowsScratch& s, RowSoftmax& row, int b, int h,
                              float score, int source, int n, int step_source, int step_token) {
  const float most = max_over<kWarp>(score);
  const float max = most > row.max ? most : row.max;
  const float shrink = exp2_fast(row.max - max), weight = exp2_fast(score - max);
  row.max = max;
  row.sum = row.sum * shrink + sum_over<kWarp>(weight);
  for (int i = 0; i < kRowValues; ++i) row.value[i] *= shrink;
  sync_warp();
  s.weight[lane_index()] = weight;
  sync_warp();
  for (int k = 0; k < kWarp; ++k) {
    if (s.weight[k] == 0) continue;  // masked, or too small to matter
    const RowReader<T> value(p, b, source + k * step_source, n + k * step_token, h, kValue);
    for (int i = 0; i < kRowValues; ++i) {
      const int d = lane_index() + i * kWarp;
      if (d < p.head_dim) row.value[i] += s.weight[k] * value[d];
    }
  }
}

template <class T>
PYENGINE_DEVICE void attend_row(const AttentionParams& p, RowsScratch& s, bool temporal, int b, int i, int n,
                                int h) {
  const int lane = lane_index(), sources = p.ring + p.frames, stream = stream_of(p, b);
  const int64_t position = index_of(p, stream, p.ring + i);
  const T* query = active_row<T>(p, b, i, n, kQuery, h);
  float scale = p.score_scale;
  if (p.q_gain) {
    float squares = 0;
    for (int d = lane; d < p.head_dim; d += kWarp) squares += to_float(query[d]) * to_float(query[d]);
    scale *= inverse_root(sum_over<kWarp>(squares) * p.inverse_dim + p.epsilon);
  }
  for (int d = lane; d < p.head_dim; d += kWarp)
    s.query[d] = to_float(query[d]) * scale * (p.q_gain ? p.q_gain[d] : 1);
  sync_warp();

  RowSoftmax row;
  if (temporal) {
    for (int first = 0; first < sources; first += kWarp) {
      const int source = first + lane;
      float x = -INFINITY;
      if (source < sources && sees(p, stream, i, source))
        x = score<T>(p, s.query, b, source, n, h, true, position - index_of(p, stream, source));
      add_keys<T>(p, s, row, b, h, x, first, n, 1, 0);
    }
  } else {
    for (int source = 0; source < sources; ++source) {
      if (!sees(p, stream, i, source)) continue;
      const int64_t distance = position - index_of(p, stream, source);
      sync_warp();
      for (int d = lane; d < p.head_dim; d += kWarp) {
        s.turned[d] = s.query[d];
        if (d >= p.rotary_dim) continue;
        bool second;
        const Pair turn = cosine_sine(p, distance, pair_of(p, d, &second));
        s.turned[d] = s.query[d] * turn.x + s.query[partner_of(p, d)] * (second ? turn.y : -turn.y);
      }
      sync_warp();
      for (int first = 0; first < p.tokens; first += kWarp) {
        float x = -INFINITY;
        if (first + lane < p.tokens) x = score<T>(p, s.turned, b, source, first + lane, h, false, 0);
        add_keys<T>(p, s, row, b, h, x, source, first, 0, 1);
      }
    }
  }
  T* out = out_row<T>(p, b, i, n, h);
  const float inverse = row.sum > 0 ? 1 / row.sum : 0;
  for (int k = 0; k < kRowValues; ++k)
    if (lane + k * kWarp < p.head_dim) out[lane + k * kWarp] = from_float<T>(row.value[k] * inverse);
}

PYENGINE_DEVICE bool unpack_row(const AttentionParams& p, int64_t row, int* b, int* i, int* n, int* h) {
  *h = static_cast<int>(row % p.heads);
  *n = static_cast<int>(row / p.heads % p.tokens);
  *i = static_cast<int>(row / p.heads / p.tokens % p.frames);
  *b = static_cast<int>(row / p.heads / p.tokens / p.frames);
  return *b < p.batch;
}

template <class T, bool temporal>
PYENGINE_KERNEL(kRowsWarps* kWarp, 1)
rows_kernel(const AttentionParams p) {
  int b, i, n, h;
  if (!unpack_row(p, static_cast<int64_t>(block_x()) * kRowsWarps + warp_index(), &b, &i, &n, &h)) return;
  attend_row<T>(p, reinterpret_cast<RowsScratch*>(shared_memory())[warp_index()], temporal, b, i, n, h);
}

// One warp per row (batch, frame, token, head); frames without a slot cost a look at it.
template <class T>
PYENGINE_KERNEL(kRowsWarps* kWarp, 1)
append_kernel(const AttentionParams p) {
  int b, f, n, h;
  if (!unpack_row(p, static_cast<int64_t>(block_x()) * kRowsWarps + warp_index(), &b, &f, &n, &h)) return;
  append_row<T>(p, b, f, n, h);
}

}  // namespace pyengine::ops::cuda
