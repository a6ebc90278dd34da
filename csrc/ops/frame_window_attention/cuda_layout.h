// What lies where in the shared memory of the tensor-core kernels. Heuristics count the same bytes.
#pragma once

#include "core/cuda/qualifiers.h"

namespace pyengine::ops::cuda {

constexpr int kBlockThreads = 128;  // of the tensor-core kernels: four warps
constexpr int kChunk = 64;          // keys whose visibility is one word in scope temporal
constexpr int kTile = 16;           // rows of a tensor-core tile

constexpr int kMaxSources = 4096;  // ring slots and active frames: with more, offsets could leave 32 bits

PYENGINE_BOTH int round_up(int n, int multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// Offsets in bytes, each a multiple of 16.
struct TemporalLayout {
  int gains;    // [2, head_dim] float: of queries (with the score's scale), of keys
  int turns;    // [sources, head_dim / 2] Pair
  int visible;  // [frames, words] uint64: bit k of word c = the frame sees entry 64 c + k of the list
  int list;     // [sources] int: sources that any frame sees
  int flags;    // [sources] int
  int tiles;    // [stages, sequences, rows, stride] T: queries, keys, values
  int bytes;
  int words;                       // of 64 list entries
  int query_rows, key_rows, rows;  // of one sequence: queries, keys (and as many values), all of them
  int stage_values;                // from one stage to the next

  PYENGINE_BOTH TemporalLayout(int head_dim, int stride, int frames, int ring, int sequences, int stages) {
    const int sources = ring + frames;
    words = (sources + kChunk - 1) / kChunk;
    query_rows = round_up(frames, kTile);
    key_rows = round_up(sources, kTile);
    rows = query_rows + 2 * key_rows;
    stage_values = sequences * rows * stride;
    gains = 0;
    turns = round_up(gains + 2 * head_dim * 4, 16);
    visible = round_up(turns + sources * head_dim / 2 * 8, 16);
    list = round_up(visible + frames * words * 8, 16);
    flags = round_up(list + sources * 4, 16);
    tiles = round_up(flags + sources * 4, 16);
    bytes = tiles + stages * stage_values * 2;
  }
};

// Keys of a tile of scope "frame", with `tiles` query tiles per warp: what the registers have room for.
PYENGINE_BOTH constexpr int frame_keys(int head_dim, int tiles) {
  return head_dim > 72 && tiles > 1 ? 32 : 64;
}

struct FrameLayout {
  int gains;     // [2, head_dim] float
  int turns;     // [warps, head_dim / 2] Pair
  int key_norm;  // [frame_keys] float
  int list;      // [sources] int: sources that the query frame sees
  int flags;     // [sources] int
  int query;     // [query_rows, stride] T
  int keys;      // [2, frame_keys, stride] T
  int values;    // [2, frame_keys, stride] T
  int bytes;

  PYENGINE_BOTH FrameLayout(int head_dim, int stride, int sources, int tiles) {
    const int key_rows = frame_keys(head_dim, tiles);
    gains = 0;
    turns = round_up(gains + 2 * head_dim * 4, 16);
    key_norm = round_up(turns + kBlockThreads / 32 * head_dim / 2 * 8, 16);
    list = round_up(key_norm + key_rows * 4, 16);
    flags = round_up(list + sources * 4, 16);
    query = round_up(flags + sources * 4, 16);
    keys = query + kBlockThreads / 32 * tiles * kTile * stride * 2;
    values = keys + 2 * key_rows * stride * 2;
    bytes = values + 2 * key_rows * stride * 2;
  }
};

constexpr int kGroupBlockThreads = 256;  // of the warpgroup kernel: two warpgroups
constexpr int kGroupKeys = 128;          // of its tiles

// Panels first, since they start at multiples of 1024 bytes from an address of that kind.
struct GroupFrameLayout {
  int query;     // [2 warpgroups, panels, 64, 64] T
  int keys;      // [2, panels, keys, 64] T
  int values;    // the same
  int gains;     // [2, head_dim] float
  int turns;     // [2 warpgroups, head_dim / 2] Pair
  int key_norm;  // [keys] float
  int list;      // [sources] int: sources that the query frame sees
  int flags;     // [sources] int
  int bytes;     // with room to find such an address

  PYENGINE_BOTH GroupFrameLayout(int head_dim, int sources) {
    query = 0;
    keys = query + kGroupBlockThreads / 2 * head_dim * 2;
    values = keys + 2 * kGroupKeys * head_dim * 2;
    gains = values + 2 * kGroupKeys * head_dim * 2;
    turns = gains + 2 * head_dim * 4;
    key_norm = turns + head_dim * 8;
    list = key_norm + kGroupKeys * 4;
    flags = round_up(list + sources * 4, 16);
    bytes = round_up(flags + sources * 4, 16) + 1024;
  }
};

}  // namespace pyengine::ops::cuda
