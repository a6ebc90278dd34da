// RingAppend on arrays of an NVIDIA device, queued on a stream. Nothing is allocated and nothing waited for,
// so it may be captured in a graph.
#pragma once

#include "ops/ring_append/op.h"

namespace pyengine::ops::cuda {

// `stream` is a cudaStream_t. Throws std::invalid_argument for bad tensors, std::runtime_error for the
// device's own errors.
void ring_append(const RingAppend& op, void* stream);

}  // namespace pyengine::ops::cuda
