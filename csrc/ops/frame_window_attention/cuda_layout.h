// What lies where in the shared memory of the tensor-core kernels. Heuristics count the same bytes.
#pragma once

#include "core/cuda/numbers.h"

namespace pyengine::ops::cuda {

constexpr int kBlockThreads = 128;  // of the tensor-core kernels: four warps
constexpr int kChunk = 64;          // keys of one softmax step
constexpr int kTile = 16;           // rows of a tensor-core tile

PYENGINE_BOTH int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Offsets in bytes, each a multiple of 16.
struct TemporalLayout {
  int64_t gains;    // [2, head_dim] float: of queries (with the score's scale), of keys
  int64_t turns;    // [sources, head_dim / 2] Pair
  int64_t visible;  // [frames, words] uint64: bit k of word c = the frame sees entry 64 c + k of the list
  int64_t list;     // [sources] int: sources that any frame sees
  int64_t flags;    // [sources] int
  int64_t tiles;    // [stages, sequences, rows, stride] T: queries, keys, values
  int64_t bytes;
  int words;        // of 64 list entries
  int query_rows, key_rows, rows;  // of one sequence: queries, keys (and as many values), all of them
  int64_t stage_values;            // from one stage to the next

  PYENGINE_BOTH TemporalLayout(int head_dim, int stride, int frames, int ring, int sequences, int stages) {
    const int sources = ring + frames;
    words = (sources + kChunk - 1) / kChunk;
    query_rows = static_cast<int>(round_up(frames, kTile));
    key_rows = static_cast<int>(round_up(sources, kTile));
    rows = query_rows + 2 * key_rows;
    stage_values = static_cast<int64_t>(sequences) * rows * stride;
    gains = 0;
    turns = round_up(gains + 2 * head_dim * 4, 16);
    visible = round_up(turns + static_cast<int64_t>(sources) * head_dim / 2 * 8, 16);
    list = round_up(visible + static_cast<int64_t>(frames) * words * 8, 16);
    flags = round_up(list + sources * 4, 16);
    tiles = round_up(flags + sources * 4, 16);
    bytes = tiles + stages * stage_values * 2;
  }
};

struct FrameLayout {
  int64_t gains;     // [2, head_dim] float
  int64_t turns;     // [warps, head_dim / 2] Pair
  int64_t key_norm;  // [kChunk] float
  int64_t list;      // [sources] int: sources that the query frame sees
  int64_t flags;     // [sources] int
  int64_t query;     // [query_rows, stride] T
  int64_t keys;      // [2, kChunk, stride] T
  int64_t values;    // [2, kChunk, stride] T
  int64_t bytes;

  PYENGINE_BOTH FrameLayout(int head_dim, int stride, int sources, int query_rows) {
    gains = 0;
    turns = round_up(gains + 2 * head_dim * 4, 16);
    key_norm = round_up(turns + kBlockThreads / 32 * head_dim / 2 * 8, 16);
    list = round_up(key_norm + kChunk * 4, 16);
    flags = round_up(list + static_cast<int64_t>(sources) * 4, 16);
    query = round_up(flags + static_cast<int64_t>(sources) * 4, 16);
    keys = query + static_cast<int64_t>(query_rows) * stride * 2;
    values = keys + 2 * static_cast<int64_t>(kChunk) * stride * 2;
    bytes = values + 2 * static_cast<int64_t>(kChunk) * stride * 2;
  }
};

}  // namespace pyengine::ops::cuda
