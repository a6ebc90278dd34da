#include "ops/denoise_step/op.h"

#include <algorithm>

#include "core/cpu_isa.h"
#include "core/parallel.h"
#include "ops/denoise_step/check.h"
#include "ops/denoise_step/params.h"

namespace pyengine::ops {

PYENGINE_DECLARE_KERNEL(DenoiseStepKernel, denoise_step_kernel)

namespace {

constexpr int64_t kBlock = 4096;          // values per range: fits the first-level cache with two branches
constexpr int64_t kInlineValues = 65536;  // below this, about 20 us, waking a thread costs more than it saves

DenoiseStepParams params(const DenoiseStep& op) {
  const Tensor &sample = op.sample, &prediction = op.prediction;
  const int64_t streams = sample.shape[0], frames = sample.shape[1], branches = prediction.shape[0];
  return {sample.as<float>(),
          prediction.data,
          prediction.dtype == DType::bfloat16,
          op.weights.as<float>(),
          op.sample_scale.as<float>(),
          op.prediction_scale.as<float>(),
          op.noise_scale.as<float>(),
          op.noise ? op.noise.as<float>() : nullptr,
          op.history ? op.history.as<float>() : nullptr,
          op.history ? op.history_scale.as<float>() : nullptr,
          op.out.as<float>(),
          branches,
          streams,
          frames,
          streams && frames ? sample.size() / (streams * frames) : 0};
}

}  // namespace

void denoise_step(const DenoiseStep& op) {
  check_op(op, Place::host);
  const DenoiseStepParams p = params(op);
  const DenoiseStepKernel& kernel = PYENGINE_PICK_KERNEL(denoise_step_kernel);
  const int64_t blocks = (p.values + kBlock - 1) / kBlock;  // per frame
  const int64_t count = p.streams * p.frames * blocks;
  const int64_t grain = p.streams * p.frames * p.values <= kInlineValues ? count : 1;
  parallel_for(count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % blocks * kBlock;
      kernel.run(p, i / blocks, first, std::min(p.values, first + kBlock));
    }
  });
}

}  // namespace pyengine::ops
