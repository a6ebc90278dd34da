// What both tensor-core kernels do with tiles of rows in shared memory: rows normalised and rotated by quads of
// lanes, softmax on score fragments, weights times values.
#pragma once

#include "ops/frame_window_attention/cuda_window.h"

namespace pyengine::ops::cuda {

// Values from one row of shared memory to the next: an odd number of 16-byte units, so that neither eight rows of
// one column of units nor a quad's four units of eight rows meet in a bank.
template <int D>
constexpr int kStride = D / 8 % 2 ? D : D + 8;

// A quad shares a row: lane t has units t, t + 4, ... of eight values, and values 2t, 2t + 1 of an odd last unit.
template <int D>
struct Quad {
  static constexpr int kUnits = D / 32;        // whole units of a lane
  static constexpr bool kTail = D % 32 != 0;   // 8 more values for the quad
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
  for (int i = 0; i < Quad<D>::kValues / 2; ++i) {
    const Pair v = unpack<T>(x.w[i]);
    squares += v.x * v.x + v.y * v.y;
  }
  return inverse_root(sum_over<4>(squares) * p.inverse_dim + p.epsilon);
}

// x * norm * gain, rotated by `turns` [D / 2] (cosine and sine per pair; identity past rotary_dim), times `after`
// (null: 1). `row` is where x came from: with pairs (d, d + rotary_dim / 2) the partner is read again from there.
template <class T, int D, class Gain>
PYENGINE_DEVICE RowWords<D> turn_row(const AttentionParams& p, const RowWords<D>& x, const T* row, int t, float norm,
                                     const Gain& gain, const Pair* turns, const float* after) {
  constexpr int pairs = Quad<D>::kValues / 2;
  Pair v[pairs];
#pragma unroll
  for (int i = 0; i < pairs; ++i) {
    const int d = Quad<D>::at(t, 2 * i);
    v[i] = unpack<T>(x.w[i]);
    v[i].x *= norm * gain[d], v[i].y *= norm * gain[d + 1];
  }
  if (p.rotation == Rotation::interleaved) {
#pragma unroll
    for (int i = 0; i < pairs; ++i) {
      const Pair turn = turns[Quad<D>::at(t, 2 * i) / 2];
      v[i] = {v[i].x * turn.x - v[i].y * turn.y, v[i].y * turn.x + v[i].x * turn.y};
    }
  } else if (p.rotation == Rotation::halves) {
    const auto turned = [&](int d, float value) {
      if (d >= p.rotary_dim) return value;
      bool second;
      const Pair turn = turns[pair_of(p, d, &second)];
      const int other = partner_of(p, d);
      return value * turn.x + to_float(row[other]) * norm * gain[other] * (second ? turn.y : -turn.y);
    };
#pragma unroll
    for (int i = 0; i < pairs; ++i) {
      const int d = Quad<D>::at(t, 2 * i);
      v[i] = {turned(d, v[i].x), turned(d + 1, v[i].y)};
    }
  }
  RowWords<D> y;
#pragma unroll
  for (int i = 0; i < pairs; ++i) {
    const int d = Quad<D>::at(t, 2 * i);
    if (after) v[i].x *= after[d], v[i].y *= after[d + 1];
    y.w[i] = pack<T>(v[i].x, v[i].y);
  }
  return y;
}

// Two query rows of a lane, g and g + 8 of a tile of 16.
struct TileSoftmax {
  float max[2] = {kLowest, kLowest}, sum[2] = {0, 0};  // sums of this lane's columns only
};

// Scores [16, 8 * tiles] to weights, relative to the highest so far; `shrink` is what earlier sums are worth now.
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

// o [16, D] of each of `rows` query tiles += weights (columns of score tiles 2k, 2k + 1) times 16 rows of values.
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
