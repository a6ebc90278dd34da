// What ops share about rings: small integer arrays of frame indices and slots, and scales of an 8-bit ring.
#pragma once

#include "core/tensor.h"

namespace pyengine {

// Element i of an int32 or int64 tensor.
inline int64_t index_at(const Tensor& t, int64_t i) {
  return t.dtype == DType::int32 ? t.as<int32_t>()[i] : t.as<int64_t>()[i];
}

// int32 or int64 [count], C-contiguous.
inline void check_indices(const Expect& expect, const char* what, const Tensor& t, int64_t count) {
  expect.input(what, t, t.dtype == DType::int32 ? DType::int32 : DType::int64, {count});
}

// append_slot[i] is the ring slot that frame i goes to, -1 = nowhere: in range, and no slot twice. Values on
// a device are not looked at; kernels take what is out of range as -1.
inline void check_append_slot(const Expect& expect, const Tensor& append_slot, int64_t frames, int64_t ring,
                              Place place) {
  check_indices(expect, "append_slot", append_slot, frames);
  if (place == Place::device) return;
  for (int64_t i = 0; i < frames; ++i) {
    const int64_t slot = index_at(append_slot, i);
    check(slot >= -1 && slot < ring, "[", expect.op, "] expected append_slot within [-1, ", ring,
          ") but got ", slot, " for frame ", i);
    for (int64_t j = 0; slot >= 0 && j < i; ++j)
      check(index_at(append_slot, j) != slot, "[", expect.op,
            "] expected every slot at most once but append_slot has ", slot, " for frames ", j, " and ", i);
  }
}

// A ring of its own dtype needs one scale per head beside it; only devices have one (float8_e4m3).
inline void check_ring_scales(const Expect& expect, const Tensor& ring, const Tensor& key_scale,
                              const Tensor& value_scale, int64_t heads) {
  if (ring.dtype != DType::float8_e4m3) {
    check(!key_scale && !value_scale, "[", expect.op,
          "] expected ring_key_scale and ring_value_scale only with a float8_e4m3 ring but got a ring of ",
          ring);
    return;
  }
  expect.input("ring_key_scale", key_scale, DType::float32, {heads});
  expect.input("ring_value_scale", value_scale, DType::float32, {heads});
}

}  // namespace pyengine
