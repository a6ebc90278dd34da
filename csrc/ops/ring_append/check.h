// What RingAppend expects of its tensors, on any device.
#pragma once

#include "core/dtype.h"
#include "core/index.h"
#include "ops/ring_append/op.h"

namespace pyengine::ops {

inline void check_op(const RingAppend& op, Place place) {
  constexpr Expect expect{"ring_append"};
  const Tensor &key = op.key, &ring_key = op.ring_key;
  check(key.rank == 5, "[ring_append] expected key [batch, frames, tokens, heads, head_dim] but got ", key);
  check(ring_key.rank == 5, "[ring_append] expected ring_key [batch, ring, tokens, heads, head_dim] but got ",
        ring_key);
  check_float("ring_append", "key", key, place);
  const int64_t batch = key.shape[0], frames = key.shape[1], ring = ring_key.shape[1];
  const int64_t tokens = key.shape[2], heads = key.shape[3], head_dim = key.shape[4];
  const bool quantised = place == Place::device && ring_key.dtype == DType::float8_e4m3;
  const DType kept = quantised ? DType::float8_e4m3 : key.dtype;
  expect.layout("key", key);
  expect.input("value", op.value, key.dtype, {batch, frames, tokens, heads, head_dim});
  expect.output("ring_key", ring_key, kept, {batch, ring, tokens, heads, head_dim});
  expect.output("ring_value", op.ring_value, kept, {batch, ring, tokens, heads, head_dim});
  check_ring_scales(expect, ring_key, op.ring_key_scale, op.ring_value_scale, heads);
  check_append_slot(expect, op.append_slot, frames, ring, place);
}

}  // namespace pyengine::ops
