// One warp per query row, float32 sums, lanes over the values of a row. Neighbouring warps have the frames of
// one place and head, so keys and values come from memory once and from the first-level cache after that; the
// tables are small enough to stay in it.
#include <cmath>

#include "core/cuda/launch.h"
#include "core/cuda/warp.h"
#include "ops/relative_attention/check.h"
#include "ops/relative_attention/cuda.h"

namespace pyengine::ops::cuda {

using namespace pyengine::cuda;

namespace {

constexpr int kWarps = 4;
constexpr int kBlocks = 3;            // per processor at least: memory is waited for by many warps
constexpr int kSlice = 8;             // values of a lane at a time: 256 of a row
constexpr int kFrames = 4;            // keys whose scores are summed together: chains that hide the latency
constexpr int64_t kMaxFrames = 2048;  // whose weights fit into the shared memory that every device has

struct RelativeParams {
  const void* qkv;                       // [batch, frames, places, 3, heads, head_dim]
  const float *key_table, *value_table;  // [2 * reach + 1, head_dim] or null
  void* out;                             // [batch, frames, places, heads, head_dim]
  int batch, frames, places, heads, head_dim, reach;
  float content_scale, table_scale;
};

constexpr float kLog2e = 1.44269504f;

enum Part { kQuery, kKey, kValue };

// One (batch, place, head): its rows of every frame.
template <class T>
struct Sequence {
  const RelativeParams& p;
  int64_t first, step;  // of the query of frame 0; from frame to frame
  int64_t part;         // from query to key to value

  PYENGINE_DEVICE Sequence(const RelativeParams& params, int64_t b, int n, int h) : p(params) {
    part = static_cast<int64_t>(p.heads) * p.head_dim;
    step = p.places * 3 * part;
    first = b * p.frames * step + n * 3 * part + h * p.head_dim;
  }
  PYENGINE_DEVICE const T* row(Part which, int frame) const {
    return static_cast<const T*>(p.qkv) + first + frame * step + which * part;
  }
};

// The table's row for a distance in frames.
PYENGINE_DEVICE const float* table_row(const RelativeParams& p, const float* table, int distance) {
  const int near = distance > p.reach ? p.reach : distance < -p.reach ? -p.reach : distance;
  return table + static_cast<int64_t>(near + p.reach) * p.head_dim;
}

// The scores of frame i on frames [first, first + kFrames) into `scores`. Past the last frame the last one is
// taken again, and not kept.
template <class T, bool relative, bool transposed>
PYENGINE_DEVICE void score(const Sequence<T>& s, int i, int first, float* scores) {
  const RelativeParams& p = s.p;
  const T* query = s.row(kQuery, i);
  float content[kFrames] = {}, distance[kFrames] = {};
  const T *keys[kFrames], *others[kFrames];
  const float* rows[kFrames];
#pragma unroll
  for (int r = 0; r < kFrames; ++r) {
    const int j = first + r < p.frames ? first + r : p.frames - 1;
    keys[r] = s.row(kKey, j);
    others[r] = transposed ? s.row(kQuery, j) : query;
    rows[r] = relative ? table_row(p, p.key_table, transposed ? i - j : j - i) : nullptr;
  }
#pragma unroll 2  // more would take the registers of other warps
  for (int d = lane_index(); d < p.head_dim; d += kWarp) {
    const float q = to_float(query[d]);
#pragma unroll
    for (int r = 0; r < kFrames; ++r) {
      content[r] += q * to_float(keys[r][d]);
      if constexpr (relative) distance[r] += (transposed ? to_float(others[r][d]) : q) * rows[r][d];
    }
  }
#pragma unroll
  for (int r = 0; r < kFrames; ++r) {
    float x = content[r] * p.content_scale;
    if constexpr (relative) x += distance[r] * p.table_scale;
    x = sum_over<kWarp>(x);
    if (lane_index() == 0 && first + r < p.frames) scores[first + r] = x;
  }
}

// Scores to weights in place; returns 1 / their sum.
PYENGINE_DEVICE float softmax(float* scores, int frames) {
  float most = -INFINITY, sum = 0;
  for (int j = lane_index(); j < frames; j += kWarp) most = scores[j] > most ? scores[j] : most;
  most = max_over<kWarp>(most);
  for (int j = lane_index(); j < frames; j += kWarp) {
    const float weight =
        exp2_fast((scores[j] - most) * kLog2e);  // the difference first: it is exact near the highest
    scores[j] = weight;
    sum += weight;
  }
  return 1 / sum_over<kWarp>(sum);
}

// Values [first, first + 32 kSlice) of one row of out.
template <class T, bool relative>
PYENGINE_DEVICE void attend(const Sequence<T>& s, int i, int first, const float* weights, float scale,
                            T* out) {
  const RelativeParams& p = s.p;
  float sums[kSlice] = {};
#pragma unroll 2
  for (int j = 0; j < p.frames; ++j) {
    const float weight = weights[j];
    const T* value = s.row(kValue, j);
    const float* row = relative ? table_row(p, p.value_table, j - i) : nullptr;
#pragma unroll
    for (int k = 0; k < kSlice; ++k) {
      const int d = first + lane_index() + k * kWarp;
      if (d >= p.head_dim) continue;
      float v = to_float(value[d]);
      if constexpr (relative) v += row[d];
      sums[k] += weight * v;
    }
  }
#pragma unroll
  for (int k = 0; k < kSlice; ++k) {
    const int d = first + lane_index() + k * kWarp;
    if (d < p.head_dim) out[d] = from_float<T>(sums[k] * scale);
  }
}

template <class T, bool relative, bool transposed>
PYENGINE_KERNEL(kWarps* kWarp, kBlocks)
relative_attention_kernel(const RelativeParams p) {
  const int64_t row = static_cast<int64_t>(block_x()) * kWarps + warp_index();
  const int i = static_cast<int>(row % p.frames), h = static_cast<int>(row / p.frames % p.heads);
  const int n = static_cast<int>(row / p.frames / p.heads % p.places);
  const int64_t b = row / p.frames / p.heads / p.places;
  if (b >= p.batch) return;
  float* scores = reinterpret_cast<float*>(shared_memory()) + warp_index() * p.frames;
  const Sequence<T> s(p, b, n, h);
  for (int first = 0; first < p.frames; first += kFrames) score<T, relative, transposed>(s, i, first, scores);
  sync_warp();
  const float scale = softmax(scores, p.frames);
  sync_warp();
  T* out = static_cast<T*>(p.out) + (((b * p.frames + i) * p.places + n) * p.heads + h) * p.head_dim;
  for (int first = 0; first < p.head_dim; first += kSlice * kWarp)
    attend<T, relative>(s, i, first, scores, scale, out);
}

template <class T>
void run(const RelativeParams& p, bool transposed, void* stream) {
  const int64_t rows = static_cast<int64_t>(p.batch) * p.frames * p.places * p.heads;
  const Grid grid{static_cast<unsigned>((rows + kWarps - 1) / kWarps)};
  const auto kernel = !p.key_table ? relative_attention_kernel<T, false, false>
                      : transposed ? relative_attention_kernel<T, true, true>
                                   : relative_attention_kernel<T, true, false>;
  launch(kernel, grid, kWarps * kWarp, kWarps * p.frames * int64_t{4}, stream, p);
}

}  // namespace

void relative_attention(const RelativeAttention& op, void* stream) {
  check_op(op, Place::device);
  const int64_t* s = op.qkv.shape;
  check(s[1] <= kMaxFrames, "[relative_attention] expected at most ", kMaxFrames, " frames but got ", s[1]);
  const double dim = static_cast<double>(s[5]), content = 1 / std::sqrt(dim);
  const RelativeParams p{op.qkv.data,
                         op.key_table.as<float>(),
                         op.value_table.as<float>(),
                         op.out.data,
                         static_cast<int>(s[0]),
                         static_cast<int>(s[1]),
                         static_cast<int>(s[2]),
                         static_cast<int>(s[4]),
                         static_cast<int>(s[5]),
                         op.key_table ? static_cast<int>(op.key_table.shape[0] / 2) : 0,
                         static_cast<float>(content),
                         static_cast<float>(op.transposed ? std::pow(dim, -0.25) : content)};
  switch (op.qkv.dtype) {
    case DType::float32:
      return run<float>(p, op.transposed, stream);
    case DType::bfloat16:
      return run<bfloat16>(p, op.transposed, stream);
    case DType::float16:
      return run<float16>(p, op.transposed, stream);
    default:
      throw std::logic_error("relative_attention: a dtype that check_op let through");
  }
}

}  // namespace pyengine::ops::cuda
