// What both tensor-core kernels do with tiles of rows in shared memory: rows normalised and rotated by quads
// of lanes, softmax on score fragments, weights times values.
#pragma once

#include "ops/frame_window_attention/cuda_window.h"

namespace pyengine::ops::cuda {

// Values from one row of shared memory to the next: an odd number of 16-byte units, so that neither eight
// rows of one column of units nor a quad's four units of eight rows meet in a bank.
template <int D>
constexpr int kStride = D / 8 % 2 ? D : D + 8;

// A quad shares a row: lane t has units t, t + 4, ... of eight values, and values 2t, 2t + 1 of an odd last
// unit.
template <int D>
struct Quad {
  static constexpr int kUnits = D / 32;       // whole units of a lane
  static constexpr bool kTail = D % 32 != 0;  // 8 more values for the quad
  static constexpr int kValues = 8 * kUnits + (kTail ? 2 : 0);
  static_assert(D % 32 == 0 || D % 32 == 8, "head sizes of 32 k or 32 k + 8");

  // The d of this lane's value e.
  static PYENGINE_DEVICE int at(int t, int e) {
    return e < 8 * kUnits ? e / 8 * 32 + 8 * t + e % 8 : 32 * kUnits + 2 * t + e % 8;
  }
};

// One lane's share of a row as words: two values each, in the order of Quad::at.
template <int D>
struct RowWords {
  uint32_t w[Quad<D>::kValues / 2];
};

template <class T, int D>
PYENGINE_DEVICE RowWords<D> load_row(const T* row, int t) {
  RowWords<D> y;
  for (int c = 0; c < Quad<D>::kUnits; ++c) {
    const Words4 unit = *reinterpret_cast<const Words4*>(row + 32 * c + 8 * t);
    for (int i = 0; i < 4; ++i) y.w[4 * c + i] = unit.w[i];
  }
  if constexpr (Quad<D>::kTail)
    y.w[4 * Quad<D>::kUnits] = *reinterpret_cast<const uint32_t*>(row + 32 * Quad<D>::kUnits + 2 * t);
  return y;
}
template <class T, int D>
PYENGINE_DEVICE void store_row(T* row, int t, const RowWords<D>& x) {
  for (int c = 0; c < Quad<D>::kUnits; ++c) {
    Words4 unit;
    for (int i = 0; i < 4; ++i) unit.w[i] = x.w[4 * c + i];
    *reinterpret_cast<Words4*>(row + 32 * c + 8 * t) = unit;
  }
  if constexpr (Quad<D>::kTail)
    *reinterpret_cast<uint32_t*>(row + 32 * Quad<D>::kUnits + 2 * t) = x.w[4 * Quad<D>::kUnits];
}

// The inverse root mean square of a quad's row; every lane of the warp takes part.
template <class T, int D>
PYENGINE_DEVICE float inverse_rms(const AttentionParams& p, const RowWords<D>& x) {
  float squares = 0;
#pragma unroll
  for (int i = 0; i < Quad<D>::kValues / 2; ++i) {
    const Pair v = unpack<T>(x.w[i]);
    squares += v.x * v.x + v.y * v.y;
  }
  return inverse_root(sum_over<4>(squares) * p.inverse_dim + p.epsilon);
}
template <class T>
PYENGINE_DEVICE float squares_of(const Words4& unit) {
  float squares = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const Pair v = unpack<T>(unit.w[i]);
    squares += v.x * v.x + v.y * v.y;
  }
  return squares;
}
// The same from memory, unit by unit: for where registers are dear.
template <class T, int D>
PYENGINE_DEVICE float inverse_rms(const AttentionParams& p, const T* row) {
  float squares = 0;
#pragma unroll 1
  for (int u = lane_index() % 4; u < D / 8; u += 4)
    squares += squares_of<T>(*reinterpret_cast<const Words4*>(row + 8 * u));
  return inverse_root(sum_over<4>(squares) * p.inverse_dim + p.epsilon);
}

// How a row is normalised and rotated: x * norm * gain, rotated by `turns` [D / 2] (cosine and sine per pair;
// identity past rotary_dim), times `after` (null: 1). `row` is where x comes from: with pairs (d, d +
// rotary_dim / 2) the partner is read again from there.
template <class T>
struct Turn {
  const AttentionParams& p;
  const T* row;
  float norm;
  const float* gain;  // null: 1
  const Pair* turns;
  const float* after;

  PYENGINE_DEVICE float gain_at(int d) const { return gain ? gain[d] : 1; }

  // Values d and d + 1 of the row, d even.
  PYENGINE_DEVICE uint32_t operator()(uint32_t word, int d) const {
    Pair v = unpack<T>(word);
    v.x *= norm * gain_at(d), v.y *= norm * gain_at(d + 1);
    if (p.rotation == Rotation::interleaved) {
      const Pair turn = turns[d / 2];
      v = {v.x * turn.x - v.y * turn.y, v.y * turn.x + v.x * turn.y};
    } else if (p.rotation == Rotation::halves) {
      v = {with_partner(d, v.x), with_partner(d + 1, v.y)};
    }
    if (after) v.x *= after[d], v.y *= after[d + 1];
    return pack<T>(v.x, v.y);
  }

  PYENGINE_DEVICE float with_partner(int d, float value) const {
    if (d >= p.rotary_dim) return value;
    bool second;
    const Pair turn = turns[pair_of(p, d, &second)];
    const int other = partner_of(p, d);
    const float partner = to_float(row[other]) * norm * gain_at(other);
    return value * turn.x + partner * (second ? turn.y : -turn.y);
  }
};

template <class T, int D>
PYENGINE_DEVICE RowWords<D> turn_row(const RowWords<D>& x, int t, const Turn<T>& turn) {
  RowWords<D> y;
#pragma unroll
  for (int i = 0; i < Quad<D>::kValues / 2; ++i) y.w[i] = turn(x.w[i], Quad<D>::at(t, 2 * i));
  return y;
}
// Eight values of a row, from memory.
template <class T>
PYENGINE_DEVICE Words4 turn_unit(const Turn<T>& turn, int u) {
  Words4 x = *reinterpret_cast<const Words4*>(turn.row + 8 * u);
#pragma unroll
  for (int i = 0; i < 4; ++i) x.w[i] = turn(x.w[i], 8 * u + 2 * i);
  return x;
}
// A quad's row from memory to elsewhere in memory, unit by unit: for where registers are dear.
template <class T, int D>
PYENGINE_DEVICE void turn_row(T* to, const Turn<T>& turn) {
#pragma unroll 1
  for (int u = lane_index() % 4; u < D / 8; u += 4)
    *reinterpret_cast<Words4*>(to + 8 * u) = turn_unit(turn, u);
}

// Two query rows of a lane, g and g + 8 of a tile of 16.
struct TileSoftmax {
  float max[2] = {kLowest, kLowest}, sum[2] = {0, 0};  // sums of this lane's columns only
};

// Scores [16, 8 * tiles] to weights, relative to the highest so far; `shrink` is what earlier sums are worth
// now.
template <int tiles>
PYENGINE_DEVICE void to_weights(float (*s)[4], TileSoftmax& state, float* shrink) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float most = state.max[r];
#pragma unroll
    for (int j = 0; j < tiles; ++j) {
      most = s[j][2 * r] > most ? s[j][2 * r] : most;
      most = s[j][2 * r + 1] > most ? s[j][2 * r + 1] : most;
    }
    most = max_over<4>(most);
    shrink[r] = exp2_fast(state.max[r] - most);
    state.max[r] = most;
    float sum = state.sum[r] * shrink[r];
#pragma unroll
    for (int j = 0; j < tiles; ++j) {
      s[j][2 * r] = exp2_fast(s[j][2 * r] - most);
      s[j][2 * r + 1] = exp2_fast(s[j][2 * r + 1] - most);
      sum += s[j][2 * r] + s[j][2 * r + 1];
    }
    state.sum[r] = sum;
  }
}

// o [16, D] of each of `rows` query tiles += weights (columns of score tiles 2k, 2k + 1) times 16 rows of
// values.
template <class T, int D, int rows, int tiles>
PYENGINE_DEVICE void add_values(float (*o)[D / 8][4], const float (*s)[tiles][4], int k, const T* values) {
  uint32_t a[rows][4];
#pragma unroll
  for (int m = 0; m < rows; ++m) {
    const float *left = s[m][2 * k], *right = s[m][2 * k + 1];
    a[m][0] = pack<T>(left[0], left[1]), a[m][1] = pack<T>(left[2], left[3]);
    a[m][2] = pack<T>(right[0], right[1]), a[m][3] = pack<T>(right[2], right[3]);
  }
  const T* row = values + lane_index() % 16 * kStride<D>;
#pragma unroll
  for (int j = 0; j + 1 < D / 8; j += 2) {
    uint32_t b[4];
    load_matrices4_transposed(b, row + 8 * j + lane_index() / 16 * 8);
#pragma unroll
    for (int m = 0; m < rows; ++m) {
      multiply16<T>(o[m][j], a[m], b);
      multiply16<T>(o[m][j + 1], a[m], b + 2);
    }
  }
  if constexpr (D / 8 % 2) {
    uint32_t b[2];
    load_matrices2_transposed(b, row + D - 8);
#pragma unroll
    for (int m = 0; m < rows; ++m) multiply16<T>(o[m][D / 8 - 1], a[m], b);
  }
}

// Sums [16, D] over their weights into 16 rows of shared memory that are this warp's own.
template <class T, int D>
PYENGINE_DEVICE void store_sums(const float (*o)[4], const TileSoftmax& state, T* tile) {
  const int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float sum = sum_over<4>(state.sum[r]), inverse = sum > 0 ? 1 / sum : 0;
    T* row = tile + (g + 8 * r) * kStride<D>;
#pragma unroll
    for (int j = 0; j < D / 8; ++j)
      *reinterpret_cast<uint32_t*>(row + 8 * j + 2 * t) =
          pack<T>(o[j][2 * r] * inverse, o[j][2 * r + 1] * inverse);
  }
}

// Starts copying one row of D values, or zeros, unit by unit: unit `u` of it.
template <int D, class T>
PYENGINE_DEVICE void copy_unit(T* row, const T* from, int u, bool valid) {
  copy_async(row + 8 * u, from + 8 * u, valid);
}

}  // namespace pyengine::ops::cuda
