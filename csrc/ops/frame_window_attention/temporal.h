// Scope "temporal": for each (batch, token, head) a tiny attention of `frames` queries over at most ring +
// frames keys. Everything of one such problem is gathered into first-level cache. Only cpu.cc includes this.
#pragma once

#include "ops/frame_window_attention/rows.h"

namespace pyengine::ops::PYENGINE_ISA {

namespace {

struct TemporalScratch {
  Sizes size;
  int64_t columns;  // keys, padded
  int64_t rows;     // queries, padded
  float *key, *key_t, *value, *query, *scores, *scale, *sums;

  template <class T>
  static TemporalScratch at(const Params& p, float* memory, int64_t* words) {
    TemporalScratch s{};
    s.size = Sizes::of<T>(p);
    s.columns = p.key_stride;
    s.rows = round_up(p.frames, kTileRows);
    int64_t used = 0;
    const auto take = [&](int64_t n) {
      float* start = memory + used;
      used += round_up(n, kLane);
      return start;
    };
    s.key = take(s.columns * s.size.row);
    s.key_t = take(s.columns * s.size.row);
    s.value = take(s.columns * s.size.value_row);
    s.query = take(s.rows * s.size.row);
    s.scores = take(s.rows * s.columns);
    s.scale = take(s.rows);
    s.sums = take(s.rows * s.size.value_row);
    *words = used;
    return s;
  }
};

// Rows of one problem lie a frame apart, too many streams for the hardware to follow, so each row asks for
// the same row of the next token: all heads of a token fit the second-level cache.
template <class T>
PYENGINE_INLINE void prefetch_row(const Params& p, const T* x) {
  const char* start = reinterpret_cast<const char*>(x);
  const int64_t bytes = p.head_dim * sizeof(T);
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(start + i, 0, 2);
}

// Zeros where the keys of a batch leave padding: its scores get the bias -inf, but -inf + NaN would still be
// NaN.
void clear(const TemporalScratch& s) {
  std::memset(s.key, 0, s.columns * s.size.row * sizeof(float));
  std::memset(s.value, 0, s.columns * s.size.value_row * sizeof(float));
  std::memset(s.query, 0, s.rows * s.size.row * sizeof(float));
}

template <class T, int nv>
void gather_keys(const Params& p, const TemporalScratch& s, int64_t b, int64_t n, int64_t h) {
  const int32_t* source = p.key_source + b * p.key_stride;
  const int64_t count = p.key_count[b], padded = round_up(count, kWidth);
  for (int64_t j = 0; j < count; ++j) {
    key_row<T, nv>(p, b, source[j], n, h, s.key + j * s.size.row);
    const bool in_ring = source[j] < p.ring;
    const int64_t next = (in_ring ? 1 : 3) * p.heads * p.head_dim;
    const T* key = in_ring ? slot<T>(p.ring_key, p, b, source[j], n, h)
                           : active<T>(p, b, source[j] - p.ring, n, kKey, h);
    prefetch_row(p, key + next);
    prefetch_row(p, value_row<T>(p, b, source[j], n, h) + next);
  }
  for (int64_t j = 0; j < padded; j += kWidth)
    for (int64_t d = 0; d < s.size.depth; d += kWidth)
      transpose_block(s.key + j * s.size.row + d, s.size.row, s.key_t + d * s.columns + j, s.columns);
  constexpr int pack = kPairs<T> ? 2 : 1;
  for (int64_t j = 0; j < count; j += pack) {
    const T* odd = pack == 2 && j + 1 < count ? value_row<T>(p, b, source[j + 1], n, h) : nullptr;
    pack_values<T, nv>(p, value_row<T>(p, b, source[j], n, h), odd, s.value + j / pack * s.size.value_row);
  }
}

// All queries of one problem, stage by stage rather than tile by tile: a tile is not read right after it was
// written, which would wait for the stores.
template <class T, int nv>
void attend(const Params& p, const TemporalScratch& s, int64_t b, int64_t n, int64_t h) {
  constexpr int pack = kPairs<T> ? 2 : 1;
  const int32_t* ends = p.key_end + b * p.frames;
  const int frames = static_cast<int>(p.frames);
  for (int i = 0; i < frames; ++i) {
    if (ends[i]) query_row<T, nv>(p, b, i, n, h, s.query + i * s.size.row);
    prefetch_row(p, active<T>(p, b, i, n, kQuery, h) + 3 * p.heads * p.head_dim);
  }
  const auto tiles = [&](auto&& f) {  // f(first row, rows, keys that any of them sees)
    for (int first = 0; first < frames; first += kTileRows) {
      const int rows = frames - first < kTileRows ? frames - first : kTileRows;
      int end = 0;
      for (int i = first; i < first + rows; ++i) end = ends[i] > end ? ends[i] : end;
      f(first, rows, end);
    }
  };
  tiles([&](int first, int rows, int end) {
    gemm<kPairs<T>>(s.query + first * s.size.row, s.size.row, s.key_t, s.columns,
                    s.scores + first * s.columns, s.columns, rows, (end + kWidth - 1) / kWidth,
                    static_cast<int>(s.size.depth));
  });
  tiles([&](int first, int rows, int end) {
    for (int i = first; i < first + rows; ++i) {
      const float* bias = p.bias + (b * p.frames + i) * p.key_stride;
      const Softmax row = softmax<T>(s.scores + i * s.columns, bias, (end + kWidth - 1) / kWidth, kLowest);
      s.scale[i] = ends[i] ? 1 / row.sum : 0;
    }
  });
  tiles([&](int first, int rows, int end) {
    gemm<kPairs<T>>(s.scores + first * s.columns, s.columns, s.value, s.size.value_row,
                    s.sums + first * s.size.value_row, s.size.value_row, rows, vectors<nv>(p),
                    (end + pack - 1) / pack);
  });
  for (int i = 0; i < frames; ++i) {
    Vec v[nv ? nv : kMaxVectors];
    for (int d = 0; d < vectors<nv>(p); ++d)
      v[d] = ends[i] ? load(s.sums + i * s.size.value_row + d * kWidth) * set(s.scale[i]) : set(0);
    T* out = out_row<T>(p, b, i, n, h);
    store_row<nv>(p, out, v);
    __builtin_prefetch(out + p.heads * p.head_dim, 1, 2);
    __builtin_prefetch(out + p.heads * p.head_dim + p.head_dim / 2, 1, 2);
  }
}

template <class T, int nv>
void temporal_items(const Params& p, int64_t begin, int64_t end, float* memory) {
  const Tiles tiles;
  int64_t words, cleared = -1;
  const TemporalScratch s = TemporalScratch::at<T>(p, memory, &words);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / p.tokens, n = item % p.tokens;
    if (b != cleared) clear(s);
    cleared = b;
    for (int64_t h = 0; h < p.heads; ++h) {
      gather_keys<T, nv>(p, s, b, n, h);
      attend<T, nv>(p, s, b, n, h);
      for (int64_t i = 0; p.append_slot && i < p.frames; ++i) append_row<T, nv>(p, b, i, n, h);
    }
  }
}

}  // namespace

}  // namespace pyengine::ops::PYENGINE_ISA
