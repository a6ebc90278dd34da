// Scope "temporal": for each (batch, token, head) a tiny attention of `frames` queries over at most ring + frames keys.
// Everything of one such problem is gathered into first-level cache. Only cpu.cc includes this.
#pragma once

#include "ops/frame_window_attention/rows.h"

namespace pyengine::ops::PYENGINE_ISA {

namespace {

struct TemporalScratch {
  Sizes size;
  int64_t columns;  // keys, padded
  float *key, *key_t, *value, *query, *scores, *sums;

  template <class T>
  static TemporalScratch at(const Params& p, float* memory, int64_t* words) {
    TemporalScratch s{};
    s.size = Sizes::of<T>(p);
    s.columns = p.key_stride;
    int64_t used = 0;
    const auto take = [&](int64_t n) {
      float* start = memory + used;
      used += round_up(n, kLane);
      return start;
    };
    s.key = take(s.columns * s.size.row);
    s.key_t = take(s.columns * s.size.row);
    s.value = take(s.columns * s.size.value_row);
    s.query = take(kTileRows * s.size.row);
    s.scores = take(kTileRows * s.columns);
    s.sums = take(kTileRows * s.size.value_row);
    *words = used;
    return s;
  }
};

// Rows of one problem lie a frame apart, too many streams for the hardware to follow, so each row asks for its
// successor's: the next head, or the next token's first. Elements from a row to that one, in qkv.
PYENGINE_INLINE int64_t next_row(const Params& p, int64_t h) {
  return h + 1 < p.heads ? p.head_dim : (2 * p.heads + 1) * p.head_dim;
}
template <class T>
PYENGINE_INLINE void prefetch_row(const Params& p, const T* x) {
  const char* start = reinterpret_cast<const char*>(x);
  const int64_t bytes = p.head_dim * sizeof(T);
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(start + i);
  __builtin_prefetch(start + bytes - 1);
}

template <class T, int nv>
void gather_keys(const Params& p, const TemporalScratch& s, int64_t b, int64_t n, int64_t h) {
  const int32_t* source = p.key_source + b * p.key_stride;
  const int64_t count = p.key_count[b], padded = round_up(count, kWidth);
  for (int64_t j = 0; j < count; ++j) {
    key_row<T, nv>(p, b, source[j], n, h, s.key + j * s.size.row);
    const bool in_ring = source[j] < p.ring;
    const int64_t next = in_ring ? p.head_dim : next_row(p, h);
    const T* key = in_ring ? slot<T>(p.ring_key, p, b, source[j], n, h) : active<T>(p, b, source[j] - p.ring, n, kKey, h);
    prefetch_row(p, key + next);
    prefetch_row(p, value_row<T>(p, b, source[j], n, h) + next);
  }
  // Padding columns get the bias -inf, but -inf + NaN would still be NaN.
  std::memset(s.key + count * s.size.row, 0, (padded - count) * s.size.row * sizeof(float));
  for (int64_t j = 0; j < padded; j += kWidth)
    for (int64_t d = 0; d < s.size.depth; d += kWidth)
      transpose_block(s.key + j * s.size.row + d, s.size.row, s.key_t + d * s.columns + j, s.columns);
  constexpr int pack = kPairs<T> ? 2 : 1;
  for (int64_t j = 0; j < count; j += pack) {
    const T* odd = pack == 2 && j + 1 < count ? value_row<T>(p, b, source[j + 1], n, h) : nullptr;
    pack_values<T, nv>(p, value_row<T>(p, b, source[j], n, h), odd, s.value + j / pack * s.size.value_row);
  }
}

// Queries [first, first + rows) of one problem.
template <class T, int nv>
void attend_tile(const Params& p, const TemporalScratch& s, int64_t b, int64_t n, int64_t h, int64_t first, int rows) {
  constexpr int pack = kPairs<T> ? 2 : 1;
  const int32_t* ends = p.key_end + b * p.frames + first;
  int end = 0;
  for (int m = 0; m < rows; ++m) {
    end = ends[m] > end ? ends[m] : end;
    if (ends[m]) query_row<T, nv>(p, b, first + m, n, h, s.query + m * s.size.row);
    prefetch_row(p, active<T>(p, b, first + m, n, kQuery, h) + next_row(p, h));
  }
  float scale[kTileRows] = {};
  if (end) {
    gemm<kPairs<T>>(s.query, s.size.row, s.key_t, s.columns, s.scores, s.columns, rows, (end + kWidth - 1) / kWidth,
                    static_cast<int>(s.size.depth));
    for (int m = 0; m < rows; ++m) {
      if (!ends[m]) continue;
      const float* bias = p.bias + (b * p.frames + first + m) * p.key_stride;
      const Softmax row = softmax<T>(s.scores + m * s.columns, bias, (end + kWidth - 1) / kWidth, kLowest);
      scale[m] = 1 / row.sum;
    }
    gemm<kPairs<T>>(s.scores, s.columns, s.value, s.size.value_row, s.sums, s.size.value_row, rows, vectors<nv>(p),
                    (end + pack - 1) / pack);
  }
  for (int m = 0; m < rows; ++m) {
    Vec v[nv ? nv : kMaxVectors];
    for (int i = 0; i < vectors<nv>(p); ++i)
      v[i] = ends[m] ? load(s.sums + m * s.size.value_row + i * kWidth) * set(scale[m]) : set(0);
    T* out = out_row<T>(p, b, first + m, n, h);
    store_row<nv>(p, out, v);
    __builtin_prefetch(out + 2 * p.head_dim - 1, 1);
  }
}

template <class T, int nv>
void temporal_items(const Params& p, int64_t begin, int64_t end, float* memory) {
  int64_t words;
  const TemporalScratch s = TemporalScratch::at<T>(p, memory, &words);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / p.tokens, n = item % p.tokens;
    for (int64_t h = 0; h < p.heads; ++h) {
      gather_keys<T, nv>(p, s, b, n, h);
      for (int64_t i = 0; i < p.frames; i += kTileRows)
        attend_tile<T, nv>(p, s, b, n, h, i, static_cast<int>(p.frames - i < kTileRows ? p.frames - i : kTileRows));
      for (int64_t i = 0; p.append_slot && i < p.frames; ++i) append_row<T, nv>(p, b, i, n, h);
    }
  }
}

}  // namespace

}  // namespace pyengine::ops::PYENGINE_ISA
