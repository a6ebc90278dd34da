// DenoiseStep, what a kernel sees: raw pointers and sizes, nothing else.
#pragma once

#include <cstdint>

#include "core/bfloat16.h"

namespace pyengine::ops {

struct DenoiseStepParams {
  const float* sample;     // [streams, frames, values]
  const void* prediction;  // [branches, streams, frames, values] float32 or bfloat16
  bool prediction_is_bfloat16;
  const float* weights;                                        // [branches, streams]
  const float *sample_scale, *prediction_scale, *noise_scale;  // [streams, frames]
  const float* noise;                                          // [streams, frames, values] or null
  const float* history;                                        // the same
  const float* history_scale;                                  // [streams, frames] or null with it
  float* out;  // [streams, frames, values], may be sample itself
  int64_t branches, streams, frames, values;
};

// Updates values [begin, end) of one frame; frames are counted through all streams.
struct DenoiseStepKernel {
  void (*run)(const DenoiseStepParams& p, int64_t frame, int64_t begin, int64_t end);
};

}  // namespace pyengine::ops
