#include "ops/denoise_step/op.h"

#include <algorithm>

#include "core/cpu_isa.h"
#include "core/dtype.h"
#include "core/parallel.h"
#include "ops/denoise_step/params.h"

namespace pyengine::ops {

PYENGINE_DECLARE_KERNEL(DenoiseStepKernel, denoise_step_kernel)

namespace {

constexpr Expect expect{"denoise_step"};
constexpr int64_t kBlock = 4096;          // values per range: fits the first-level cache with two branches
constexpr int64_t kInlineValues = 65536;  // below this, about 20 us, waking a thread costs more than it saves

void check_like_sample(const char* what, const Tensor& t, const Tensor& sample) {
  check(t.rank == sample.rank && std::equal(t.shape, t.shape + t.rank, sample.shape),
        "[denoise_step] expected ", what, " shaped like sample, ", sample, ", but got ", t);
}

DenoiseStepParams checked(const DenoiseStep& op) {
  const Tensor &sample = op.sample, &prediction = op.prediction;
  check(sample.rank >= 1, "[denoise_step] expected sample [frames, ...] but got ", sample);
  expect.dtype("sample", sample, DType::float32);
  expect.layout("sample", sample);
  check(prediction.rank == sample.rank + 1 &&
            std::equal(sample.shape, sample.shape + sample.rank, prediction.shape + 1),
        "[denoise_step] expected prediction [branches, frames, ...] over sample ", sample, " but got ",
        prediction);
  check(is_float(prediction.dtype),
        "[denoise_step] expected prediction of dtype float32 or bfloat16 (uint16) but got ", prediction);
  expect.layout("prediction", prediction);
  const int64_t frames = sample.shape[0], branches = prediction.shape[0];
  expect.input("weights", op.weights, DType::float32, {branches});
  expect.input("sample_scale", op.sample_scale, DType::float32, {frames});
  expect.input("prediction_scale", op.prediction_scale, DType::float32, {frames});
  expect.input("noise_scale", op.noise_scale, DType::float32, {frames});
  check_like_sample("out", op.out, sample);
  expect.dtype("out", op.out, DType::float32);
  expect.layout("out", op.out);
  expect.writable("out", op.out);
  if (op.noise) {
    check_like_sample("noise", op.noise, sample);
    expect.dtype("noise", op.noise, DType::float32);
    expect.layout("noise", op.noise);
  } else {
    for (int64_t f = 0; f < frames; ++f)
      check(op.noise_scale.as<float>()[f] == 0.0f, "[denoise_step] expected noise because noise_scale[", f,
            "] is ", op.noise_scale.as<float>()[f], " but got nothing");
  }
  return {sample.as<float>(),
          prediction.data,
          prediction.dtype == DType::bfloat16,
          op.weights.as<float>(),
          op.sample_scale.as<float>(),
          op.prediction_scale.as<float>(),
          op.noise_scale.as<float>(),
          op.noise ? op.noise.as<float>() : nullptr,
          op.out.as<float>(),
          branches,
          frames,
          frames ? sample.size() / frames : 0};
}

}  // namespace

void denoise_step(const DenoiseStep& op) {
  const DenoiseStepParams p = checked(op);
  const DenoiseStepKernel& kernel = PYENGINE_PICK_KERNEL(denoise_step_kernel);
  const int64_t blocks = (p.values + kBlock - 1) / kBlock;  // per frame
  const int64_t count = p.frames * blocks;
  const int64_t grain = p.frames * p.values <= kInlineValues ? count : 1;
  parallel_for(count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % blocks * kBlock;
      kernel.run(p, i / blocks, first, std::min(p.values, first + kBlock));
    }
  });
}

}  // namespace pyengine::ops
