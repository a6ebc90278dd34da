// Scope "frame": blocked attention of all tokens of a frame over all tokens of the frames that it sees.
// Keys and values of one (batch, head) are packed once per range of items; softmax runs online over runs of
// neighbouring visible frames, so no mask is ever applied inside a frame. Only cpu.cc includes this.
#pragma once

#include "ops/frame_window_attention/rows.h"

namespace pyengine::ops::PYENGINE_ISA {

namespace {

constexpr int64_t kBlockColumns =
    6 * kLane;                        // keys of one transposed block: contiguous, a few pages of memory
constexpr int64_t kRunColumns = 512;  // keys of one softmax step
constexpr int64_t kQueryRows = 4 * kTileRows;  // share one pass over the keys

struct FrameScratch {
  Sizes size;
  int64_t columns;      // tokens of a frame, padded
  int64_t run_columns;  // keys of one softmax step: whole frames
  float *key_t, *value, *rows, *query, *scores, *sums, *out;

  template <class T>
  static FrameScratch at(const Params& p, float* memory, int64_t* words) {
    FrameScratch s{};
    s.size = Sizes::of<T>(p);
    s.columns = round_up(p.tokens, kLane);
    s.run_columns = s.columns > kRunColumns ? s.columns : kRunColumns / s.columns * s.columns;
    int64_t used = 0;
    const auto take = [&](int64_t n) {
      float* start = memory + used;
      used += round_up(n, kLane);
      return start;
    };
    const int64_t keys = (p.ring + p.frames) * s.columns;
    s.key_t = take(keys * s.size.row);
    s.value = take((keys / (kPairs<T> ? 2 : 1) + kDepthMultiple<T>)*s.size.value_row);
    s.rows = take(kBlockColumns * s.size.row);
    s.query = take(kQueryRows * s.size.row);
    s.scores = take(kQueryRows * s.run_columns);
    s.sums = take(kTileRows * s.size.value_row);
    s.out = take(kQueryRows * s.size.value_row);
    *words = used;
    return s;
  }
};

// Keys of one frame as transposed blocks [depth, width] one after the other, values as rows of words.
template <class T, int dim>
void pack_frame(const Params& p, const FrameScratch& s, int64_t b, int64_t source, int64_t h,
                int64_t position) {
  float* key_t = s.key_t + position * s.columns * s.size.row;
  const float* const* rotary = p.rotary + b % p.streams * (p.ring + p.frames) + source;
  for (int64_t first = 0; first < s.columns; first += kBlockColumns) {
    const int64_t width = s.columns - first < kBlockColumns ? s.columns - first : kBlockColumns;
    for (int64_t n = 0; n < width; ++n) {
      const auto key = [&](int64_t) { return key_place<T>(p, b, source, first + n, h); };
      if (first + n < p.tokens)
        turn_rows<T, dim, false>(p, key_turn(p, source), key, rotary, 1, s.rows + n * s.size.row, s.size.row,
                                 nullptr);
      else
        std::memset(s.rows + n * s.size.row, 0, s.size.row * sizeof(float));
    }
    for (int64_t n = 0; n < width; n += kWidth)
      for (int64_t d = 0; d < s.size.depth; d += kWidth)
        transpose_block(s.rows + n * s.size.row + d, s.size.row, key_t + first * s.size.row + d * width + n,
                        width);
  }
  constexpr int64_t pack = kPairs<T> ? 2 : 1;
  float* value = s.value + position * s.columns / pack * s.size.value_row;
  for (int64_t n = 0; n < s.columns; n += pack, value += s.size.value_row) {
    if (n >= p.tokens) {
      std::memset(value, 0, s.size.value_row * sizeof(float));
      continue;
    }
    const T* odd = n + 1 < p.tokens ? value_place<T>(p, b, source, n + 1, h) : nullptr;
    pack_values<T, dim>(p, value_place<T>(p, b, source, n, h), odd, value);
  }
}

// One softmax step: `rows` queries over the frames at positions [first, last).
template <class T, int dim>
void attend_run(const Params& p, const FrameScratch& s, int64_t first, int64_t last, int rows,
                Softmax* state) {
  constexpr int64_t pack = kPairs<T> ? 2 : 1;
  const int64_t width = (last - first) * s.columns;
  for (int64_t position = first; position < last; ++position)
    for (int64_t c = 0; c < s.columns; c += kBlockColumns) {
      const int64_t block = s.columns - c < kBlockColumns ? s.columns - c : kBlockColumns;
      const float* key_t = s.key_t + (position * s.columns + c) * s.size.row;
      for (int m = 0; m < rows; m += kTileRows)
        gemm<kPairs<T>>(s.query + m * s.size.row, s.size.row, key_t, block,
                        s.scores + m * s.run_columns + (position - first) * s.columns + c, s.run_columns,
                        rows - m < kTileRows ? rows - m : kTileRows, static_cast<int>(block / kWidth),
                        static_cast<int>(s.size.depth));
    }
  for (int m = 0; m < rows; m += kTileRows) {
    const int tile = rows - m < kTileRows ? rows - m : kTileRows;
    float shrink[kTileRows];
    for (int i = 0; i < tile; ++i) {
      float* scores = s.scores + (m + i) * s.run_columns;
      for (int64_t position = 0; position < last - first; ++position)
        for (int64_t n = p.tokens; n < s.columns; ++n) scores[position * s.columns + n] = -INFINITY;
      Softmax& row = state[m + i];
      const Softmax step = softmax<T>(scores, static_cast<int>(width / kWidth), row.max);
      shrink[i] = exp2f(row.max - step.max);
      row.sum = row.sum * shrink[i] + step.sum;
      row.max = step.max;
    }
    gemm<kPairs<T>>(s.scores + m * s.run_columns, s.run_columns,
                    s.value + first * s.columns / pack * s.size.value_row, s.size.value_row, s.sums,
                    s.size.value_row, tile, vectors<dim>(p), static_cast<int>(width / pack));
    for (int i = 0; i < tile; ++i) {
      float *total = s.out + (m + i) * s.size.value_row, *sums = s.sums + i * s.size.value_row;
      for (int64_t d = 0; d < s.size.value_row; d += kWidth)
        store(total + d, madd(load(total + d), set(shrink[i]), load(sums + d)));
    }
  }
}

// Queries [first, first + rows) of frame i.
template <class T, int dim>
void attend_queries(const Params& p, const FrameScratch& s, int64_t b, int64_t h, int64_t i, int64_t first,
                    int rows) {
  Softmax state[kQueryRows];
  const int64_t stream = b % p.streams, end = p.key_end[stream * p.frames + i];
  const float* bias = p.bias + (stream * p.frames + i) * p.key_stride;
  const float* const* rotary = p.rotary + stream * (p.ring + p.frames) + p.ring + i;
  std::memset(s.out, 0, rows * s.size.value_row * sizeof(float));
  for (int m = 0; m < rows; ++m) {
    state[m] = {kLowest, 0};
    const auto query = [&](int64_t) { return active<T>(p, b, i, first + m, kQuery, h); };
    if (end)
      turn_rows<T, dim, false>(p, query_turn(p), query, rotary, 1, s.query + m * s.size.row, s.size.row,
                               nullptr);
  }
  const int64_t longest = s.run_columns / s.columns;
  for (int64_t j = 0, run; j < end; j += run) {
    for (run = 0; run < longest && j + run < end && bias[j + run] == 0; ++run) {
    }
    if (run) attend_run<T, dim>(p, s, j, j + run, rows, state);
    run = run ? run : 1;
  }
  for (int m = 0; m < rows; ++m) {
    const float scale = state[m].sum > 0 ? 1 / state[m].sum : 0;
    unpack_sums<T, dim>(p, s.out + m * s.size.value_row, scale, out_row<T>(p, b, i, first + m, h));
  }
}

template <class T, int dim>
void frame_items(const Params& p, int64_t begin, int64_t end, float* memory) {
  const Tiles tiles;
  int64_t words, packed = -1;
  const FrameScratch s = FrameScratch::at<T>(p, memory, &words);
  std::memset(s.rows, 0, kBlockColumns * s.size.row * sizeof(float));  // the padding of rows stays zero
  std::memset(s.query, 0, kQueryRows * s.size.row * sizeof(float));
  for (int64_t item = begin; item < end; ++item) {
    const int64_t i = item % p.frames, sequence = item / p.frames, h = sequence % p.heads,
                  b = sequence / p.heads, stream = b % p.streams, count = p.key_count[stream];
    if (sequence != packed) {
      for (int64_t j = 0; j < count; ++j)
        pack_frame<T, dim>(p, s, b, p.key_source[stream * p.key_stride + j], h, j);
      float* past = s.value + count * s.columns / (kPairs<T> ? 2 : 1) * s.size.value_row;
      std::memset(past, 0, kDepthMultiple<T> * s.size.value_row * sizeof(float));  // met by weights of zero
    }
    packed = sequence;
    for (int64_t n = 0; n < p.tokens; n += kQueryRows)
      attend_queries<T, dim>(p, s, b, h, i, n,
                             static_cast<int>(p.tokens - n < kQueryRows ? p.tokens - n : kQueryRows));
  }
}

}  // namespace

}  // namespace pyengine::ops::PYENGINE_ISA
