// Scope "frame" on tensor cores: blocked attention with an online softmax, long keys, four warps per block.
//
// A block has queries of one frame and walks over tiles of 64 or 32 keys, each of one visible frame, so no
// tile needs a mask. Keys are never rotated: R_i q . R_j k = (R_{i-j} q) . k, so queries are turned once per
// visible frame instead, in shared memory, and tiles of a ring are used as they lie. Active keys are not
// normalised either: their gain goes into the turned queries and their norm scales the columns of scores.
#pragma once

#include "ops/frame_window_attention/cuda_layout.h"
#include "ops/frame_window_attention/cuda_tiles.h"

namespace pyengine::ops::cuda {

// Where the walk over keys is: entry of the list, first token, tiles still to do.
struct KeyPlace {
  int entry, token, left;
};
template <int keys>
PYENGINE_DEVICE void advance(const AttentionParams& p, KeyPlace& at) {
  at.token += keys, --at.left;
  if (at.token >= p.tokens) at.token = 0, ++at.entry;
}

// The sources that a frame sees, and this block's part of their tiles of keys. All threads of a block.
template <int threads, int keys>
PYENGINE_DEVICE KeyPlace find_tiles(const AttentionParams& p, int b, int i, int split, int* list,
                                    int* flags) {
  const int sources = p.ring + p.frames, thread = thread_index();
  for (int s = thread; s < sources; s += threads) flags[s] = sees(p, stream_of(p, b), i, s);
  sync_block();
  for (int s = thread; s < sources; s += threads) {
    int before = 0;
    for (int j = 0; j < s; ++j) before += flags[j];
    if (flags[s]) list[before] = s;
  }
  int count = 0;
  for (int s = 0; s < sources; ++s) count += flags[s];
  sync_block();
  const int frame_tiles = (p.tokens + keys - 1) / keys;
  const int64_t all = static_cast<int64_t>(count) * frame_tiles;
  const int begin = static_cast<int>(all * split / p.splits),
            end = static_cast<int>(all * (split + 1) / p.splits);
  return {begin / frame_tiles, begin % frame_tiles * keys, end - begin};
}

// Sums, highest scores and weights of one part of the keys, of 16 queries from `token` on; combine_kernel
// puts the parts together.
template <int D>
PYENGINE_DEVICE void store_part(const AttentionParams& p, const float (*o)[4], const TileSoftmax& state,
                                int b, int i, int h, int split, int token) {
  const int g = lane_index() / 4, t = lane_index() % 4;
  const int64_t rows = static_cast<int64_t>(p.batch) * p.frames * p.tokens * p.heads;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float sum = sum_over<4>(state.sum[r]);
    const int n = token + g + 8 * r;
    if (n >= p.tokens) continue;
    const int64_t row =
        split * rows + ((static_cast<int64_t>(b) * p.frames + i) * p.tokens + n) * p.heads + h;
    Pair* to = reinterpret_cast<Pair*>(p.partial + row * D);
#pragma unroll
    for (int j = 0; j < D / 8; ++j) to[4 * j + t] = {o[j][2 * r], o[j][2 * r + 1]};
    if (t == 0) reinterpret_cast<Pair*>(p.partial + p.splits * rows * D)[row] = {state.max[r], sum};
  }
}

// `tiles` query tiles of 16 rows per warp. More mean fewer reads of shared memory per product, and more
// registers.
template <class T, int D, int tiles>
struct Frame {
  static constexpr int kRow = kStride<D>;
  static constexpr int kUnits = D / 8;
  static constexpr int kWarps = kBlockThreads / kWarp;
  static constexpr int kWarpRows = tiles * kTile;
  static constexpr int kQueryRows = kWarps * kWarpRows;
  static constexpr int kKeys = frame_keys(D, tiles);
  static constexpr int kColumns = kKeys / 8;  // score tiles

  const AttentionParams& p;
  const FrameLayout layout;
  int b, h, i, first, split;  // batch, head, query frame, first token, part of the keys
  float *query_gain, *key_gain, *key_norm;
  Pair* turns;  // of this warp
  int *list, *flags;
  T *query, *keys, *values;  // `query`: of this warp

  PYENGINE_DEVICE explicit Frame(const AttentionParams& params)
      : p(params), layout(D, kRow, p.ring + p.frames, tiles) {
    const int blocks = (p.tokens + kQueryRows - 1) / kQueryRows;
    i = p.frames - 1 - block_x() / blocks;  // the last frames see most, so they start first
    first = block_x() % blocks * kQueryRows;
    h = block_y(), b = block_z() / p.splits, split = block_z() % p.splits;
    char* memory = shared_memory();
    query_gain = reinterpret_cast<float*>(memory + layout.gains), key_gain = query_gain + D;
    turns = reinterpret_cast<Pair*>(memory + layout.turns) + warp_index() * (D / 2);
    key_norm = reinterpret_cast<float*>(memory + layout.key_norm);
    list = reinterpret_cast<int*>(memory + layout.list),
    flags = reinterpret_cast<int*>(memory + layout.flags);
    query = reinterpret_cast<T*>(memory + layout.query) + warp_index() * kWarpRows * kRow;
    keys = reinterpret_cast<T*>(memory + layout.keys);
    values = reinterpret_cast<T*>(memory + layout.values);
  }

  PYENGINE_DEVICE KeyPlace prepare() {
    for (int d = thread_index(); d < D; d += kBlockThreads) {
      query_gain[d] = p.score_scale * (p.q_gain ? p.q_gain[d] : 1);
      key_gain[d] = p.k_gain ? p.k_gain[d] : 1;
    }
    return find_tiles<kBlockThreads, kKeys>(p, b, i, split, list, flags);
  }

  PYENGINE_DEVICE void load(const KeyPlace& at, int stage) {
    const int source = list[at.entry], rows = p.tokens - at.token;
    const bool in_ring = source < p.ring;
    const int64_t step = static_cast<int64_t>(p.heads) * D * (in_ring ? 1 : 3);
    const int64_t offset = in_ring ? slot_offset(p, b, source, at.token, h) : 0;
    T *key_tile = keys + stage * kKeys * kRow, *value_tile = values + stage * kKeys * kRow;
    if (in_ring && p.key_scale) {
      const auto *key = static_cast<const float8_e4m3*>(ring_of(p, b, kKey)) + offset,
                 *value = static_cast<const float8_e4m3*>(ring_of(p, b, kValue)) + offset;
      for (int e = thread_index(); e < kKeys * kUnits; e += kBlockThreads) {
        const int row = e / kUnits, unit = e % kUnits;
        Words4 k{}, v{};
        if (row < rows) {
          k = widen<T>(key + row * step + 8 * unit, p.key_scale[h]);
          v = widen<T>(value + row * step + 8 * unit, p.value_scale[h]);
        }
        *reinterpret_cast<Words4*>(key_tile + row * kRow + 8 * unit) = k;
        *reinterpret_cast<Words4*>(value_tile + row * kRow + 8 * unit) = v;
      }
    } else {
      const T* key = in_ring ? static_cast<const T*>(ring_of(p, b, kKey)) + offset
                             : active_row<T>(p, b, source - p.ring, at.token, kKey, h);
      const T* value = in_ring ? static_cast<const T*>(ring_of(p, b, kValue)) + offset
                               : active_row<T>(p, b, source - p.ring, at.token, kValue, h);
#pragma unroll 2
      for (int k = 0; k < (kKeys * kUnits + kBlockThreads - 1) / kBlockThreads; ++k) {
        const int e = thread_index() + k * kBlockThreads;
        if (kKeys * kUnits % kBlockThreads && e >= kKeys * kUnits) break;
        const int row = e / kUnits, unit = e % kUnits;
        const bool valid = row < rows;
        const int64_t from = valid ? row * step : 0;  // never an address past the array
        copy_unit<D>(key_tile + row * kRow, key + from, unit, valid);
        copy_unit<D>(value_tile + row * kRow, value + from, unit, valid);
      }
    }
    commit_copies();
  }

  // This warp's queries, normalised and turned to the frame at hand: R_{i-j}, then the gain of active keys.
  PYENGINE_DEVICE void turn_queries(int source) {
    const int lane = lane_index(), g = lane / 4;
    const int stream = stream_of(p, b);
    const int64_t distance = index_of(p, stream, p.ring + i) - index_of(p, stream, source);
    sync_warp();  // nobody reads the last frame's queries any more
    if (p.rotation != Rotation::none)
      for (int k = lane; k < D / 2; k += kWarp)
        turns[k] = k < p.rotary_dim / 2 ? cosine_sine(p, distance, k) : Pair{1, 0};
    sync_warp();
    const float* after = p.k_gain && source >= p.ring ? key_gain : nullptr;
#pragma unroll 1
    for (int row = g; row < kWarpRows; row += 8) {
      const int n = first + warp_index() * kWarpRows + row;
      const T* from = active_row<T>(p, b, i, n < p.tokens ? n : p.tokens - 1, kQuery, h);
      const float norm = p.q_gain ? inverse_rms<T, D>(p, from) : 1;
      turn_row<T, D>(query + row * kRow, Turn<T>{p, from, norm, query_gain, turns, after});
    }
    sync_warp();
  }

  // Inverse root mean squares of a tile of active keys. A quad per row.
  PYENGINE_DEVICE void norm_keys(int stage) {
    const int t = lane_index() % 4;
    for (int row = thread_index() / 4; row < kKeys; row += kBlockThreads / 4) {
      const float norm = inverse_rms<T, D>(p, keys + (stage * kKeys + row) * kRow);
      if (t == 0) key_norm[row] = norm;
    }
  }

  using Scores = float[kColumns][4];
  using Sums = float[D / 8][4];

  PYENGINE_DEVICE void score(int stage, Scores* s) {
    const int lane = lane_index();
    const T* key = keys + (stage * kKeys + lane % 8 + lane / 16 * 8) * kRow + lane / 8 % 2 * 8;
    const T* row = query + lane % 16 * kRow + lane / 16 * 8;
#pragma unroll
    for (int m = 0; m < tiles; ++m)
#pragma unroll
      for (int j = 0; j < kColumns; ++j) s[m][j][0] = s[m][j][1] = s[m][j][2] = s[m][j][3] = 0;
#pragma unroll
    for (int d = 0; d + 16 <= D; d += 16) {
      uint32_t a[tiles][4];
#pragma unroll
      for (int m = 0; m < tiles; ++m) load_matrices4(a[m], row + m * kTile * kRow + d);
#pragma unroll
      for (int j = 0; j < kColumns; j += 2) {
        uint32_t k[4];
        load_matrices4(k, key + 8 * j * kRow + d);
#pragma unroll
        for (int m = 0; m < tiles; ++m) {
          multiply16<T>(s[m][j], a[m], k);
          multiply16<T>(s[m][j + 1], a[m], k + 2);
        }
      }
    }
    if constexpr (D % 16) {  // 8 products are left
      const T* key_tail = keys + (stage * kKeys + lane % 16) * kRow + D - 8;
      const T* row_tail = query + lane % 16 * kRow + D - 8;
      uint32_t a[tiles][2];
#pragma unroll
      for (int m = 0; m < tiles; ++m) load_matrices2(a[m], row_tail + m * kTile * kRow);
#pragma unroll
      for (int j = 0; j < kColumns; j += 2) {
        uint32_t k[2];
        load_matrices2(k, key_tail + 8 * j * kRow);
#pragma unroll
        for (int m = 0; m < tiles; ++m) {
          multiply8<T>(s[m][j], a[m], k);
          multiply8<T>(s[m][j + 1], a[m], k + 1);
        }
      }
    }
  }

  PYENGINE_DEVICE void attend(KeyPlace at, Sums* o, TileSoftmax* state) {
    int stage = 0, turned = -1;
    if (at.left) load(at, 0);
    while (at.left) {
      const int source = list[at.entry], columns = p.tokens - at.token;
      const bool normalises = p.k_gain && source >= p.ring;
      wait_copies<0>();
      sync_block();  // this tile is there, and everyone is done with the one before
      advance<kKeys>(p, at);
      if (at.left) load(at, stage ^ 1);
      if (normalises) {
        norm_keys(stage);
        sync_block();
      }
      if (source != turned) turn_queries(source);
      turned = source;
      Scores s[tiles];
      score(stage, s);
      if (normalises || columns < kKeys) {
#pragma unroll
        for (int j = 0; j < kColumns; ++j)
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            const int column = 8 * j + 2 * (lane_index() % 4) + c;
            const float norm = normalises ? key_norm[column] : 1;
#pragma unroll
            for (int m = 0; m < tiles; ++m) {
              s[m][j][c] = column < columns ? s[m][j][c] * norm : -INFINITY;
              s[m][j][c + 2] = column < columns ? s[m][j][c + 2] * norm : -INFINITY;
            }
          }
      }
#pragma unroll
      for (int m = 0; m < tiles; ++m) {
        float shrink[2];
        to_weights<kColumns>(s[m], state[m], shrink);
#pragma unroll
        for (int j = 0; j < D / 8; ++j) {
          o[m][j][0] *= shrink[0], o[m][j][1] *= shrink[0];
          o[m][j][2] *= shrink[1], o[m][j][3] *= shrink[1];
        }
      }
#pragma unroll
      for (int k = 0; k < kKeys / 16; ++k)
        add_values<T, D, tiles, kColumns>(o, s, k, values + (stage * kKeys + 16 * k) * kRow);
      stage ^= 1;
    }
  }

  PYENGINE_DEVICE void store(const Sums* o, const TileSoftmax* state) {
    sync_warp();
#pragma unroll
    for (int m = 0; m < tiles; ++m) store_sums<T, D>(o[m], state[m], query + m * kTile * kRow);
    sync_warp();
    for (int e = lane_index(); e < kWarpRows * kUnits; e += kWarp) {
      const int row = e / kUnits, unit = e % kUnits, n = first + warp_index() * kWarpRows + row;
      if (n < p.tokens)
        *reinterpret_cast<Words4*>(out_row<T>(p, b, i, n, h) + 8 * unit) =
            *reinterpret_cast<const Words4*>(query + row * kRow + 8 * unit);
    }
  }

  PYENGINE_DEVICE void run() {
    Sums o[tiles] = {};
    TileSoftmax state[tiles];
    attend(prepare(), o, state);
    if (p.splits == 1)
      store(o, state);
    else
      for (int m = 0; m < tiles; ++m)
        store_part<D>(p, o[m], state[m], b, i, h, split, first + warp_index() * kWarpRows + m * kTile);
  }
};

template <class T, int D, int tiles>
PYENGINE_KERNEL(kBlockThreads, 2)
frame_kernel(const AttentionParams p) {
  Frame<T, D, tiles>(p).run();
}

// One warp per row: parts weighed by their highest scores.
template <class T>
PYENGINE_KERNEL(kBlockThreads, 1)
combine_kernel(const AttentionParams p) {
  const int64_t rows = static_cast<int64_t>(p.batch) * p.frames * p.tokens * p.heads;
  const int64_t row = static_cast<int64_t>(block_x()) * (kBlockThreads / kWarp) + warp_index();
  if (row >= rows) return;
  const Pair* states = reinterpret_cast<const Pair*>(p.partial + p.splits * rows * p.head_dim) + row;
  float max = kLowest, sum = 0;
  for (int k = 0; k < p.splits; ++k) max = states[k * rows].x > max ? states[k * rows].x : max;
  for (int k = 0; k < p.splits; ++k) sum += states[k * rows].y * exp2_fast(states[k * rows].x - max);
  const float inverse = sum > 0 ? 1 / sum : 0;
  for (int d = lane_index(); d < p.head_dim; d += kWarp) {
    float value = 0;
    for (int k = 0; k < p.splits; ++k)
      value += p.partial[(k * rows + row) * p.head_dim + d] * exp2_fast(states[k * rows].x - max);
    static_cast<T*>(p.out)[row * p.head_dim + d] = from_float<T>(value * inverse);
  }
}

}  // namespace pyengine::ops::cuda
