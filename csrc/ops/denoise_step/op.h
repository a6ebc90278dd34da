// DenoiseStep: guidance over any number of branches, the per-frame sampler update, optional re-noise and what
// a multistep solver remembers of the step before, in one pass.
//   p     = sum over g of weights[g, s] * prediction[g, s], for every stream s
//   out_f = sample_scale[f] * sample_f + prediction_scale[f] * p_f + noise_scale[f] * noise_f
//           + history_scale[f] * history_f
// Frames whose scales are (1, 0, 0, 0) are copied bit for bit. A scale of exactly 0 means that its operand is
// not read.
#pragma once

#include "core/tensor.h"

namespace pyengine::ops {

struct DenoiseStep {
  Tensor sample;            // [streams, frames, ...] float32
  Tensor prediction;        // [branches, streams, frames, ...] float32 or bfloat16
  Tensor weights;           // [branches, streams] float32
  Tensor sample_scale;      // [streams, frames] float32
  Tensor prediction_scale;  // [streams, frames] float32
  Tensor noise_scale;       // [streams, frames] float32
  Tensor noise;             // [streams, frames, ...] float32, or absent if every noise_scale is 0
  Tensor history;           // [streams, frames, ...] float32, or absent
  Tensor history_scale;     // [streams, frames] float32, or absent with `history`
  Tensor out;               // [streams, frames, ...] float32, may be sample itself
};

void denoise_step(const DenoiseStep& op);  // throws std::invalid_argument

}  // namespace pyengine::ops
