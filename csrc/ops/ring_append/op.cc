#include "ops/ring_append/op.h"

#include <cstring>

#include "core/dtype.h"
#include "core/index.h"
#include "core/parallel.h"
#include "ops/ring_append/check.h"

namespace pyengine::ops {

namespace {

constexpr int64_t kInlineBytes = 1 << 18;  // a copy of this size takes about as long as waking a thread

}  // namespace

void ring_append(const RingAppend& op) {
  check_op(op, Place::host);
  const Tensor& key = op.key;
  const int64_t batch = key.shape[0], frames = key.shape[1], ring = op.ring_key.slots();
  const int64_t streams = op.append_slot.shape[0];
  const int64_t row = key.shape[2] * key.shape[3] * key.shape[4] * bytes(key.dtype);
  const int64_t grain = batch * frames * row <= kInlineBytes ? batch * frames : 1;
  parallel_for(batch * frames, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / frames, stream = b % streams;
      const int64_t slot = index_at(op.append_slot, stream * frames + i % frames);
      if (slot < 0) continue;
      const int64_t to = (b / streams * ring + slot) * row;
      std::memcpy(static_cast<char*>(op.ring_key.of(stream)) + to, key.as<char>() + i * row, row);
      std::memcpy(static_cast<char*>(op.ring_value.of(stream)) + to, op.value.as<char>() + i * row, row);
    }
  });
}

}  // namespace pyengine::ops
