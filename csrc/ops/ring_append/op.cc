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
  const Tensor &key = op.key, &ring_key = op.ring_key;
  const int64_t batch = key.shape[0], frames = key.shape[1], ring = ring_key.shape[1];
  const int64_t row = key.shape[2] * key.shape[3] * key.shape[4] * bytes(key.dtype);
  const int64_t grain = batch * frames * row <= kInlineBytes ? batch * frames : 1;
  parallel_for(batch * frames, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t slot = index_at(op.append_slot, i % frames);
      if (slot < 0) continue;
      const int64_t to = (i / frames * ring + slot) * row;
      std::memcpy(ring_key.as<char>() + to, key.as<char>() + i * row, row);
      std::memcpy(op.ring_value.as<char>() + to, op.value.as<char>() + i * row, row);
    }
  });
}

}  // namespace pyengine::ops
