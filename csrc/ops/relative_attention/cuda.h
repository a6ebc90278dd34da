// RelativeAttention on arrays of an NVIDIA device, queued on a stream. Nothing is allocated and nothing
// waited for, so it may be captured in a graph.
#pragma once

#include "ops/relative_attention/op.h"

namespace pyengine::ops::cuda {

// float32, float16 or bfloat16, any head size, at most 2,048 frames. `stream` is a cudaStream_t. Throws
// std::invalid_argument for bad tensors, std::runtime_error for the device's own errors.
void relative_attention(const RelativeAttention& op, void* stream);

}  // namespace pyengine::ops::cuda
