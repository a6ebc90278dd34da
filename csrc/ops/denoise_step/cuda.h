// DenoiseStep on arrays of an NVIDIA device, queued on a stream. Nothing is allocated and nothing waited for,
// so it may be captured in a graph.
#pragma once

#include "ops/denoise_step/op.h"

namespace pyengine::ops::cuda {

// `stream` is a cudaStream_t. Throws std::invalid_argument for bad tensors, std::runtime_error for the
// device's own errors.
void denoise_step(const DenoiseStep& op, void* stream);

}  // namespace pyengine::ops::cuda
