#include "ops/frame_window_attention/cuda_heuristics.h"

#include <algorithm>
#include <initializer_list>

#include "ops/frame_window_attention/cuda_layout.h"

namespace pyengine::ops::cuda {

namespace {

using pyengine::cuda::DeviceInfo;

constexpr int64_t kReserved = 1024;  // bytes of shared memory that the system takes per block
// Blocks of a processor that its 65,536 registers have room for: 168 or 255 for each of 128 threads.
int64_t blocks_by_registers(int64_t head_dim) {
  return head_dim > 72 ? 2 : 3;
}
constexpr int kRowsPerBlock = 4;
constexpr int64_t kRowsScratchBytes = 4 * (2 * 256 + 32) * 4;

int stride(int64_t head_dim) {
  return static_cast<int>(head_dim / 8 % 2 ? head_dim : head_dim + 8);
}

int64_t resident(int64_t shared_bytes, int64_t head_dim, const DeviceInfo& device) {
  if (shared_bytes > device.block_bytes) return 0;
  return std::min(blocks_by_registers(head_dim), device.processor_bytes / (shared_bytes + kReserved));
}

bool has_tensor_core_kernel(const AttentionShape& s) {
  const bool head = s.head_dim == 64 || s.head_dim == 72 || s.head_dim == 128;
  return head && s.aligned && s.frames + s.ring <= kMaxSources &&
         (s.dtype == DType::bfloat16 || s.dtype == DType::float16);
}

AttentionLaunch rows_launch(const AttentionShape& s) {
  AttentionLaunch l;
  l.grid_x = (s.batch * s.frames * s.tokens * s.heads + kRowsPerBlock - 1) / kRowsPerBlock;
  l.shared_bytes = kRowsScratchBytes;
  return l;
}

// Two blocks per processor at least, so that one computes while the other waits; then two stages, so that
// copies overlap with computing inside a block too; then as many sequences as there are warps.
bool temporal_launch(const AttentionShape& s, const DeviceInfo& device, AttentionLaunch* l) {
  const int64_t tiles = (s.frames + kTile - 1) / kTile;
  l->team = tiles == 1 ? 1 : tiles == 2 ? 2 : 4;
  for (int64_t enough : {2, 1})
    for (int64_t sequences = std::min<int64_t>(4 / l->team, s.heads); sequences; sequences /= 2)
      for (int stages : {2, 1}) {
        const TemporalLayout layout(static_cast<int>(s.head_dim), stride(s.head_dim),
                                    static_cast<int>(s.frames), static_cast<int>(s.ring),
                                    static_cast<int>(sequences), stages);
        const int64_t blocks = resident(layout.bytes, s.head_dim, device);
        if (blocks < enough) continue;
        const int64_t items = s.tokens * ((s.heads + sequences - 1) / sequences);
        l->kernel = Kernel::temporal;
        l->stages = stages, l->sequences = static_cast<int>(sequences);
        l->shared_bytes = layout.bytes;
        l->grid_x = std::min(items, (device.processors * blocks + s.batch - 1) / s.batch);
        l->grid_y = s.batch;
        return true;
      }
  return false;
}

void share_keys(const AttentionShape& s, int64_t blocks, AttentionLaunch* l) {
  l->grid_x = blocks / s.batch / s.heads;
  l->grid_y = s.heads;
  l->grid_z = s.batch * l->splits;
  if (l->splits > 1)
    l->workspace_bytes = l->splits * s.batch * s.frames * s.tokens * s.heads * (s.head_dim + 2) * 4;
}

bool frame_group_launch(const AttentionShape& s, const DeviceInfo& device, bool may_split,
                        AttentionLaunch* l) {
  const int sources = static_cast<int>(s.ring + s.frames);
  const GroupFrameLayout layout(static_cast<int>(s.head_dim), sources);
  // Whole panels, and tiles that are filled well enough.
  if (!device.warpgroups || s.head_dim % 64 || layout.bytes > device.block_bytes || s.tokens < kGroupKeys / 2)
    return false;
  constexpr int64_t kRows = kGroupBlockThreads / 2;
  const int64_t blocks = s.batch * s.heads * s.frames * ((s.tokens + kRows - 1) / kRows);
  l->kernel = Kernel::frame_group;
  l->threads = kGroupBlockThreads;
  l->shared_bytes = layout.bytes;
  if (may_split)
    l->splits = num_splits(blocks, device.processors, sources * ((s.tokens + kGroupKeys - 1) / kGroupKeys));
  share_keys(s, blocks, l);
  return true;
}

bool frame_launch(const AttentionShape& s, const DeviceInfo& device, bool may_split, AttentionLaunch* l) {
  const int sources = static_cast<int>(s.ring + s.frames);
  const auto layout = [&](int tiles) {
    return FrameLayout(static_cast<int>(s.head_dim), stride(s.head_dim), sources, tiles);
  };
  const auto blocks = [&](int tiles) {
    return s.batch * s.heads * s.frames * ((s.tokens + 4 * tiles * kTile - 1) / (4 * tiles * kTile));
  };
  // Two tiles per warp halve the reads of shared memory per product; not where that leaves processors idle,
  // or where most of the second tile would be past the frame's tokens.
  const bool large = s.tokens > 4 * kTile && resident(layout(2).bytes, s.head_dim, device) > 0 &&
                     blocks(2) >= device.processors;
  l->query_tiles = large ? 2 : 1;
  l->shared_bytes = layout(l->query_tiles).bytes;
  const int64_t fitting = std::min<int64_t>(2, resident(l->shared_bytes, s.head_dim, device));
  if (fitting == 0) return false;
  l->kernel = Kernel::frame;
  const int keys = frame_keys(static_cast<int>(s.head_dim), l->query_tiles);
  const int64_t key_tiles = sources * ((s.tokens + keys - 1) / keys);
  if (may_split) l->splits = num_splits(blocks(l->query_tiles), device.processors * fitting, key_tiles);
  share_keys(s, blocks(l->query_tiles), l);
  return true;
}

}  // namespace

int num_splits(int64_t blocks, int64_t slots, int64_t key_tiles) {
  constexpr int64_t kMaxSplits = 16;
  constexpr int64_t kTilesPerSplit = 8;  // fewer, and starting and combining cost more than is won
  const int64_t most = std::min(kMaxSplits, key_tiles / kTilesPerSplit);
  if (most < 2 || blocks >= slots) return 1;
  // How full the processors are over all waves.
  const auto efficiency = [&](int64_t splits) {
    const int64_t waves = (blocks * splits + slots - 1) / slots;
    return static_cast<double>(blocks * splits) / static_cast<double>(waves * slots);
  };
  double best = 0;
  for (int64_t splits = 1; splits <= most; ++splits) best = std::max(best, efficiency(splits));
  // The fewest within 85 % of the best: every split writes and reads its partial sums once more.
  for (int64_t splits = 1; splits <= most; ++splits)
    if (efficiency(splits) >= 0.85 * best) return static_cast<int>(splits);
  return 1;
}

AttentionLaunch attention_launch(const AttentionShape& shape, const DeviceInfo& device, bool may_split) {
  AttentionLaunch launch;
  if (has_tensor_core_kernel(shape)) {
    if (shape.scope == Scope::temporal && temporal_launch(shape, device, &launch)) return launch;
    if (shape.scope == Scope::frame && frame_group_launch(shape, device, may_split, &launch)) return launch;
    if (shape.scope == Scope::frame && frame_launch(shape, device, may_split, &launch)) return launch;
  }
  return rows_launch(shape);
}

}  // namespace pyengine::ops::cuda
