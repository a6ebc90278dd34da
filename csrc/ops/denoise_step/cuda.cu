#include "core/cuda/launch.h"
#include "core/cuda/warp.h"
#include "ops/denoise_step/check.h"
#include "ops/denoise_step/cuda.h"

namespace pyengine::ops::cuda {

using namespace pyengine::cuda;

namespace {

constexpr int kThreads = 256;
constexpr int kValues = 4;  // of a thread

struct DenoiseStepParams {
  const float* sample;                                         // [streams, frames, values]
  const void* prediction;                                      // [branches, streams, frames, values]
  const float* weights;                                        // [branches, streams]
  const float *sample_scale, *prediction_scale, *noise_scale;  // [streams, frames]
  const float* noise;                                          // [streams, frames, values] or null
  const float* history;                                        // the same
  const float* history_scale;                                  // [streams, frames] or null with it
  float* out;  // [streams, frames, values], may be sample itself
  int64_t branches, streams, frames, values;
  bool aligned;  // four values of a frame can be read at a time
};

template <class T>
struct alignas(4 * sizeof(T)) Four {
  T x[kValues];
};

// Four values at i, of which `count` exist.
template <class T>
PYENGINE_DEVICE Four<T> read(const T* x, int64_t i, int count, bool aligned) {
  if (aligned) return *reinterpret_cast<const Four<T>*>(x + i);
  Four<T> y{};
#pragma unroll
  for (int k = 0; k < kValues; ++k)
    if (k < count) y.x[k] = x[i + k];
  return y;
}
PYENGINE_DEVICE void write(float* y, int64_t i, int count, bool aligned, const Four<float>& x) {
  if (aligned) {
    *reinterpret_cast<Four<float>*>(y + i) = x;
    return;
  }
#pragma unroll
  for (int k = 0; k < kValues; ++k)
    if (k < count) y[i + k] = x.x[k];
}

// Blocks: x over values, y over the frames of all streams. A scale of exactly 0 means that its operand is not
// read.
template <class T>
PYENGINE_KERNEL(kThreads, 1)
denoise_step_kernel(const DenoiseStepParams p) {
  const int64_t frame = block_y(),
                first = (static_cast<int64_t>(block_x()) * kThreads + thread_index()) * kValues;
  if (first >= p.values) return;
  const int count = static_cast<int>(p.values - first < kValues ? p.values - first : kValues);
  const float scale = p.sample_scale[frame], prediction = p.prediction_scale[frame];
  const float noise = p.noise ? p.noise_scale[frame] : 0;
  const float history = p.history ? p.history_scale[frame] : 0;
  const int64_t at = frame * p.values + first;
  if (scale == 1 && prediction == 0 && noise == 0 && history == 0) {
    if (p.out != p.sample) write(p.out, at, count, p.aligned, read(p.sample, at, count, p.aligned));
    return;
  }
  Four<float> sum{};
  if (scale != 0) {
    const Four<float> x = read(p.sample, at, count, p.aligned);
    for (int k = 0; k < kValues; ++k) sum.x[k] = scale * x.x[k];
  }
  if (prediction != 0) {
    Four<float> guided{};
    const float* weights = p.weights + frame / p.frames;  // of this stream, one row per branch
    for (int64_t g = 0; g < p.branches; ++g) {
      const Four<T> x = read(static_cast<const T*>(p.prediction) + g * p.streams * p.frames * p.values, at,
                             count, p.aligned);
      for (int k = 0; k < kValues; ++k) guided.x[k] += weights[g * p.streams] * to_float(x.x[k]);
    }
    for (int k = 0; k < kValues; ++k) sum.x[k] += prediction * guided.x[k];
  }
  if (noise != 0) {
    const Four<float> x = read(p.noise, at, count, p.aligned);
    for (int k = 0; k < kValues; ++k) sum.x[k] += noise * x.x[k];
  }
  if (history != 0) {
    const Four<float> x = read(p.history, at, count, p.aligned);
    for (int k = 0; k < kValues; ++k) sum.x[k] += history * x.x[k];
  }
  write(p.out, at, count, p.aligned, sum);
}

}  // namespace

void denoise_step(const DenoiseStep& op, void* stream) {
  check_op(op, Place::device);
  const Tensor& sample = op.sample;
  if (sample.size() == 0) return;
  const int64_t streams = sample.shape[0], frames = sample.shape[1];
  const int64_t values = sample.size() / (streams * frames);
  const auto at_boundary = [](const Tensor& t) { return reinterpret_cast<uintptr_t>(t.data) % 16 == 0; };
  const bool aligned = values % kValues == 0 && at_boundary(sample) && at_boundary(op.prediction) &&
                       at_boundary(op.noise) && at_boundary(op.history) && at_boundary(op.out);
  const DenoiseStepParams p{sample.as<float>(),
                            op.prediction.data,
                            op.weights.as<float>(),
                            op.sample_scale.as<float>(),
                            op.prediction_scale.as<float>(),
                            op.noise_scale.as<float>(),
                            op.noise.as<float>(),
                            op.history.as<float>(),
                            op.history_scale.as<float>(),
                            op.out.as<float>(),
                            op.prediction.shape[0],
                            streams,
                            frames,
                            values,
                            aligned};
  const Grid grid{static_cast<unsigned>((values + kThreads * kValues - 1) / (kThreads * kValues)),
                  static_cast<unsigned>(streams * frames)};
  switch (op.prediction.dtype) {
    case DType::float32:
      return launch(denoise_step_kernel<float>, grid, kThreads, 0, stream, p);
    case DType::bfloat16:
      return launch(denoise_step_kernel<bfloat16>, grid, kThreads, 0, stream, p);
    case DType::float16:
      return launch(denoise_step_kernel<float16>, grid, kThreads, 0, stream, p);
    default:
      throw std::logic_error("denoise_step: a dtype that check_op let through");
  }
}

}  // namespace pyengine::ops::cuda
