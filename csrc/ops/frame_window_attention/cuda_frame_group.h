// Scope "frame" on Hopper's warpgroups: what cuda_frame.h does, with products of 64 rows that run by
// themselves.
//
// A block has two warpgroups of 64 queries each and walks over tiles of 128 keys of one visible frame. While
// a warpgroup's scores of the next tile and its weights times this tile's values are being multiplied, keys
// are normed and the next tiles copied; scores become weights while values are still multiplied.
#pragma once

#include "core/cuda/warpgroup.h"
#include "ops/frame_window_attention/cuda_frame.h"

namespace pyengine::ops::cuda {

template <class T, int D>
struct GroupFrame {
  static_assert(D % kPanelRow == 0, "whole panels");
  static constexpr int kThreads = kGroupBlockThreads, kKeys = kGroupKeys;
  static constexpr int kUnits = D / 8, kPanels = D / kPanelRow;
  static constexpr int kColumns = kKeys / 8;

  const AttentionParams& p;
  const GroupFrameLayout layout;
  int b, h, i, first, split;  // batch, head, query frame, first token of this warpgroup, part of the keys
  float *query_gain, *key_gain, *key_norm;
  Pair* turns;  // of this warpgroup
  int *list, *flags;
  T *query, *keys, *values;  // panels; `query`: of this warpgroup

  PYENGINE_DEVICE explicit GroupFrame(const AttentionParams& params)
      : p(params), layout(D, p.ring + p.frames) {
    constexpr int rows = kGroupRows * kThreads / kGroup;
    const int blocks = (p.tokens + rows - 1) / rows;
    i = p.frames - 1 - block_x() / blocks;  // the last frames see most, so they start first
    first = block_x() % blocks * rows + group_index() * kGroupRows;
    h = block_y(), b = block_z() / p.splits, split = block_z() % p.splits;
    char* memory = shared_memory();
    memory += (kPanelAlign - panel_address(memory) % kPanelAlign) % kPanelAlign;
    query = reinterpret_cast<T*>(memory + layout.query) + group_index() * kGroupRows * D;
    keys = reinterpret_cast<T*>(memory + layout.keys);
    values = reinterpret_cast<T*>(memory + layout.values);
    query_gain = reinterpret_cast<float*>(memory + layout.gains), key_gain = query_gain + D;
    turns = reinterpret_cast<Pair*>(memory + layout.turns) + group_index() * (D / 2);
    key_norm = reinterpret_cast<float*>(memory + layout.key_norm);
    list = reinterpret_cast<int*>(memory + layout.list);
    flags = reinterpret_cast<int*>(memory + layout.flags);
  }

  PYENGINE_DEVICE KeyPlace prepare() {
    for (int d = thread_index(); d < D; d += kThreads) {
      query_gain[d] = p.score_scale * (p.q_gain ? p.q_gain[d] : 1);
      key_gain[d] = p.k_gain ? p.k_gain[d] : 1;
    }
    return find_tiles<kThreads, kKeys>(p, b, i, split, list, flags);
  }

  PYENGINE_DEVICE T* tile(T* tiles, int stage) const { return tiles + (stage & 1) * kKeys * D; }

  // Starts copying a tile of keys or values to its stage; an fp8 ring's are widened on the way, by this
  // thread.
  PYENGINE_DEVICE void load(const KeyPlace& at, Part part, T* to) {
    const int source = list[at.entry], rows = p.tokens - at.token;
    const bool in_ring = source < p.ring;
    const int64_t step = static_cast<int64_t>(p.heads) * D * (in_ring ? 1 : 3);
    const int64_t offset = in_ring ? slot_offset(p, b, source, at.token, h) : 0;
    const void* ring = in_ring ? ring_of(p, b, part) : nullptr;
    if (in_ring && p.key_scale) {
      const auto* from = static_cast<const float8_e4m3*>(ring) + offset;
      const float scale = (part == kKey ? p.key_scale : p.value_scale)[h];
      for (int e = thread_index(); e < kKeys * kUnits; e += kThreads) {
        const int row = e / kUnits, unit = e % kUnits;
        Words4 x{};
        if (row < rows) x = widen<T>(from + row * step + 8 * unit, scale);
        store_unit(unit_of(to, kKeys, row, unit), x);
      }
      return;
    }
    const T* from = in_ring ? static_cast<const T*>(ring) + offset
                            : active_row<T>(p, b, source - p.ring, at.token, part, h);
#pragma unroll 4
    for (int e = thread_index(); e < kKeys * kUnits; e += kThreads) {
      const int row = e / kUnits, unit = e % kUnits;
      const bool valid = row < rows;
      copy_async(unit_of(to, kKeys, row, unit), from + (valid ? row * step : 0) + 8 * unit, valid);
    }
  }

  // This warpgroup's queries, normalised and turned to a source: R_{i-j}, then the gain of active keys.
  // The block has met since the last turns were read.
  PYENGINE_DEVICE void turn_queries(int source) {
    const int stream = stream_of(p, b);
    const int64_t distance = index_of(p, stream, p.ring + i) - index_of(p, stream, source);
    if (p.rotation != Rotation::none)
      for (int k = thread_index() % kGroup; k < D / 2; k += kGroup)
        turns[k] = k < p.rotary_dim / 2 ? cosine_sine(p, distance, k) : Pair{1, 0};
    sync_group();
    const float* after = p.k_gain && source >= p.ring ? key_gain : nullptr;
#pragma unroll 1
    for (int row = thread_index() % kGroup / 4; row < kGroupRows; row += kGroup / 4) {
      const int n = first + row;
      const T* from = active_row<T>(p, b, i, n < p.tokens ? n : p.tokens - 1, kQuery, h);
      const float norm = p.q_gain ? inverse_rms<T, D>(p, from) : 1;
      const Turn<T> turn{p, from, norm, query_gain, turns, after};
#pragma unroll 1
      for (int u = lane_index() % 4; u < kUnits; u += 4)
        store_unit(unit_of(query, kGroupRows, row, u), turn_unit(turn, u));
    }
    publish_shared();
    sync_group();
  }

  // Inverse root mean squares of a tile of active keys. A quad per row.
  PYENGINE_DEVICE void norm_keys(const T* key) {
    for (int row = thread_index() / 4; row < kKeys; row += kThreads / 4) {
      float squares = 0;
#pragma unroll 1
      for (int u = lane_index() % 4; u < kUnits; u += 4)
        squares += squares_of<T>(*reinterpret_cast<const Words4*>(unit_of(key, kKeys, row, u)));
      const float norm = inverse_root(sum_over<4>(squares) * p.inverse_dim + p.epsilon);
      if (lane_index() % 4 == 0) key_norm[row] = norm;
    }
  }

  using Scores = float[kColumns][4];
  using Sums = float[D / 8][4];
  using Weights = uint32_t[kKeys / 16][4];

  // Starts scores = queries times keys.
  PYENGINE_DEVICE void score(const T* key, Scores& s) {
    begin_products();
#pragma unroll
    for (int k = 0; k < D; k += 16) {
      const int panel = k / kPanelRow, column = k % kPanelRow;
      multiply_panels<T>(s, panel_descriptor(query + panel * kGroupRows * kPanelRow, column),
                         panel_descriptor(key + panel * kKeys * kPanelRow, column), k > 0);
    }
    commit_products();
  }

  // Starts sums += weights times values.
  PYENGINE_DEVICE void mix(const Weights& weights, const T* value, Sums& o) {
    begin_products();
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k)
#pragma unroll
      for (int panel = 0; panel < kPanels; ++panel)
        multiply_weights<T>(o + 8 * panel, weights[k],
                            panel_descriptor(value + (panel * kKeys + 16 * k) * kPanelRow, 0));
    commit_products();
  }

  PYENGINE_DEVICE bool normalises(const KeyPlace& at) const { return p.k_gain && list[at.entry] >= p.ring; }

  // Scores of the keys at a place to weights; `shrink` is what earlier sums are worth now.
  PYENGINE_DEVICE void weigh(const KeyPlace& at, Scores& s, TileSoftmax& state, float* shrink) {
    const int columns = p.tokens - at.token;
    const bool norm = normalises(at);
    if (norm || columns < kKeys) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int column = 8 * j + 2 * (lane_index() % 4) + c;
          const float factor = norm ? key_norm[column] : 1;
          s[j][c] = column < columns ? s[j][c] * factor : -INFINITY;
          s[j][c + 2] = column < columns ? s[j][c + 2] * factor : -INFINITY;
        }
    }
    to_weights<kColumns>(s, state, shrink);
  }

  PYENGINE_DEVICE static void pack_weights(const Scores& s, Weights& weights) {
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) {
      const float *left = s[2 * k], *right = s[2 * k + 1];
      weights[k][0] = pack<T>(left[0], left[1]), weights[k][1] = pack<T>(left[2], left[3]);
      weights[k][2] = pack<T>(right[0], right[1]), weights[k][3] = pack<T>(right[2], right[3]);
    }
  }

  // Waits for the copies of every thread. All threads of the block.
  PYENGINE_DEVICE static void arrive() {
    wait_copies<0>();
    publish_shared();
    sync_block();
  }

  // Keys are a tile ahead of values: tile j + 1 is scored while tile j is mixed.
  PYENGINE_DEVICE void attend(KeyPlace at, Sums& o, TileSoftmax& state) {
    if (!at.left) return;
    Scores s;
    Weights weights;
    float shrink[2];
    load(at, kKey, tile(keys, 0));
    commit_copies();
    arrive();
    KeyPlace next = at;
    advance<kKeys>(p, next);
    load(at, kValue, tile(values, 0));
    if (next.left) load(next, kKey, tile(keys, 1));
    commit_copies();
    int turned = list[at.entry];
    turn_queries(turned);
    score(tile(keys, 0), s);
    if (normalises(at)) norm_keys(tile(keys, 0));
    sync_block();
    wait_products<0>();
    weigh(at, s, state, shrink);
    pack_weights(s, weights);

    int stage = 0;
#pragma unroll 1
    for (; next.left; ++stage) {
      arrive();  // the next keys and these values are there; those before them are read no more
      at = next;
      advance<kKeys>(p, next);
      load(at, kValue, tile(values, stage + 1));
      if (next.left) load(next, kKey, tile(keys, stage));
      commit_copies();
      const int source = list[at.entry];
      if (source != turned) turn_queries(source);
      turned = source;
      score(tile(keys, stage + 1), s);
      mix(weights, tile(values, stage), o);
      if (normalises(at)) {
        norm_keys(tile(keys, stage + 1));
        sync_block();
      }
      wait_products<1>();
      weigh(at, s, state, shrink);
      wait_products<0>();
#pragma unroll
      for (int j = 0; j < D / 8; ++j) {
        o[j][0] *= shrink[0], o[j][1] *= shrink[0];
        o[j][2] *= shrink[1], o[j][3] *= shrink[1];
      }
      pack_weights(s, weights);
    }
    arrive();
    mix(weights, tile(values, stage), o);
    wait_products<0>();
  }

  PYENGINE_DEVICE void store(const Sums& o, const TileSoftmax& state, int token) {
    const int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float sum = sum_over<4>(state.sum[r]), inverse = sum > 0 ? 1 / sum : 0;
      const int n = token + g + 8 * r;
      if (n >= p.tokens) continue;
      T* row = out_row<T>(p, b, i, n, h);
#pragma unroll
      for (int j = 0; j < D / 8; ++j)
        *reinterpret_cast<uint32_t*>(row + 8 * j + 2 * t) =
            pack<T>(o[j][2 * r] * inverse, o[j][2 * r + 1] * inverse);
    }
  }

  PYENGINE_DEVICE void run() {
    Sums o = {};
    TileSoftmax state;
    attend(prepare(), o, state);
    const int token = first + warp_index() % 4 * kTile;  // of this warp's 16 rows
    if (p.splits == 1)
      store(o, state, token);
    else
      store_part<D>(p, o, state, b, i, h, split, token);
  }
};

template <class T, int D>
PYENGINE_KERNEL(kGroupBlockThreads, 1)
frame_group_kernel(const AttentionParams p) {
  GroupFrame<T, D>(p).run();
}

}  // namespace pyengine::ops::cuda
