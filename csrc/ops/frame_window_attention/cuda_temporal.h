// Scope "temporal" on tensor cores. For each (batch, token, head) a tiny attention of `frames` queries over
// the sources that anyone sees; bounded by memory. Blocks are persistent: angles and visibility are worked
// out once, then a block walks over groups of neighbouring heads, copying the rows of the next group while it
// computes on this one. Every value of qkv and ring is read from memory once and every output written once.
#pragma once

#include "ops/frame_window_attention/cuda_layout.h"
#include "ops/frame_window_attention/cuda_tiles.h"

namespace pyengine::ops::cuda {

// Blocks per processor that registers have to leave room for.
template <int D>
constexpr int kBlocks = D > 72 ? 2 : 3;

template <class T, int D>
struct Temporal {
  static constexpr int kRow = kStride<D>;
  static constexpr int kUnits = D / 8;
  // Keys of one softmax step. The scores of 64 do not fit into the 168 registers that three blocks per
  // processor leave a thread.
  static constexpr int kStep = kBlocks<D> == 3 ? kChunk / 2 : kChunk;

  const AttentionParams& p;
  const TemporalLayout layout;
  const int b;  // batch
  float *query_gain, *key_gain;
  Pair* turns;
  uint64_t* visible;
  int *list, *flags;
  T* tiles;
  int count;  // entries of the list

  PYENGINE_DEVICE explicit Temporal(const AttentionParams& params)
      : p(params), layout(D, kRow, p.frames, p.ring, p.sequences, p.stages), b(block_y()) {
    char* memory = shared_memory();
    query_gain = reinterpret_cast<float*>(memory + layout.gains), key_gain = query_gain + D;
    turns = reinterpret_cast<Pair*>(memory + layout.turns);
    visible = reinterpret_cast<uint64_t*>(memory + layout.visible);
    list = reinterpret_cast<int*>(memory + layout.list),
    flags = reinterpret_cast<int*>(memory + layout.flags);
    tiles = reinterpret_cast<T*>(memory + layout.tiles);
  }

  PYENGINE_DEVICE int sources() const { return p.ring + p.frames; }
  PYENGINE_DEVICE T* query_rows(int stage, int sequence) const {
    return tiles + stage * layout.stage_values + sequence * layout.rows * kRow;
  }
  PYENGINE_DEVICE T* key_rows(int stage, int sequence) const {
    return query_rows(stage, sequence) + layout.query_rows * kRow;
  }
  PYENGINE_DEVICE T* value_rows(int stage, int sequence) const {
    return key_rows(stage, sequence) + layout.key_rows * kRow;
  }

  // Once per block: what depends on indices and levels only.
  PYENGINE_DEVICE void prepare() {
    const int thread = thread_index(), stream = stream_of(p, b);
    for (int d = thread; d < D; d += kBlockThreads) {
      query_gain[d] = p.score_scale * (p.q_gain ? p.q_gain[d] : 1);
      key_gain[d] = p.k_gain ? p.k_gain[d] : 1;
    }
    for (int s = thread; s < sources(); s += kBlockThreads) {
      const int64_t index = index_of(p, stream, s);
      int seen = 0;
      for (int i = 0; i < p.frames && !seen; ++i)
        seen = sees(p, stream, i, s, p.frame_index[stream * p.frames + i], index);
      flags[s] = seen;
    }
    for (int e = thread; p.rotation != Rotation::none && e < sources() * (D / 2); e += kBlockThreads) {
      const int s = e / (D / 2), k = e % (D / 2);
      turns[e] = k < p.rotary_dim / 2 ? cosine_sine(p, index_of(p, stream, s), k) : Pair{1, 0};
    }
    sync_block();
    for (int s = thread; s < sources(); s += kBlockThreads) {
      int before = 0;
      for (int j = 0; j < s; ++j) before += flags[j];
      if (flags[s]) list[before] = s;
    }
    count = 0;
    for (int s = 0; s < sources(); ++s) count += flags[s];
    sync_block();
    for (int e = thread; e < p.frames * layout.words; e += kBlockThreads) {
      const int i = e / layout.words, first = e % layout.words * kChunk;
      uint64_t bits = 0;
      for (int j = 0; j < kChunk && first + j < count; ++j)
        if (sees(p, stream, i, list[first + j])) bits |= uint64_t{1} << j;
      visible[e] = bits;
    }
    // Values past the list meet weights of zero, so they have to be numbers.
    const int past = layout.key_rows - count;
    for (int e = thread; e < p.stages * p.sequences * past * kRow / 8; e += kBlockThreads) {
      const int unit = e % (kRow / 8), row = e / (kRow / 8) % past, buffer = e / (kRow / 8) / past;
      T* to = value_rows(buffer / p.sequences, buffer % p.sequences) + (count + row) * kRow + 8 * unit;
      *reinterpret_cast<Words4*>(to) = Words4{};
    }
  }

  // Starts copying a group of sequences: heads [head, head + heads) of token n.
  PYENGINE_DEVICE void load(int stage, int n, int head, int heads) {
    const int rows = p.frames + 2 * count;
    for (int e = thread_index(); e < heads * rows * kUnits; e += kBlockThreads) {
      const int unit = e % kUnits, row = e / kUnits % rows, sequence = e / kUnits / rows;
      const int h = head + sequence;
      if (row < p.frames) {
        copy_unit<D>(query_rows(stage, sequence) + row * kRow, active_row<T>(p, b, row, n, kQuery, h), unit,
                     true);
        continue;
      }
      const Part part = row < p.frames + count ? kKey : kValue;
      const int entry = row - p.frames - (part == kKey ? 0 : count), source = list[entry];
      T* to = (part == kKey ? key_rows(stage, sequence) : value_rows(stage, sequence)) + entry * kRow;
      if (source >= p.ring) {
        copy_unit<D>(to, active_row<T>(p, b, source - p.ring, n, part, h), unit, true);
        continue;
      }
      const int64_t offset = slot_offset(p, b, source, n, h);
      const void* ring = ring_of(p, b, part);
      if (p.key_scale)
        *reinterpret_cast<Words4*>(to + 8 * unit) =
            widen<T>(static_cast<const float8_e4m3*>(ring) + offset + 8 * unit,
                     (part == kKey ? p.key_scale : p.value_scale)[h]);
      else
        copy_unit<D>(to, static_cast<const T*>(ring) + offset, unit, true);
    }
    commit_copies();
  }

  // Keys in place: active ones normalised, all rotated. A quad per row.
  PYENGINE_DEVICE void turn_keys(int stage, int heads) {
    if (p.rotation == Rotation::none && !p.k_gain) return;
    const int t = lane_index() % 4;
    for (int first = warp_index() * 8; first < heads * count; first += kBlockThreads / 4) {
      const int e = first + lane_index() / 4;
      const bool present = e < heads * count;
      const int entry = present ? e % count : 0, sequence = present ? e / count : 0, source = list[entry];
      T* row = key_rows(stage, sequence) + entry * kRow;
      const RowWords<D> x = load_row<T, D>(row, t);
      const bool active = p.k_gain && source >= p.ring;
      const float norm = inverse_rms<T, D>(p, x);
      const Turn<T> turn{
          p, row, active ? norm : 1, active ? key_gain : nullptr, turns + source * (D / 2), nullptr};
      const RowWords<D> y = turn_row<T, D>(x, t, turn);
      sync_warp();  // partners are read before anyone writes
      if (present) store_row<T, D>(row, t, y);
    }
  }

  // 16 queries of one sequence, by one warp.
  PYENGINE_DEVICE void attend(int stage, int sequence, int first, int n, int h) {
    const int lane = lane_index(), g = lane / 4, t = lane % 4;
    T* tile = query_rows(stage, sequence) + first * kRow;
    RowWords<D> query[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int i = first + g + 8 * r, source = p.ring + (i < p.frames ? i : 0);
      const T* row = tile + (g + 8 * r) * kRow;
      query[r] = load_row<T, D>(row, t);
      float norm = 1;
      if (p.q_gain) norm = inverse_rms<T, D>(p, query[r]);
      query[r] =
          turn_row<T, D>(query[r], t, Turn<T>{p, row, norm, query_gain, turns + source * (D / 2), nullptr});
    }
    float o[1][D / 8][4] = {};
    TileSoftmax state;
    for (int start = 0; start < count; start += kStep) {
      const int keys = count - start;  // of which this step takes up to kStep
      float s[1][kStep / 8][4];
      const T* key = key_rows(stage, sequence) + (start + g) * kRow;
#pragma unroll
      for (int j = 0; j < kStep / 8; ++j) {
        float* c = s[0][j];
        c[0] = c[1] = c[2] = c[3] = 0;
        if (8 * j >= keys) continue;
        const RowWords<D> k = load_row<T, D>(key + 8 * j * kRow, t);
#pragma unroll
        for (int i = 0; i < Quad<D>::kUnits * 4; i += 2) {
          const uint32_t a[4] = {query[0].w[i], query[1].w[i], query[0].w[i + 1], query[1].w[i + 1]};
          multiply16<T>(c, a, k.w + i);
        }
        if constexpr (Quad<D>::kTail) {
          constexpr int i = Quad<D>::kUnits * 4;
          const uint32_t a[2] = {query[0].w[i], query[1].w[i]};
          multiply8<T>(c, a, k.w + i);
        }
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int i = first + g + 8 * r;
        const uint64_t word = i < p.frames ? visible[i * layout.words + start / kChunk] : 0;
        const uint64_t bits = word >> (start % kChunk + 2 * t);
#pragma unroll
        for (int j = 0; j < kStep / 8; ++j) {
          if (!(bits >> (8 * j) & 1)) s[0][j][2 * r] = -INFINITY;
          if (!(bits >> (8 * j) & 2)) s[0][j][2 * r + 1] = -INFINITY;
        }
      }
      float shrink[2];
      to_weights<kStep / 8>(s[0], state, shrink);
      if (start) {
#pragma unroll
        for (int j = 0; j < D / 8; ++j)
          for (int c = 0; c < 4; ++c) o[0][j][c] *= shrink[c / 2];
      }
      const T* values = value_rows(stage, sequence) + start * kRow;
#pragma unroll
      for (int k = 0; k < kStep / 16; ++k)
        if (16 * k < keys) add_values<T, D, 1, kStep / 8>(o, s, k, values + 16 * k * kRow);
    }
    sync_warp();  // the tile is about to hold results instead of queries
    store_sums<T, D>(o[0], state, tile);
    sync_warp();
    for (int e = lane; e < kTile * kUnits; e += kWarp) {
      const int row = e / kUnits, unit = e % kUnits;
      if (first + row < p.frames)
        *reinterpret_cast<Words4*>(out_row<T>(p, b, first + row, n, h) + 8 * unit) =
            *reinterpret_cast<const Words4*>(tile + row * kRow + 8 * unit);
    }
  }

  PYENGINE_DEVICE void run() {
    prepare();
    sync_block();
    const int groups = (p.heads + p.sequences - 1) / p.sequences, items = p.tokens * groups;
    const auto heads_of = [&](int item) {
      const int head = item % groups * p.sequences;
      return p.heads - head < p.sequences ? p.heads - head : p.sequences;
    };
    const auto load_item = [&](int item, int stage) {
      if (item < items)
        load(stage, item / groups, item % groups * p.sequences, heads_of(item));
      else
        commit_copies();
    };
    int stage = 0;
    if (p.stages == 2) load_item(block_x(), 0);
    for (int item = block_x(); item < items; item += grid_x()) {
      const int n = item / groups, head = item % groups * p.sequences, heads = heads_of(item);
      if (p.stages == 2) {
        load_item(item + grid_x(), stage ^ 1);
        wait_copies<1>();
      } else {
        load_item(item, 0);
        wait_copies<0>();
      }
      sync_block();
      turn_keys(stage, heads);
      if (p.append_slot.data)
        for (int e = warp_index(); e < heads * p.frames; e += kBlockThreads / kWarp)
          append_row<T>(p, b, e % p.frames, n, head + e / p.frames);
      sync_block();
      const int sequence = warp_index() / p.team;
      for (int first = warp_index() % p.team * kTile; sequence < heads && first < p.frames;
           first += p.team * kTile)
        attend(stage, sequence, first, n, head + sequence);
      sync_block();  // nobody reads this stage any more
      if (p.stages == 2) stage ^= 1;
    }
  }
};

template <class T, int D>
PYENGINE_KERNEL(kBlockThreads, kBlocks<D>)
temporal_kernel(const AttentionParams p) {
  Temporal<T, D>(p).run();
}

}  // namespace pyengine::ops::cuda
