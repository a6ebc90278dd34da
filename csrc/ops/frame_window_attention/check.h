// What FrameWindowAttention expects of its tensors, on any device.
#pragma once

#include "core/dtype.h"
#include "core/index.h"
#include "ops/frame_window_attention/op.h"

namespace pyengine::ops {

inline void check_op(const FrameWindowAttention& op, Place place) {
  constexpr Expect expect{"frame_window_attention"};
  constexpr int64_t kMaxHeadDim = 256;
  const Tensor &qkv = op.qkv, &ring = op.ring_key.one;
  check(qkv.rank == 6 && qkv.shape[3] == 3,
        "[frame_window_attention] expected qkv [batch, frames, tokens, 3, heads, head_dim] but got ", qkv);
  check_float("frame_window_attention", "qkv", qkv, place);
  expect.layout("qkv", qkv);
  const int64_t batch = qkv.shape[0], frames = qkv.shape[1], tokens = qkv.shape[2], heads = qkv.shape[4],
                dim = qkv.shape[5];
  check(qkv.size() > 0, "[frame_window_attention] expected qkv with values but got ", qkv);
  check(dim <= kMaxHeadDim, "[frame_window_attention] expected head_dim of at most ", kMaxHeadDim,
        " but got ", dim);
  check(op.frame_index.rank == 2 && op.frame_index.shape[0] > 0,
        "[frame_window_attention] expected frame_index [streams, frames] but got ", op.frame_index);
  const int64_t streams = op.frame_index.shape[0], branches = batch / streams, slots = op.ring_key.slots();
  check(batch % streams == 0, "[frame_window_attention] expected a batch of branches * ", streams,
        " streams but got ", batch);
  check(streams <= kMaxStreams, "[frame_window_attention] expected at most ", kMaxStreams,
        " streams but got ", streams);
  expect.input("level", op.level, DType::float32, {streams, frames});
  check_indices(expect, "frame_index", op.frame_index, {streams, frames});
  check(static_cast<bool>(ring) == static_cast<bool>(op.ring_value) &&
            static_cast<bool>(ring) == static_cast<bool>(op.ring_index),
        "[frame_window_attention] expected ring_key, ring_value and ring_index or none of them but got ",
        ring, ", ", op.ring_value.one, " and ", op.ring_index);
  if (ring) {
    check(ring.rank == 5,
          "[frame_window_attention] expected ring_key [branches, ring, tokens, heads, head_dim] but got ",
          ring);
    const bool quantised = place == Place::device && ring.dtype == DType::float8_e4m3;
    const DType kept = quantised ? DType::float8_e4m3 : qkv.dtype;
    check_rings(expect, "ring_key", op.ring_key, kept, streams, {branches, slots, tokens, heads, dim});
    check_rings(expect, "ring_value", op.ring_value, kept, streams, {branches, slots, tokens, heads, dim});
    check_indices(expect, "ring_index", op.ring_index, {streams, slots});
  }
  check_ring_scales(expect, ring, op.ring_key_scale, op.ring_value_scale, heads);
  expect.output("out", op.out, qkv.dtype, {batch, frames, tokens, heads * dim});
  if (op.append_slot) {
    check_append_slot(expect, op.append_slot, op.ring_key, streams, frames, place);
    if (ring) {
      expect.writable("ring_key", ring);
      expect.writable("ring_value", op.ring_value.one);
    }
  }
  if (op.q_gain) expect.input("q_gain", op.q_gain, DType::float32, {dim});
  if (op.k_gain) expect.input("k_gain", op.k_gain, DType::float32, {dim});
  check(static_cast<bool>(op.reach) == (op.mask == Mask::ranged),
        "[frame_window_attention] expected reach exactly when mask is \"ranged\" but got ", op.reach);
  if (op.reach) check_indices(expect, "reach", op.reach, {streams, frames});
  check(op.rotary_dim >= 0 && op.rotary_dim % 2 == 0 && op.rotary_dim <= dim,
        "[frame_window_attention] expected rotary_dim even and within [0, ", dim, "] but got ",
        op.rotary_dim);
  check(op.theta > 0, "[frame_window_attention] expected theta above 0 but got ", op.theta);
  check(op.epsilon >= 0, "[frame_window_attention] expected epsilon of at least 0 but got ", op.epsilon);
}

}  // namespace pyengine::ops
