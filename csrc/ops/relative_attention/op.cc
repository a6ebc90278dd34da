#include "ops/relative_attention/op.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "core/cpu_isa.h"
#include "core/parallel.h"
#include "ops/relative_attention/check.h"
#include "ops/relative_attention/params.h"

namespace pyengine::ops {

PYENGINE_DECLARE_KERNEL(RelativeAttentionKernel, relative_attention_kernel)

namespace {

constexpr int64_t kInlineScores = 1 << 13;  // below this, about 20 us, one thread is quicker

int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// The expanded tables. Kept per thread: no allocation in the steady state.
struct Tables {
  std::vector<float> keys, values;
};

void expand(const RelativeAttention& op, RelativeAttentionParams& p, Tables& t) {
  const int64_t reach = op.key_table.shape[0] / 2, dim = p.head_dim, last = p.frames - 1;
  const auto row = [&](const Tensor& table, int64_t distance) {
    return table.as<float>() + (std::clamp(distance, -reach, reach) + reach) * dim;
  };
  const float scale =
      p.transposed ? static_cast<float>(std::pow(dim, -0.25) * std::log2(std::exp(1.0))) : 1.0f;
  t.keys.assign(dim * p.key_columns, 0);
  t.values.assign((2 * p.frames - 1) * p.padded_dim, 0);
  for (int64_t c = 0; c < 2 * p.frames - 1; ++c) {
    const float* key = row(op.key_table, p.transposed ? last - c : c - last);
    const float* value = row(op.value_table, c - last);
    for (int64_t d = 0; d < dim; ++d) {
      t.keys[d * p.key_columns + c] = key[d] * scale;
      t.values[c * p.padded_dim + d] = value[d];
    }
  }
  p.keys = t.keys.data();
  p.values = t.values.data();
}

}  // namespace

void relative_attention(const RelativeAttention& op) {
  check_op(op, Place::host);
  const int64_t* shape = op.qkv.shape;
  RelativeAttentionParams p{};
  p.qkv = op.qkv.data;
  p.out = op.out.data;
  p.is_bfloat16 = op.qkv.dtype == DType::bfloat16;
  p.transposed = op.transposed;
  p.batch = shape[0], p.frames = shape[1], p.places = shape[2], p.heads = shape[4], p.head_dim = shape[5];
  p.padded_frames = round_up(p.frames, kRelativeLane);
  p.padded_dim = round_up(p.head_dim, kRelativeLane);
  p.query_scale = static_cast<float>(std::log2(std::exp(1.0)) / std::sqrt(static_cast<double>(p.head_dim)));
  p.key_columns = p.frames - 1 + p.padded_frames;
  thread_local Tables tables;
  if (op.key_table) expand(op, p, tables);
  const RelativeAttentionKernel& kernel = PYENGINE_PICK_KERNEL(relative_attention_kernel);
  const int64_t items = p.batch * p.places, scores = p.frames * p.frames * p.heads;
  const int64_t grain =
      items * scores < kInlineScores ? items : std::max<int64_t>(1, items / (8 * threads()));
  const size_t bytes = kernel.scratch(p);
  parallel_for(items, grain,
               [&](int64_t begin, int64_t end) { kernel.run(p, begin, end, workspace(bytes)); });
}

}  // namespace pyengine::ops
