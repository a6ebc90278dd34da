#include "ops/ring_append/op.h"

#include <cstring>

#include "core/dtype.h"
#include "core/index.h"
#include "core/parallel.h"

namespace pyengine::ops {

namespace {

constexpr Expect expect{"ring_append"};
constexpr int64_t kInlineBytes = 1 << 18;  // a copy of this size takes about as long as waking a thread

}  // namespace

void ring_append(const RingAppend& op) {
  const Tensor &key = op.key, &ring_key = op.ring_key;
  check(key.rank == 5, "[ring_append] expected key [batch, frames, tokens, heads, head_dim] but got ", key);
  check(ring_key.rank == 5, "[ring_append] expected ring_key [batch, ring, tokens, heads, head_dim] but got ",
        ring_key);
  check(is_float(key.dtype), "[ring_append] expected key of dtype float32 or bfloat16 (uint16) but got ",
        key);
  const int64_t batch = key.shape[0], frames = key.shape[1], ring = ring_key.shape[1];
  const int64_t tokens = key.shape[2], heads = key.shape[3], head_dim = key.shape[4];
  expect.layout("key", key);
  expect.input("value", op.value, key.dtype, {batch, frames, tokens, heads, head_dim});
  expect.output("ring_key", ring_key, key.dtype, {batch, ring, tokens, heads, head_dim});
  expect.output("ring_value", op.ring_value, key.dtype, {batch, ring, tokens, heads, head_dim});
  check_append_slot(expect, op.append_slot, frames, ring);

  const int64_t row = tokens * heads * head_dim * bytes(key.dtype);
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
