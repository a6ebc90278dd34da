// What ops share about rings: where they are, small integer arrays of frame indices and slots, and scales of
// an 8-bit ring.
#pragma once

#include "core/tensor.h"

namespace pyengine {

constexpr int64_t kMaxStreams = 64;  // of one call

// The rings of the streams of a batch, arrays of one dtype and shape, each in memory of its own: a stream
// joins or leaves a batch by an entry of the table. The rings of streams that are not there may be the same.
struct Rings {
  Tensor one;  // [branches, ring, tokens, heads, head_dim] of the first stream, or absent: no ring
  void* const* table = nullptr;  // [streams] addresses, on the device if the rings are; null: `one` alone
  int64_t streams = 1;

  explicit operator bool() const { return static_cast<bool>(one); }
  int64_t slots() const { return one.rank > 1 ? one.shape[1] : 0; }
  void* of(int64_t stream) const { return table ? table[stream] : one.data; }  // on the host
};

// Rings [branches, slots, tokens, heads, head_dim] of `streams` streams.
inline void check_rings(const Expect& expect, const char* what, const Rings& rings, DType dtype,
                        int64_t streams, std::initializer_list<int64_t> shape) {
  check(rings.streams == streams, "[", expect.op, "] expected ", what, " of ", streams,
        " streams, one ring each, but got ", rings.streams);
  expect.input(what, rings.one, dtype, shape);
}

// Element i of an int32 or int64 tensor.
inline int64_t index_at(const Tensor& t, int64_t i) {
  return t.dtype == DType::int32 ? t.as<int32_t>()[i] : t.as<int64_t>()[i];
}

// int32 or int64 of this shape, C-contiguous.
inline void check_indices(const Expect& expect, const char* what, const Tensor& t,
                          std::initializer_list<int64_t> shape) {
  expect.input(what, t, t.dtype == DType::int32 ? DType::int32 : DType::int64, shape);
}

// append_slot[s, i] is the slot of the ring of stream s that its frame i goes to, -1 = nowhere: in range, no
// slot twice and no ring for two streams. Values on a device are not looked at; kernels take what is out of
// range as -1.
inline void check_append_slot(const Expect& expect, const Tensor& append_slot, const Rings& rings,
                              int64_t streams, int64_t frames, Place place) {
  check_indices(expect, "append_slot", append_slot, {streams, frames});
  if (place == Place::device) return;
  const int64_t slots = rings.slots();
  void* written[kMaxStreams];
  int64_t count = 0;
  for (int64_t s = 0; s < streams; ++s) {
    bool writes = false;
    for (int64_t i = 0; i < frames; ++i) {
      const int64_t slot = index_at(append_slot, s * frames + i);
      check(slot >= -1 && slot < slots, "[", expect.op, "] expected append_slot within [-1, ", slots,
            ") but got ", slot, " for frame ", i, " of stream ", s);
      if (slot < 0) continue;
      writes = true;
      for (int64_t j = 0; j < i; ++j)
        check(index_at(append_slot, s * frames + j) != slot, "[", expect.op,
              "] expected every slot at most once but append_slot has ", slot, " for frames ", j, " and ", i,
              " of stream ", s);
    }
    if (!writes) continue;
    for (int64_t i = 0; i < count; ++i)
      check(written[i] != rings.of(s), "[", expect.op,
            "] expected a ring of its own for every stream that appends but stream ", s,
            " has the ring of another");
    written[count++] = rings.of(s);
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
