// Which kernel serves a shape on a device, and how it is launched. Pure functions of ordinary C++: tested
// without a GPU.
#pragma once

#include "core/cuda/device_info.h"
#include "ops/frame_window_attention/op.h"

namespace pyengine::ops::cuda {

enum class Kernel { rows, temporal, frame, frame_group };

struct AttentionShape {
  Scope scope;
  DType dtype;  // of qkv
  int64_t batch, frames, tokens, heads, head_dim, ring;
  bool aligned;  // arrays start at 16-byte boundaries
};

struct AttentionLaunch {
  Kernel kernel = Kernel::rows;
  int64_t grid_x = 1, grid_y = 1, grid_z = 1;
  int threads = 128;
  int64_t shared_bytes = 0;
  int stages = 1, sequences = 1, team = 1;  // temporal: buffers, sequences at a time, warps of one sequence
  int query_tiles = 1;                      // frame: tiles of 16 queries per warp
  int splits = 1;                           // frame: blocks that share the keys of a query
  int64_t workspace_bytes = 0;              // for the partial results of splits
};

// `may_split`: there is a workspace.
AttentionLaunch attention_launch(const AttentionShape& shape, const pyengine::cuda::DeviceInfo& device,
                                 bool may_split);

// In how many parts the keys of a query are cut so that `blocks` blocks fill `slots` of them at a time.
int num_splits(int64_t blocks, int64_t slots, int64_t key_tiles);

}  // namespace pyengine::ops::cuda
