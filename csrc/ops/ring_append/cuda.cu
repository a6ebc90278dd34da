#include "core/cuda/index.h"
#include "core/cuda/launch.h"
#include "core/cuda/warp.h"
#include "ops/ring_append/check.h"
#include "ops/ring_append/cuda.h"

namespace pyengine::ops::cuda {

using namespace pyengine::cuda;

namespace {

constexpr int kThreads = 256;
constexpr int kUnitsPerThread = 4;  // copies under way at a time

struct RingAppendParams {
  const char *key, *value;
  char *ring_key, *ring_value;                  // of one stream
  void *const *key_table, *const *value_table;  // [streams] addresses, or null
  const float *key_scale, *value_scale;         // [heads], of a ring of float8_e4m3, else null
  Indices append_slot;
  int64_t streams, frames, ring, row_bytes;  // bytes of one frame's keys
  int heads, head_dim;
  int unit;  // bytes copied at a time: 16 where rows and pointers allow, else the size of a value
};

// The ring of the stream that a frame of the batch belongs to, and where in it the frame goes.
struct Target {
  char *key, *value;
  int64_t row;  // of the stream's ring, -1 = nowhere
};
PYENGINE_DEVICE Target target_of(const RingAppendParams& p, int64_t row) {
  const int64_t b = row / p.frames, stream = b % p.streams;
  const int64_t slot = p.append_slot[stream * p.frames + row % p.frames];
  return {p.key_table ? static_cast<char*>(p.key_table[stream]) : p.ring_key,
          p.value_table ? static_cast<char*>(p.value_table[stream]) : p.ring_value,
          slot < 0 || slot >= p.ring ? -1 : b / p.streams * p.ring + slot};
}

template <class Unit>
PYENGINE_DEVICE void copy(const char* from, char* to, int64_t count, int64_t first) {
  for (int k = 0; k < kUnitsPerThread; ++k) {
    const int64_t i = first + k * kThreads;
    if (i < count) reinterpret_cast<Unit*>(to)[i] = reinterpret_cast<const Unit*>(from)[i];
  }
}

// Blocks: x over units of a row, y over (batch, frame). Bit for bit.
PYENGINE_KERNEL(kThreads, 1)
ring_append_kernel(const RingAppendParams p) {
  const int64_t row = block_y();
  const Target target = target_of(p, row);
  if (target.row < 0) return;
  const int64_t from = row * p.row_bytes, to = target.row * p.row_bytes;
  const int64_t first = static_cast<int64_t>(block_x()) * kThreads * kUnitsPerThread + thread_index();
  const int64_t count = p.row_bytes / p.unit;
  if (p.unit == 16) {
    copy<Words4>(p.key + from, target.key + to, count, first);
    copy<Words4>(p.value + from, target.value + to, count, first);
  } else if (p.unit == 4) {
    copy<uint32_t>(p.key + from, target.key + to, count, first);
    copy<uint32_t>(p.value + from, target.value + to, count, first);
  } else {
    copy<uint16_t>(p.key + from, target.key + to, count, first);
    copy<uint16_t>(p.value + from, target.value + to, count, first);
  }
}

// The same into a ring of float8_e4m3: value / scale of its head, nearest, saturating.
template <class T>
PYENGINE_KERNEL(kThreads, 1)
ring_append_float8_kernel(const RingAppendParams p) {
  const int64_t row = block_y();
  const Target target = target_of(p, row);
  if (target.row < 0) return;
  const int64_t values = p.row_bytes / static_cast<int64_t>(sizeof(T));
  const int64_t from = row * values, to = target.row * values;
  for (int k = 0; k < kUnitsPerThread; ++k) {
    const int64_t i = (static_cast<int64_t>(block_x()) * kUnitsPerThread + k) * kThreads + thread_index();
    if (i >= values) break;
    const int h = static_cast<int>(i / p.head_dim % p.heads);
    const float key = to_float(reinterpret_cast<const T*>(p.key)[from + i]);
    const float value = to_float(reinterpret_cast<const T*>(p.value)[from + i]);
    reinterpret_cast<float8_e4m3*>(target.key)[to + i] = from_float<float8_e4m3>(key / p.key_scale[h]);
    reinterpret_cast<float8_e4m3*>(target.value)[to + i] = from_float<float8_e4m3>(value / p.value_scale[h]);
  }
}

bool aligned(const Tensor& t) {
  return reinterpret_cast<uintptr_t>(t.data) % 16 == 0;
}

}  // namespace

void ring_append(const RingAppend& op, void* stream) {
  check_op(op, Place::device);
  const int64_t* s = op.key.shape;
  const int64_t size = bytes(op.key.dtype), row_bytes = s[2] * s[3] * s[4] * size;
  if (s[0] * s[1] * row_bytes == 0) return;
  const bool all =
      aligned(op.key) && aligned(op.value) && aligned(op.ring_key.one) && aligned(op.ring_value.one);
  const bool quantises = op.ring_key.one.dtype == DType::float8_e4m3;
  const int unit = quantises                    ? static_cast<int>(size)
                   : all && row_bytes % 16 == 0 ? 16
                                                : static_cast<int>(size);
  const RingAppendParams p{op.key.as<char>(),
                           op.value.as<char>(),
                           op.ring_key.one.as<char>(),
                           op.ring_value.one.as<char>(),
                           op.ring_key.table,
                           op.ring_value.table,
                           op.ring_key_scale.as<float>(),
                           op.ring_value_scale.as<float>(),
                           indices(op.append_slot),
                           op.append_slot.shape[0],
                           s[1],
                           op.ring_key.slots(),
                           row_bytes,
                           static_cast<int>(s[3]),
                           static_cast<int>(s[4]),
                           unit};
  const int64_t units = row_bytes / unit, per_block = kThreads * kUnitsPerThread;
  const Grid grid{static_cast<unsigned>((units + per_block - 1) / per_block),
                  static_cast<unsigned>(s[0] * s[1])};
  if (!quantises) return launch(ring_append_kernel, grid, kThreads, 0, stream, p);
  switch (op.key.dtype) {
    case DType::float32:
      return launch(ring_append_float8_kernel<float>, grid, kThreads, 0, stream, p);
    case DType::bfloat16:
      return launch(ring_append_float8_kernel<bfloat16>, grid, kThreads, 0, stream, p);
    case DType::float16:
      return launch(ring_append_float8_kernel<float16>, grid, kThreads, 0, stream, p);
    default:
      throw std::logic_error("ring_append: a dtype that check_op let through");
  }
}

}  // namespace pyengine::ops::cuda
