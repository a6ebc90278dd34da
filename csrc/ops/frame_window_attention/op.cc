#include "ops/frame_window_attention/op.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "core/cpu_isa.h"
#include "core/dtype.h"
#include "core/index.h"
#include "core/parallel.h"
#include "ops/frame_window_attention/check.h"
#include "ops/frame_window_attention/params.h"
#include "ops/frame_window_attention/rotary.h"

namespace pyengine::ops {

PYENGINE_DECLARE_KERNEL(FrameWindowAttentionKernel, frame_window_attention_kernel)

namespace {

constexpr int64_t kInlineScores =
    1 << 13;  // multiply-adds / head_dim; below this, about 20 us, one thread is quicker

int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// Everything that kernels read besides the arrays themselves. Kept per thread: no allocation in the steady
// state.
struct Tables {
  std::vector<float> query_gain, key_gain, query_pair_gain, key_pair_gain, bias;
  std::vector<int64_t> index, position;  // [streams, ring + frames]; -1 = empty or absent
  std::vector<const float*> rotary;
  std::vector<int32_t> key_source, key_count, key_end, append_slot;
  std::vector<void*> ring_key, ring_value;
};

void fill_gains(const FrameWindowAttention& op, const FrameWindowAttentionParams& p, Tables& t) {
  const double scale =
      (op.scale != 0 ? op.scale : 1 / std::sqrt(static_cast<double>(p.head_dim))) * std::log2(std::exp(1.0));
  t.query_gain.assign(p.padded_dim, 0);
  t.key_gain.assign(p.padded_dim, 0);
  for (int64_t d = 0; d < p.head_dim; ++d) {
    t.query_gain[d] = static_cast<float>((op.q_gain ? op.q_gain.as<float>()[d] : 1.0f) * scale);
    t.key_gain[d] = op.k_gain ? op.k_gain.as<float>()[d] : 1.0f;
  }
  t.query_pair_gain.assign(2 * p.pair_stride, 0);
  t.key_pair_gain.assign(2 * p.pair_stride, 0);
  for (int64_t d = 0; d < p.head_dim; ++d) {
    t.query_pair_gain[d % 2 * p.pair_stride + d / 2] = t.query_gain[d];
    t.key_pair_gain[d % 2 * p.pair_stride + d / 2] = t.key_gain[d];
  }
}

void fill_rotary(const FrameWindowAttention& op, const FrameWindowAttentionParams& p, Tables& t) {
  const int64_t sources = p.ring + p.frames;
  t.position.resize(t.index.size());
  t.rotary.resize(t.index.size());
  for (int64_t stream = 0; stream < p.streams; ++stream) {
    const int64_t* index = t.index.data() + stream * sources;
    int64_t base = std::numeric_limits<int64_t>::max();
    for (int64_t s = 0; s < sources; ++s)
      if (index[s] >= 0) base = std::min(base, index[s]);
    for (int64_t s = 0; s < sources; ++s)
      t.position[stream * sources + s] = index[s] >= 0 ? index[s] - base : 0;
  }
  rotary_rows({op.theta, op.rotary_dim, p.padded_dim, op.interleaved}, t.position.data(), t.position.size(),
              t.rotary.data());
}

// Whether active frame i of a stream sees source s (a slot of the ring, or ring + an active frame); neither
// is absent. `index` is the stream's row of Tables::index.
bool sees(const FrameWindowAttention& op, const FrameWindowAttentionParams& p, const int64_t* index,
          int64_t stream, int64_t i, int64_t s) {
  const float* level = op.level.as<float>() + stream * p.frames;
  if (op.mask != Mask::bidirectional && s >= p.ring && !(level[s - p.ring] <= level[i])) return false;
  if (op.mask != Mask::ranged) return true;
  const int64_t distance = index[p.ring + i] - index[s];
  return distance >= 0 && distance < index_at(op.reach, stream * p.frames + i);
}

void fill_keys(const FrameWindowAttention& op, const FrameWindowAttentionParams& p, Tables& t) {
  constexpr float kMasked =
      -std::numeric_limits<float>::infinity();  // a fully masked row must stay exactly zero
  const int64_t sources = p.ring + p.frames;
  t.key_source.assign(p.streams * p.key_stride, 0);
  t.key_count.assign(p.streams, 0);
  t.key_end.assign(p.streams * p.frames, 0);
  t.bias.assign(p.streams * p.frames * p.key_stride, kMasked);
  for (int64_t stream = 0; stream < p.streams; ++stream) {
    const int64_t* index = t.index.data() + stream * sources;
    int32_t count = 0;
    for (int64_t s = 0; s < sources; ++s) {
      if (index[s] < 0) continue;
      bool seen = false;
      for (int64_t i = 0; i < p.frames; ++i) {
        if (index[p.ring + i] < 0 || !sees(op, p, index, stream, i, s)) continue;
        t.bias[(stream * p.frames + i) * p.key_stride + count] = 0;
        t.key_end[stream * p.frames + i] = count + 1;
        seen = true;
      }
      if (seen) t.key_source[stream * p.key_stride + count++] = static_cast<int32_t>(s);
    }
    t.key_count[stream] = count;
  }
}

// Where the ring of every batch entry begins.
void fill_rings(const Rings& rings, const FrameWindowAttentionParams& p, std::vector<void*>& place) {
  place.resize(p.batch);
  if (!rings) return;
  const int64_t size = p.ring * p.tokens * p.heads * p.head_dim * bytes(rings.one.dtype);
  for (int64_t b = 0; b < p.batch; ++b)
    place[b] = static_cast<char*>(rings.of(b % p.streams)) + b / p.streams * size;
}

FrameWindowAttentionParams prepare(const FrameWindowAttention& op, Tables& t) {
  const int64_t* shape = op.qkv.shape;
  FrameWindowAttentionParams p{};
  p.qkv = op.qkv.data;
  p.out = op.out.data;
  p.is_bfloat16 = op.qkv.dtype == DType::bfloat16;
  p.batch = shape[0], p.frames = shape[1], p.tokens = shape[2], p.heads = shape[4], p.head_dim = shape[5];
  p.streams = op.frame_index.shape[0];
  p.ring = op.ring_key.slots();
  p.padded_dim = round_up(p.head_dim, kLane);
  p.pair_stride = pair_stride(p.padded_dim);
  p.normalise_query = static_cast<bool>(op.q_gain);
  p.normalise_key = static_cast<bool>(op.k_gain);
  p.epsilon = static_cast<float>(op.epsilon);
  p.inverse_dim = 1.0f / static_cast<float>(p.head_dim);
  p.key_stride = round_up(p.ring + p.frames, 2 * kLane);

  t.index.clear();
  for (int64_t s = 0; s < p.streams; ++s) {
    for (int64_t r = 0; r < p.ring; ++r) t.index.push_back(index_at(op.ring_index, s * p.ring + r));
    for (int64_t f = 0; f < p.frames; ++f) t.index.push_back(index_at(op.frame_index, s * p.frames + f));
  }
  fill_rings(op.ring_key, p, t.ring_key);
  fill_rings(op.ring_value, p, t.ring_value);
  fill_gains(op, p, t);
  p.rotation = op.rotary_dim == 0 ? Rotation::none
               : op.interleaved   ? Rotation::interleaved
                                  : Rotation::halves;
  p.rotary_dim = op.rotary_dim;
  if (p.rotation != Rotation::none) fill_rotary(op, p, t);
  fill_keys(op, p, t);
  if (op.append_slot) {
    t.append_slot.resize(p.streams * p.frames);
    for (int64_t i = 0; i < p.streams * p.frames; ++i)
      t.append_slot[i] = static_cast<int32_t>(index_at(op.append_slot, i));
    p.append_slot = t.append_slot.data();
  }
  p.ring_key = t.ring_key.data();
  p.ring_value = t.ring_value.data();
  p.query_gain = t.query_gain.data();
  p.key_gain = t.key_gain.data();
  p.query_pair_gain = t.query_pair_gain.data();
  p.key_pair_gain = t.key_pair_gain.data();
  p.rotary = t.rotary.data();
  p.key_source = t.key_source.data();
  p.key_count = t.key_count.data();
  p.key_end = t.key_end.data();
  p.bias = t.bias.data();
  return p;
}

// The whole job on this thread when it is small, else a few ranges per thread so that a late thread costs
// little.
int64_t grain(int64_t items, int64_t scores) {
  return scores <= kInlineScores ? items : std::max<int64_t>(1, items / (8 * threads()));
}

// A range packs the keys of every (batch, head) that it touches, so it takes whole ones if there are enough
// of them.
int64_t frame_grain(int64_t items, const FrameWindowAttentionParams& p) {
  if (p.batch * p.heads >= 2 * threads()) return p.frames;
  return std::max<int64_t>(1, items / (2 * threads()));
}

}  // namespace

void frame_window_attention(const FrameWindowAttention& op) {
  check_op(op, Place::host);
  thread_local Tables tables;
  const FrameWindowAttentionParams p = prepare(op, tables);
  const FrameWindowAttentionKernel& kernel = PYENGINE_PICK_KERNEL(frame_window_attention_kernel);
  const int64_t pairs = p.frames * (p.ring + p.frames) * p.batch * p.heads;
  if (op.scope == Scope::temporal) {
    const int64_t items = p.batch * p.tokens;
    const size_t bytes = kernel.temporal_scratch(p);
    parallel_for(items, grain(items, pairs * p.tokens),
                 [&](int64_t begin, int64_t end) { kernel.temporal(p, begin, end, workspace(bytes)); });
    return;
  }
  const int64_t items = p.batch * p.heads * p.frames;
  const size_t bytes = kernel.frame_scratch(p);
  parallel_for(items, frame_grain(items, p),
               [&](int64_t begin, int64_t end) { kernel.frame(p, begin, end, workspace(bytes)); });
  if (p.append_slot)
    parallel_for(p.batch * p.frames, 1, [&](int64_t begin, int64_t end) { kernel.append(p, begin, end); });
}

}  // namespace pyengine::ops
