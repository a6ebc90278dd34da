#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "core/cuda/launch.h"
#include "ops/frame_window_attention/check.h"
#include "ops/frame_window_attention/cuda.h"
#include "ops/frame_window_attention/cuda_frame.h"
#include "ops/frame_window_attention/cuda_kernels.h"
#include "ops/frame_window_attention/cuda_rows.h"

namespace pyengine::ops::cuda {

// Compiled in files of their own: cuda_instance.cu.in.
#define PYENGINE_INSTANCE(T, D)                                                                 \
  template <>                                                                                   \
  void launch_temporal<T, D>(const AttentionParams& p, const AttentionLaunch& l, void* stream); \
  template <>                                                                                   \
  void launch_frame<T, D>(const AttentionParams& p, const AttentionLaunch& l, void* stream);
PYENGINE_INSTANCE(bfloat16, 64)
PYENGINE_INSTANCE(bfloat16, 72)
PYENGINE_INSTANCE(bfloat16, 128)
PYENGINE_INSTANCE(float16, 64)
PYENGINE_INSTANCE(float16, 72)
PYENGINE_INSTANCE(float16, 128)
#undef PYENGINE_INSTANCE

namespace {

std::atomic<bool>& warpgroups_wanted() {
  static std::atomic<bool> wanted = [] {
    const char* asked = std::getenv("PYENGINE_WARPGROUPS");
    return asked && std::strcmp(asked, "1") == 0;
  }();
  return wanted;
}

AttentionLaunch launch_of(const AttentionShape& shape, bool may_split) {
  DeviceInfo device = device_info();
  device.warpgroups = device.warpgroups && warpgroups_wanted();
  return attention_launch(shape, device, may_split);
}

bool aligned(const Tensor& t) {
  return reinterpret_cast<uintptr_t>(t.data) % 16 == 0;
}

AttentionShape shape_of(const FrameWindowAttention& op) {
  const int64_t* s = op.qkv.shape;
  const bool all =
      aligned(op.qkv) && aligned(op.ring_key.one) && aligned(op.ring_value.one) && aligned(op.out);
  return {op.scope, op.qkv.dtype, s[0], s[1], s[2], s[4], s[5], op.ring_key.slots(), all};
}

// Turns per frame of every pair, as fractions of 2^64: theta^(-2k / rotary_dim) / (2 pi), whole turns left
// out.
void fill_frequencies(const FrameWindowAttention& op, uint64_t* frequency) {
  const long double turn = 2 * 3.14159265358979323846264338327950288L;
  for (int64_t k = 0; k < op.rotary_dim / 2; ++k) {
    const long double turns =
        std::pow(static_cast<long double>(op.theta),
                 -2.0L * static_cast<long double>(k) / static_cast<long double>(op.rotary_dim)) /
        turn;
    frequency[k] = static_cast<uint64_t>(std::ldexp(turns - std::floor(turns), 64));
  }
}

AttentionParams params_of(const FrameWindowAttention& op, const AttentionShape& s) {
  AttentionParams p{};
  p.qkv = op.qkv.data, p.out = op.out.data;
  p.ring_key = op.ring_key.one.data, p.ring_value = op.ring_value.one.data;
  p.key_table = op.ring_key.table, p.value_table = op.ring_value.table;
  p.level = op.level.as<float>();
  p.frame_index = indices(op.frame_index), p.ring_index = indices(op.ring_index);
  p.reach = indices(op.reach), p.append_slot = indices(op.append_slot);
  p.q_gain = op.q_gain.as<float>(), p.k_gain = op.k_gain.as<float>();
  p.key_scale = op.ring_key_scale.as<float>(), p.value_scale = op.ring_value_scale.as<float>();
  p.streams = static_cast<int>(op.frame_index.shape[0]);
  p.batch = static_cast<int>(s.batch), p.frames = static_cast<int>(s.frames),
  p.tokens = static_cast<int>(s.tokens);
  p.heads = static_cast<int>(s.heads), p.head_dim = static_cast<int>(s.head_dim),
  p.ring = static_cast<int>(s.ring);
  p.mask = op.mask;
  p.rotation = op.rotary_dim == 0 ? Rotation::none
               : op.interleaved   ? Rotation::interleaved
                                  : Rotation::halves;
  p.rotary_dim = static_cast<int>(op.rotary_dim);
  p.epsilon = static_cast<float>(op.epsilon);
  p.inverse_dim = 1.0f / static_cast<float>(s.head_dim);
  const double scale = op.scale != 0 ? op.scale : 1 / std::sqrt(static_cast<double>(s.head_dim));
  p.score_scale = static_cast<float>(scale * std::log2(std::exp(1.0)));
  p.splits = 1;
  fill_frequencies(op, p.frequency);
  return p;
}

unsigned row_blocks(const AttentionParams& p) {
  const int64_t rows = static_cast<int64_t>(p.batch) * p.frames * p.tokens * p.heads;
  return static_cast<unsigned>((rows + kRowsWarps - 1) / kRowsWarps);
}

template <class T>
void launch_rows(const AttentionParams& p, const AttentionLaunch& l, Scope scope, void* stream) {
  static_assert(sizeof(RowsScratch) * kRowsWarps == 4 * (2 * 256 + 32) * 4,
                "heuristics count the same bytes");
  launch(scope == Scope::temporal ? rows_kernel<T, true> : rows_kernel<T, false>, {row_blocks(p)}, l.threads,
         l.shared_bytes, stream, p);
}

// What comes after attention: putting splits together, and appending where the attention kernel did not.
template <class T>
void finish(const AttentionParams& p, const AttentionLaunch& l, void* stream) {
  if (l.splits > 1) launch(combine_kernel<T>, {row_blocks(p)}, kBlockThreads, 0, stream, p);
  if (p.append_slot.data && l.kernel != Kernel::temporal)
    launch(append_kernel<T>, {row_blocks(p)}, kRowsWarps * kWarp, 0, stream, p);
}

template <class T, int D>
void launch_tensor_cores(const AttentionParams& p, const AttentionLaunch& l, void* stream) {
  if (l.kernel == Kernel::temporal) return launch_temporal<T, D>(p, l, stream);
  launch_frame<T, D>(p, l, stream);
}

template <class T>
void run16(const AttentionParams& p, const AttentionLaunch& l, Scope scope, void* stream) {
  if (l.kernel == Kernel::rows)
    launch_rows<T>(p, l, scope, stream);
  else if (p.head_dim == 64)
    launch_tensor_cores<T, 64>(p, l, stream);
  else if (p.head_dim == 72)
    launch_tensor_cores<T, 72>(p, l, stream);
  else
    launch_tensor_cores<T, 128>(p, l, stream);
  finish<T>(p, l, stream);
}

}  // namespace

bool use_warpgroups(bool wanted) {
  return warpgroups_wanted().exchange(wanted);
}

int64_t frame_window_attention_workspace(const FrameWindowAttention& op) {
  check(op.qkv.rank == 6,
        "[frame_window_attention] expected qkv [batch, frames, tokens, 3, heads, head_dim] but got ", op.qkv);
  check(op.qkv.size() > 0, "[frame_window_attention] expected qkv with values but got ", op.qkv);
  return launch_of(shape_of(op), true).workspace_bytes;
}

void frame_window_attention(const FrameWindowAttention& op, void* stream) {
  check_op(op, Place::device);
  const Tensor& workspace = op.workspace;
  const AttentionShape shape = shape_of(op);
  const AttentionLaunch l = launch_of(shape, static_cast<bool>(workspace));
  AttentionParams p = params_of(op, shape);
  if (workspace) {
    const int64_t given = workspace.size() * bytes(workspace.dtype);
    check(given >= l.workspace_bytes && aligned(workspace),
          "[frame_window_attention] expected workspace of at least ", l.workspace_bytes,
          " bytes at a 16-byte boundary but got ", given, " bytes: ask frame_window_attention_workspace");
    p.partial = workspace.as<float>();
  }
  p.splits = l.splits, p.stages = l.stages, p.sequences = l.sequences, p.team = l.team;
  switch (op.qkv.dtype) {
    case DType::float32:
      launch_rows<float>(p, l, op.scope, stream);
      return finish<float>(p, l, stream);
    case DType::bfloat16:
      return run16<bfloat16>(p, l, op.scope, stream);
    case DType::float16:
      return run16<float16>(p, l, op.scope, stream);
    default:
      throw std::logic_error("frame_window_attention: a dtype that check_op let through");
  }
}

}  // namespace pyengine::ops::cuda
