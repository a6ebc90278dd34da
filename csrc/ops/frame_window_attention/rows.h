// Rows of head_dim values: where they are, RMS norm, rotary embedding, packing into words, softmax.
// Only cpu.cc includes this. `nv` template arguments fix the number of vectors per row so that a row stays in
// registers; 0 leaves it to run time.
#pragma once

#include <cmath>  // INFINITY, exp2f

#include "core/gemm.h"
#include "ops/frame_window_attention/params.h"

namespace pyengine::ops::PYENGINE_ISA {

namespace {

using namespace pyengine::PYENGINE_ISA;  // the vectors

using Params = FrameWindowAttentionParams;
constexpr int kMaxVectors = 256 / kWidth;
enum Part { kQuery, kKey, kValue };

PYENGINE_INLINE int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

template <int nv>
PYENGINE_INLINE int vectors(const Params& p) {
  return nv ? nv : static_cast<int>((p.head_dim + kWidth - 1) / kWidth);
}

// Sizes in words. Rows of keys and queries are padded so that blocks of them can be transposed.
struct Sizes {
  int64_t row, value_row, depth;  // key or query row, value row, products of a score
  template <class T>
  static Sizes of(const Params& p) {
    const int pack = kPairs<T> ? 2 : 1;
    const int64_t depth = (p.head_dim + pack - 1) / pack;
    return {round_up(depth, kWidth), round_up(p.head_dim, kWidth), depth};
  }
};

template <class T>
PYENGINE_INLINE const T* active(const Params& p, int64_t b, int64_t f, int64_t n, Part part, int64_t h) {
  return static_cast<const T*>(p.qkv) +
         ((((b * p.frames + f) * p.tokens + n) * 3 + part) * p.heads + h) * p.head_dim;
}
template <class T>
PYENGINE_INLINE T* slot(void* ring, const Params& p, int64_t b, int64_t r, int64_t n, int64_t h) {
  return static_cast<T*>(ring) + (((b * p.ring + r) * p.tokens + n) * p.heads + h) * p.head_dim;
}
template <class T>
PYENGINE_INLINE T* out_row(const Params& p, int64_t b, int64_t f, int64_t n, int64_t h) {
  return static_cast<T*>(p.out) + (((b * p.frames + f) * p.tokens + n) * p.heads + h) * p.head_dim;
}

template <int nv, class T>
PYENGINE_INLINE void load_row(const Params& p, const T* x, Vec* v) {
  const int last = vectors<nv>(p) - 1;
  const int rest = static_cast<int>(p.head_dim) - last * kWidth;
  for (int i = 0; i < last; ++i) v[i] = load(x + i * kWidth);
  v[last] = rest == kWidth ? load(x + last * kWidth) : load_part(x + last * kWidth, rest);
}
template <int nv, class T>
PYENGINE_INLINE void store_row(const Params& p, T* y, const Vec* v) {
  const int last = vectors<nv>(p) - 1;
  const int rest = static_cast<int>(p.head_dim) - last * kWidth;
  for (int i = 0; i < last; ++i) store(y + i * kWidth, v[i]);
  if (rest == kWidth)
    store(y + last * kWidth, v[last]);
  else
    store_part(y + last * kWidth, v[last], rest);
}

template <int nv>
PYENGINE_INLINE void normalise(const Params& p, bool rms, const float* gain, Vec* v) {
  const int n = vectors<nv>(p);
  Vec scale = set(1);
  if (rms) {
    Vec squares = v[0] * v[0];
    for (int i = 1; i < n; ++i) squares = madd(v[i], v[i], squares);
    scale = set(1 / __builtin_sqrtf(sum(squares) * p.inverse_dim + p.epsilon));
  }
  for (int i = 0; i < n; ++i) v[i] = v[i] * (scale * load(gain + i * kWidth));
}

// y = x cos + partner(x) sin, where the sines carry the sign and are 0 past rotary_dim.
template <int nv>
PYENGINE_INLINE void rotate(const Params& p, int64_t source, Vec* v) {
  if (p.rotation == Rotation::none) return;
  const int n = vectors<nv>(p);
  const float *cosine = p.rotary[source], *sine = cosine + p.padded_dim;
  if (p.rotation == Rotation::interleaved) {
    for (int i = 0; i < n; ++i)
      v[i] = madd(swap_neighbours(v[i]), load(sine + i * kWidth), v[i] * load(cosine + i * kWidth));
    return;
  }
  // The partner of d is (d + rotary_dim / 2) mod rotary_dim: read it from the row written twice, rotary_dim
  // apart.
  float twice[2 * kMaxVectors * kWidth];
  for (int i = 0; i < n; ++i) store(twice + i * kWidth, v[i]);
  for (int i = 0; i < n; ++i) store(twice + p.rotary_dim + i * kWidth, v[i]);
  const float* partner = twice + p.rotary_dim / 2;
  for (int i = 0; i < n; ++i)
    v[i] = madd(load(partner + i * kWidth), load(sine + i * kWidth), v[i] * load(cosine + i * kWidth));
}

template <class T, int nv>
PYENGINE_INLINE void pack_row(const Params& p, const Vec* v, float* y) {
  constexpr int step = kPairs<T> ? kWidth / 2 : kWidth;
  for (int i = 0; i < vectors<nv>(p); ++i) store_words<kPairs<T>>(y + i * step, v[i]);
}

// The query of frame i, scaled and rotated, as words.
template <class T, int nv>
PYENGINE_INLINE void query_row(const Params& p, int64_t b, int64_t i, int64_t n, int64_t h, float* y) {
  Vec v[nv ? nv : kMaxVectors];
  load_row<nv>(p, active<T>(p, b, i, n, kQuery, h), v);
  normalise<nv>(p, p.normalise_query, p.query_gain, v);
  rotate<nv>(p, p.ring + i, v);
  pack_row<T, nv>(p, v, y);
}

// The key of a source, rotated, as words.
template <class T, int nv>
PYENGINE_INLINE void key_row(const Params& p, int64_t b, int64_t source, int64_t n, int64_t h, float* y) {
  Vec v[nv ? nv : kMaxVectors];
  if (source < p.ring) {
    load_row<nv>(p, slot<T>(p.ring_key, p, b, source, n, h), v);
  } else {
    load_row<nv>(p, active<T>(p, b, source - p.ring, n, kKey, h), v);
    if (p.normalise_key) normalise<nv>(p, true, p.key_gain, v);
  }
  rotate<nv>(p, source, v);
  pack_row<T, nv>(p, v, y);
}

template <class T>
PYENGINE_INLINE const T* value_row(const Params& p, int64_t b, int64_t source, int64_t n, int64_t h) {
  return source < p.ring ? slot<T>(p.ring_value, p, b, source, n, h)
                         : active<T>(p, b, source - p.ring, n, kValue, h);
}

// Rows `even` and `odd` (null: zeros) of the values as one row of words, or `even` alone as floats.
template <class T, int nv>
PYENGINE_INLINE void pack_values(const Params& p, const T* even, const T* odd, float* y) {
  Vec v[nv ? nv : kMaxVectors], w[nv ? nv : kMaxVectors];
  load_row<nv>(p, even, v);
  if constexpr (kPairs<T>) {
    for (int i = 0; i < vectors<nv>(p); ++i) w[i] = set(0);
    if (odd) load_row<nv>(p, odd, w);
    for (int i = 0; i < vectors<nv>(p); ++i) v[i] = zip_pairs(v[i], w[i]);
  }
  for (int i = 0; i < vectors<nv>(p); ++i) store(y + i * kWidth, v[i]);
}

template <class T, int nv>
PYENGINE_INLINE void append_row(const Params& p, int64_t b, int64_t f, int64_t n, int64_t h) {
  const int64_t r = p.append_slot[f];
  if (r < 0) return;
  Vec v[nv ? nv : kMaxVectors];
  load_row<nv>(p, active<T>(p, b, f, n, kKey, h), v);
  if (p.normalise_key) normalise<nv>(p, true, p.key_gain, v);
  T *key = slot<T>(p.ring_key, p, b, r, n, h), *value = slot<T>(p.ring_value, p, b, r, n, h);
  if (p.normalise_key)
    store_row<nv>(p, key, v);
  else
    std::memcpy(key, active<T>(p, b, f, n, kKey, h), sizeof(T) * p.head_dim);  // bit for bit
  std::memcpy(value, active<T>(p, b, f, n, kValue, h), sizeof(T) * p.head_dim);
}

// Scores to weights (as words, in place) relative to max(`floor`, the highest score). Returns that maximum
// and the sum.
struct Softmax {
  float max, sum;
};
template <class T>
PYENGINE_INLINE Softmax softmax(float* scores, const float* bias, int n, float floor) {
  Vec most = set(floor);
  for (int i = 0; i < n; ++i) {
    Vec s = load(scores + i * kWidth);
    if (bias) {
      s = s + load(bias + i * kWidth);
      store(scores + i * kWidth, s);
    }
    most = max(most, s);
  }
  const float m = highest(most);
  Vec total = set(0);
  constexpr int step = kPairs<T> ? kWidth / 2 : kWidth;
  for (int i = 0; i < n; ++i) {
    const Vec w = exp2<sizeof(T) == 2>(load(scores + i * kWidth) - set(m));
    total = total + w;
    store_words<kPairs<T>>(scores + i * step, w);
  }
  if (kDepthMultiple<T> > 1 && n % 2) store_part(scores + n * step, set(0), step);
  return {m, sum(total)};
}

constexpr float kLowest = -3e38f;  // finite: a row of -inf scores has weights 0, not NaN

}  // namespace

}  // namespace pyengine::ops::PYENGINE_ISA
