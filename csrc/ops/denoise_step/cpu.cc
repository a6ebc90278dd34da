// Compiled once per ISA as namespace PYENGINE_ISA; the loops are written for the compiler's vectoriser.
#include <cstring>

#include "ops/denoise_step/params.h"

namespace pyengine::ops::PYENGINE_ISA {

namespace {

constexpr int kBlock = 256;  // values accumulated at a time, in registers and the first-level cache

inline void add_scaled(float* __restrict sum, const float* x, float scale, int n) {
  for (int i = 0; i < n; ++i) sum[i] += scale * x[i];
}

inline void add_scaled(float* __restrict sum, const bfloat16* x, float scale, int n) {
  for (int i = 0; i < n; ++i) {
    const uint32_t bits = static_cast<uint32_t>(x[i].bits) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    sum[i] += scale * value;
  }
}

template <class T>
void update(const DenoiseStepParams& p, int64_t frame, int64_t begin, int64_t end) {
  const float scale = p.sample_scale[frame], prediction = p.prediction_scale[frame],
              noise = p.noise_scale[frame], history = p.history ? p.history_scale[frame] : 0;
  const int64_t base = frame * p.values, branch = p.streams * p.frames * p.values;
  const float* weights = p.weights + frame / p.frames;  // of this stream, one row per branch
  float sum[kBlock], guided[kBlock];
  for (int64_t i = begin; i < end; i += kBlock) {
    const int n = static_cast<int>(end - i < kBlock ? end - i : kBlock);
    for (int j = 0; j < n; ++j) sum[j] = 0;
    if (scale != 0) add_scaled(sum, p.sample + base + i, scale, n);
    if (prediction != 0) {
      for (int j = 0; j < n; ++j) guided[j] = 0;
      for (int64_t g = 0; g < p.branches; ++g)
        add_scaled(guided, static_cast<const T*>(p.prediction) + g * branch + base + i,
                   weights[g * p.streams], n);
      add_scaled(sum, guided, prediction, n);
    }
    if (noise != 0) add_scaled(sum, p.noise + base + i, noise, n);
    if (history != 0) add_scaled(sum, p.history + base + i, history, n);
    std::memcpy(p.out + base + i, sum, sizeof(float) * n);
  }
}

void run(const DenoiseStepParams& p, int64_t frame, int64_t begin, int64_t end) {
  if (p.sample_scale[frame] == 1 && p.prediction_scale[frame] == 0 && p.noise_scale[frame] == 0 &&
      (!p.history || p.history_scale[frame] == 0)) {
    const int64_t first = frame * p.values + begin;
    if (p.out != p.sample) std::memcpy(p.out + first, p.sample + first, sizeof(float) * (end - begin));
    return;
  }
  p.prediction_is_bfloat16 ? update<bfloat16>(p, frame, begin, end) : update<float>(p, frame, begin, end);
}

}  // namespace

extern const DenoiseStepKernel denoise_step_kernel{run};

}  // namespace pyengine::ops::PYENGINE_ISA
