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
  float *key, *key_t, *value, *query, *scores, *sums;
  float *key_factor, *query_factor;  // left by the norms
  float* scale;                      // of a query's sums
  const void **key_at, **value_at;   // rows of the first head in one place, keys of the ring first
  const float** rotary;              // of keys

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
    s.sums = take(kTileRows * s.size.value_row);
    s.key_factor = take(s.columns);
    s.query_factor = take(s.rows);
    s.scale = take(s.rows);
    constexpr int64_t address = sizeof(void*) / sizeof(float);
    s.key_at = reinterpret_cast<const void**>(take(s.columns * address));
    s.value_at = reinterpret_cast<const void**>(take(s.columns * address));
    s.rotary = reinterpret_cast<const float**>(take(s.columns * address));
    *words = used;
    return s;
  }
};

// Rows of one problem lie a frame apart, too many streams for the hardware to follow, so each row asks for
// the same row of the next token: all heads of a token fit the second-level cache.
template <int dim, class T>
PYENGINE_INLINE void prefetch_row(const Params& p, const T* x) {
  const char* start = reinterpret_cast<const char*>(x);
  const int64_t bytes = lanes<dim>(p) * sizeof(T);
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(start + i, 0, 2);
}

// Zeros where the keys of a batch leave padding: its scores get the bias -inf, but -inf + NaN would still be
// NaN.
void clear(const TemporalScratch& s) {
  std::memset(s.key, 0, s.columns * s.size.row * sizeof(float));
  std::memset(s.value, 0, s.columns * s.size.value_row * sizeof(float));
  std::memset(s.query, 0, s.rows * s.size.row * sizeof(float));
  std::memset(s.key_factor, 0, s.columns * sizeof(float));
}

// Where the keys and values of a place are. Returns how many of them are in the ring.
template <class T>
int64_t find_rows(const Params& p, const TemporalScratch& s, int64_t b, int64_t n) {
  const int64_t stream = b % p.streams;
  const int32_t* source = p.key_source + stream * p.key_stride;
  const float* const* rotary = p.rotary + stream * (p.ring + p.frames);
  int64_t in_ring = 0;
  for (int64_t j = 0; j < p.key_count[stream]; ++j) {
    s.key_at[j] = key_place<T>(p, b, source[j], n, 0);
    s.value_at[j] = value_place<T>(p, b, source[j], n, 0);
    if (p.rotation != Rotation::none) s.rotary[j] = rotary[source[j]];
    in_ring += source[j] < p.ring;
  }
  return in_ring;
}

template <class T, int dim>
void gather_keys(const Params& p, const TemporalScratch& s, int64_t in_ring, int64_t count, int64_t h) {
  const int64_t head = h * lanes<dim>(p), next = p.heads * lanes<dim>(p);
  const auto turn = [&](int64_t first, int64_t last, int64_t source, int64_t ahead) {
    const auto key = [&, at = s.key_at + first](int64_t j) {
      const T* x = static_cast<const T*>(at[j]) + head;
      prefetch_row<dim>(p, x + ahead);
      return x;
    };
    turn_rows<T, dim, kPairs<T>>(p, key_turn(p, source), key, s.rotary + first, last - first,
                                 s.key + first * s.size.row, s.size.row, s.key_factor + first);
  };
  turn(0, in_ring, 0, next);
  turn(in_ring, count, p.ring, 3 * next);
  for (int64_t j = 0; j < count; j += kWidth)
    for (int64_t d = 0; d < s.size.depth; d += kWidth)
      transpose_block(s.key + j * s.size.row + d, s.size.row, s.key_t + d * s.columns + j, s.columns);
  constexpr int pack = kPairs<T> ? 2 : 1;
  const auto value = [&](int64_t j) {
    const T* x = static_cast<const T*>(s.value_at[j]) + head;
    prefetch_row<dim>(p, x + (j < in_ring ? next : 3 * next));
    return x;
  };
  for (int64_t j = 0; j < count; j += pack)
    pack_values<T, dim>(p, value(j), pack == 2 && j + 1 < count ? value(j + 1) : nullptr,
                        s.value + j / pack * s.size.value_row);
}

// Scores of queries [first, first + rows) to weights, and what their sums are to be multiplied with.
template <class T, int rows>
PYENGINE_INLINE void weigh(const Params& p, const TemporalScratch& s, int64_t stream, int first, int n) {
  float* scores = s.scores + first * s.columns;
  const float* bias = p.bias + (stream * p.frames + first) * p.key_stride;
  const int64_t columns = s.columns, key_stride = p.key_stride;
  Vec most[rows], total[rows];
#pragma GCC unroll 8
  for (int m = 0; m < rows; ++m) {
    most[m] = set(kLowest);
    const Vec factor = set(s.query_factor[first + m]);
    for (int i = 0; i < n; ++i) {
      float* at = scores + m * columns + i * kWidth;
      Vec v = load(at);
      if constexpr (kPairs<T>) v = v * (load(s.key_factor + i * kWidth) * factor);
      v = v + load(bias + m * key_stride + i * kWidth);
      store(at, v);
      most[m] = max(most[m], v);
    }
  }
  float highest_of[kWidth];
  store(highest_of, highest_rows<rows>(most));
#pragma GCC unroll 8
  for (int m = 0; m < rows; ++m) total[m] = weights<T>(scores + m * columns, n, highest_of[m]);
  store_part(s.scale + first, set(1) / sum_rows<rows>(total), rows);
}

// Weighted sums of `k` words of values to the rows of the output, times `scale`.
template <class T, int dim>
PYENGINE_INLINE void mix(const Params& p, const TemporalScratch& s, const float* weights, int rows, int k,
                         const float* scale, T* out, int64_t stride) {
#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
  if constexpr (kPairs<T>) {  // straight from the registers
    const auto block = [&](auto tile, auto columns, int64_t i) {
      Vec sums[tile.value][columns.value];
      sum_block<true>(weights, s.columns, s.value + i, s.size.value_row, k, sums);
      for (int m = 0; m < tile.value && m < rows; ++m) {
        const Vec factor = set(scale[m]), *sum = sums[m];
        store_columns<dim>(sum[0] * factor, sum[columns.value - 1] * factor, i, p.head_dim, out + m * stride);
      }
    };
    for (int64_t i = 0; i < lanes<dim>(p); i += kBlock) {
      const auto tall = [&](auto tile) {
        lanes<dim>(p) - i > kWidth ? block(tile, Count<2>{}, i) : block(tile, Count<1>{}, i);
      };
      rows > 4 ? tall(Count<kTileRows>{}) : rows > 2 ? tall(Count<4>{}) : tall(Count<2>{});
    }
    return;
  }
#endif
  gemm<kPairs<T>>(weights, s.columns, s.value, s.size.value_row, s.sums, s.size.value_row, rows,
                  vectors<dim>(p), k);
  for (int m = 0; m < rows; ++m)
    unpack_sums<T, dim>(p, s.sums + m * s.size.value_row, scale[m], out + m * stride);
}

// All queries of one problem, stage by stage rather than tile by tile: a tile is not read right after it was
// written, which would wait for the stores.
template <class T, int dim>
void attend(const Params& p, const TemporalScratch& s, int64_t b, int64_t n, int64_t h) {
  constexpr int pack = kPairs<T> ? 2 : 1;
  const int64_t stream = b % p.streams;
  const int32_t* ends = p.key_end + stream * p.frames;
  const int frames = static_cast<int>(p.frames);
  const int64_t next = p.heads * lanes<dim>(p), frame = p.tokens * next;
  const auto query = [&, first = active<T>(p, b, 0, n, kQuery, h)](int64_t i) {
    const T* x = first + i * 3 * frame;
    prefetch_row<dim>(p, x + 3 * next);
    return x;
  };
  turn_rows<T, dim, kPairs<T>>(p, query_turn(p), query, p.rotary + stream * (p.ring + p.frames) + p.ring,
                               frames, s.query, s.size.row, s.query_factor);
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
    const int vectors = (end + kWidth - 1) / kWidth, last = first + rows;
    for (; first + kReduceRows <= last; first += kReduceRows)
      weigh<T, kReduceRows>(p, s, stream, first, vectors);
    for (; first < last; ++first) weigh<T, 1>(p, s, stream, first, vectors);
  });
  T* out = out_row<T>(p, b, 0, n, h);
  tiles([&](int first, int rows, int end) {
    const float* weights = s.scores + first * s.columns;
    mix<T, dim>(p, s, weights, rows, (end + pack - 1) / pack, s.scale + first, out + first * frame, frame);
  });
  for (int i = 0; i < frames; ++i, out += frame) {
    if (!ends[i]) std::memset(out, 0, lanes<dim>(p) * sizeof(T));
    __builtin_prefetch(out + next, 1, 2);
    __builtin_prefetch(out + next + lanes<dim>(p) / 2, 1, 2);
  }
}

template <class T, int dim>
void temporal_items(const Params& p, int64_t begin, int64_t end, float* memory) {
  const Tiles tiles;
  int64_t words, cleared = -1;
  const TemporalScratch s = TemporalScratch::at<T>(p, memory, &words);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / p.tokens, n = item % p.tokens;
    if (b != cleared) clear(s);
    cleared = b;
    const int64_t in_ring = find_rows<T>(p, s, b, n);
    for (int64_t h = 0; h < p.heads; ++h) {
      gather_keys<T, dim>(p, s, in_ring, p.key_count[b % p.streams], h);
      attend<T, dim>(p, s, b, n, h);
      for (int64_t i = 0; p.append_slot && i < p.frames; ++i) append_row<T, dim>(p, b, i, n, h);
    }
  }
}

}  // namespace

}  // namespace pyengine::ops::PYENGINE_ISA
