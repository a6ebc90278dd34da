// FrameWindowAttention on arrays of an NVIDIA device, queued on a stream. Nothing is allocated and nothing
// waited for, so it may be captured in a graph: indices, levels and slots are read by the kernels when they
// run.
#pragma once

#include "ops/frame_window_attention/op.h"

namespace pyengine::ops::cuda {

// Bytes of scratch with which the op is quickest: partial results of long keys split among several blocks. 0
// = it needs none. Depends on shapes and on the current device alone.
int64_t frame_window_attention_workspace(const FrameWindowAttention& op);

// `op.workspace` is absent or an array of at least so many bytes, of this call alone until it has run;
// without it keys are not split. Rings that a table names begin at 16-byte boundaries; the table is read when
// the kernels run, so a graph survives streams that come and go. `stream` is a cudaStream_t. Throws
// std::invalid_argument for bad tensors, std::runtime_error for the device's own errors.
void frame_window_attention(const FrameWindowAttention& op, void* stream);

// Whether scope "frame" may use the kernel for Hopper's warpgroups, where the device has them and the shape
// suits. Off unless PYENGINE_WARPGROUPS=1 was set, until a GPU has verified it. Returns what it was before.
bool use_warpgroups(bool wanted);

}  // namespace pyengine::ops::cuda
