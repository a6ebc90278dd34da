// What RingAppend expects of its tensors, on any device.
#pragma once

#include "core/dtype.h"
#include "core/index.h"
#include "ops/ring_append/op.h"

namespace pyengine::ops {

inline void check_op(const RingAppend& op, Place place) {
  constexpr Expect expect{"ring_append"};
  const Tensor &key = op.key, &ring_key = op.ring_key.one;
  check(key.rank == 5, "[ring_append] expected key [batch, frames, tokens, heads, head_dim] but got ", key);
  check(ring_key.rank == 5,
        "[ring_append] expected ring_key [branches, ring, tokens, heads, head_dim] but got ", ring_key);
  check_float("ring_append", "key", key, place);
  check(op.append_slot.rank == 2 && op.append_slot.shape[0] > 0,
        "[ring_append] expected append_slot [streams, frames] but got ", op.append_slot);
  const int64_t batch = key.shape[0], frames = key.shape[1], ring = ring_key.shape[1];
  const int64_t streams = op.append_slot.shape[0], branches = batch / streams;
  check(batch % streams == 0 && streams <= kMaxStreams, "[ring_append] expected a batch of branches * ",
        streams, " streams (of at most ", kMaxStreams, ") but got ", batch);
  const int64_t tokens = key.shape[2], heads = key.shape[3], head_dim = key.shape[4];
  const bool quantised = place == Place::device && ring_key.dtype == DType::float8_e4m3;
  const DType kept = quantised ? DType::float8_e4m3 : key.dtype;
  expect.layout("key", key);
  expect.input("value", op.value, key.dtype, {batch, frames, tokens, heads, head_dim});
  check_rings(expect, "ring_key", op.ring_key, kept, streams, {branches, ring, tokens, heads, head_dim});
  check_rings(expect, "ring_value", op.ring_value, kept, streams, {branches, ring, tokens, heads, head_dim});
  expect.writable("ring_key", ring_key);
  expect.writable("ring_value", op.ring_value.one);
  check_ring_scales(expect, ring_key, op.ring_key_scale, op.ring_value_scale, heads);
  check_append_slot(expect, op.append_slot, op.ring_key, streams, frames, place);
}

}  // namespace pyengine::ops
