// Rows of head_dim values: where they are, RMS norm, rotary embedding, packing into words, softmax.
// Only cpu.cc includes this. `dim` template arguments fix head_dim so that a row stays in registers; 0 leaves
// it to run time.
#pragma once

#include <cmath>  // INFINITY, exp2f

#include "core/gemm.h"
#include "ops/frame_window_attention/pair_rows.h"
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

// Numbers and choices that the compiler knows.
template <int v>
struct Count {
  static constexpr int value = v;
};
template <bool v>
struct Flag {
  static constexpr bool value = v;
};
template <class F>
PYENGINE_INLINE void with_flags(F&& f, bool a, bool b, bool c) {
  const auto third = [&](auto x, auto y) { c ? f(x, y, Flag<true>{}) : f(x, y, Flag<false>{}); };
  const auto second = [&](auto x) { b ? third(x, Flag<true>{}) : third(x, Flag<false>{}); };
  a ? second(Flag<true>{}) : second(Flag<false>{});
}

template <int dim>
PYENGINE_INLINE int64_t lanes(const Params& p) {
  return dim ? dim : p.head_dim;
}
template <int dim>
PYENGINE_INLINE int vectors(const Params& p) {
  return static_cast<int>((lanes<dim>(p) + kWidth - 1) / kWidth);
}
// A row of floats in registers.
template <int dim>
using Row = Vec[dim ? (dim + kWidth - 1) / kWidth : kMaxVectors];

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
PYENGINE_INLINE T* slot(void* const* ring, const Params& p, int64_t b, int64_t r, int64_t n, int64_t h) {
  return static_cast<T*>(ring[b]) + ((r * p.tokens + n) * p.heads + h) * p.head_dim;
}
template <class T>
PYENGINE_INLINE T* out_row(const Params& p, int64_t b, int64_t f, int64_t n, int64_t h) {
  return static_cast<T*>(p.out) + (((b * p.frames + f) * p.tokens + n) * p.heads + h) * p.head_dim;
}

template <int dim, class T>
PYENGINE_INLINE void load_row(const Params& p, const T* x, Vec* v) {
  const int last = vectors<dim>(p) - 1;
  const int rest = static_cast<int>(lanes<dim>(p)) - last * kWidth;
  for (int i = 0; i < last; ++i) v[i] = load(x + i * kWidth);
  v[last] = rest == kWidth ? load(x + last * kWidth) : load_part(x + last * kWidth, rest);
}
template <int dim, class T>
PYENGINE_INLINE void store_row(const Params& p, T* y, const Vec* v) {
  const int last = vectors<dim>(p) - 1;
  const int rest = static_cast<int>(lanes<dim>(p)) - last * kWidth;
  for (int i = 0; i < last; ++i) store(y + i * kWidth, v[i]);
  if (rest == kWidth)
    store(y + last * kWidth, v[last]);
  else
    store_part(y + last * kWidth, v[last], rest);
}

PYENGINE_INLINE Vec rms_factor(const Params& p, Vec squares) {
  return set(1) / square_root(madd(squares, set(p.inverse_dim), set(p.epsilon)));
}

template <int dim>
PYENGINE_INLINE void normalise(const Params& p, bool rms, const float* gain, Vec* v) {
  const int n = vectors<dim>(p);
  Vec scale = set(1);
  if (rms) {
    Vec squares = v[0] * v[0];
    for (int i = 1; i < n; ++i) squares = madd(v[i], v[i], squares);
    scale = rms_factor(p, set(sum(squares)));
  }
  for (int i = 0; i < n; ++i) v[i] = v[i] * (scale * load(gain + i * kWidth));
}

// y = x cos + partner(x) sin, where the sines carry the sign and are 0 past rotary_dim.
template <int dim>
PYENGINE_INLINE void rotate(const Params& p, const float* cosine, Vec* v) {
  const int n = vectors<dim>(p);
  const float* sine = cosine + p.padded_dim;
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

template <class T, int dim>
PYENGINE_INLINE void pack_row(const Params& p, const Vec* v, float* y) {
  constexpr int step = kPairs<T> ? kWidth / 2 : kWidth;
  for (int i = 0; i < vectors<dim>(p); ++i) store_words<kPairs<T>>(y + i * step, v[i]);
}

// What becomes of rows of queries or keys before they are multiplied. Null gain: they stay as they are.
struct Turn {
  bool rms;
  const float *gain, *pair_gain;
};
PYENGINE_INLINE Turn query_turn(const Params& p) {
  return {p.normalise_query, p.query_gain, p.query_pair_gain};
}
PYENGINE_INLINE Turn key_turn(const Params& p, int64_t source) {  // keys in the ring are normalised
  return p.normalise_key && source >= p.ring ? Turn{true, p.key_gain, p.key_pair_gain}
                                             : Turn{false, nullptr, nullptr};
}

// `count` rows as words, at x(j) and from there to y + j * row: normalised, times their gain, rotated by
// rotary[j] (null: not rotated). With `deferred` the factor of the norm is left to the scores, where there
// are fewer of them: factor[j], or 1.
template <class T, int dim, bool deferred, class F>
PYENGINE_INLINE void turn_rows(const Params& p, const Turn& turn, const F& x, const float* const* rotary,
                               int64_t count, float* y, int64_t row, float* factor) {
  if constexpr (kPairs<T>) {
    if (p.rotation != Rotation::halves) {
      const int64_t head_dim = p.head_dim, pairs = 2 * p.padded_dim;
      const PairGain<dim> gain(turn.pair_gain, p.pair_stride);
      with_flags(
          [&](auto rms, auto gained, auto rotated) {
            const auto some = [&](auto rows, int64_t first) {
              Vec sums[rows.value];
#pragma GCC unroll 8
              for (int64_t j = 0; j < rows.value; ++j) {
                const T* from = x(first + j);
                if (rms.value) sums[j] = squares<dim>(from, head_dim);
                const Vec now = rms.value && !deferred ? rms_factor(p, set(sum(sums[j]))) : set(1);
                turn_pairs<dim, gained.value, rotated.value>(
                    from, head_dim, gain, rotated.value ? rotary[first + j] + pairs : nullptr, now,
                    y + (first + j) * row);
              }
              if (!deferred) return;
              const Vec later = rms.value ? rms_factor(p, sum_rows<rows.value>(sums)) : set(1);
              store_part(factor + first, later, rows.value);
            };
            int64_t j = 0;
            for (; j + kReduceRows <= count; j += kReduceRows) some(Count<kReduceRows>{}, j);
            for (; j < count; ++j) some(Count<1>{}, j);
          },
          turn.rms, turn.gain != nullptr, p.rotation != Rotation::none);
      return;
    }
  }
  for (int64_t j = 0; j < count; ++j) {
    Row<dim> v;
    load_row<dim>(p, x(j), v);
    if (turn.gain) normalise<dim>(p, turn.rms, turn.gain, v);
    if (p.rotation != Rotation::none) rotate<dim>(p, rotary[j], v);
    pack_row<T, dim>(p, v, y + j * row);
    if (deferred) factor[j] = 1;
  }
}

template <class T>
PYENGINE_INLINE const T* key_place(const Params& p, int64_t b, int64_t source, int64_t n, int64_t h) {
  return source < p.ring ? slot<T>(p.ring_key, p, b, source, n, h)
                         : active<T>(p, b, source - p.ring, n, kKey, h);
}
template <class T>
PYENGINE_INLINE const T* value_place(const Params& p, int64_t b, int64_t source, int64_t n, int64_t h) {
  return source < p.ring ? slot<T>(p.ring_value, p, b, source, n, h)
                         : active<T>(p, b, source - p.ring, n, kValue, h);
}

// Rows `even` and `odd` (null: zeros) of the values as one row of words, or `even` alone as floats.
template <class T, int dim>
PYENGINE_INLINE void pack_values(const Params& p, const T* even, const T* odd, float* y) {
  if constexpr (kPairs<T>) {
    zip_values<dim>(even, odd, p.head_dim, y);
  } else {
    Row<dim> v;
    load_row<dim>(p, even, v);
    for (int i = 0; i < vectors<dim>(p); ++i) store(y + i * kWidth, v[i]);
  }
}

// Sums over packed values, times `scale`, to a row of the output.
template <class T, int dim>
PYENGINE_INLINE void unpack_sums(const Params& p, const float* sums, float scale, T* y) {
  if constexpr (kPairs<T>) {
    for (int64_t i = 0; i < lanes<dim>(p); i += kBlock) {
      const Vec first = load(sums + i), second = lanes<dim>(p) - i > kWidth ? load(sums + i + kWidth) : first;
      store_columns<dim>(first * set(scale), second * set(scale), i, p.head_dim, y);
    }
  } else {
    Row<dim> v;
    for (int i = 0; i < vectors<dim>(p); ++i) v[i] = load(sums + i * kWidth) * set(scale);
    store_row<dim>(p, y, v);
  }
}

template <class T, int dim>
PYENGINE_INLINE void append_row(const Params& p, int64_t b, int64_t f, int64_t n, int64_t h) {
  const int64_t r = p.append_slot[b % p.streams * p.frames + f];
  if (r < 0) return;
  Row<dim> v;
  load_row<dim>(p, active<T>(p, b, f, n, kKey, h), v);
  if (p.normalise_key) normalise<dim>(p, true, p.key_gain, v);
  T *key = slot<T>(p.ring_key, p, b, r, n, h), *value = slot<T>(p.ring_value, p, b, r, n, h);
  if (p.normalise_key)
    store_row<dim>(p, key, v);
  else
    std::memcpy(key, active<T>(p, b, f, n, kKey, h), sizeof(T) * p.head_dim);  // bit for bit
  std::memcpy(value, active<T>(p, b, f, n, kValue, h), sizeof(T) * p.head_dim);
}

// Scores to 2^(score - m) as words, in place. Returns their sums by lane.
template <class T>
PYENGINE_INLINE Vec weights(float* scores, int n, float m) {
  Vec total = set(0);
  constexpr int step = kPairs<T> ? kWidth / 2 : kWidth;
  for (int i = 0; i < n; ++i) {
    const Vec w = exp2<sizeof(T) == 2>(load(scores + i * kWidth) - set(m));
    total = total + w;
    store_words<kPairs<T>>(scores + i * step, w);
  }
  if (kDepthMultiple<T> > 1 && n % 2) store_part(scores + n * step, set(0), step);
  return total;
}

// Scores to weights (as words, in place) relative to max(`floor`, the highest score). Returns that maximum
// and the sum.
struct Softmax {
  float max, sum;
};
template <class T>
PYENGINE_INLINE Softmax softmax(float* scores, int n, float floor) {
  Vec most = set(floor);
  for (int i = 0; i < n; ++i) most = max(most, load(scores + i * kWidth));
  const float m = highest(most);
  return {m, sum(weights<T>(scores, n, m))};
}

constexpr float kLowest = -3e38f;  // finite: a row of -inf scores has weights 0, not NaN

}  // namespace

}  // namespace pyengine::ops::PYENGINE_ISA
