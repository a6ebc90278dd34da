// RingAppend: writes keys and values of active frames into ring slots, in place and bit for bit.
// frame_window_attention does this itself when cut; this serves inlined graphs, whose outputs are key and
// value. There is no params.h and no cpu.cc: it is one memcpy per frame, the same on every instruction set.
#pragma once

#include "core/index.h"

namespace pyengine::ops {

struct RingAppend {
  Tensor key, value;           // [batch, frames, tokens, heads, head_dim] float32 or bfloat16
  Rings ring_key, ring_value;  // [branches, ring, tokens, heads, head_dim] each, same dtype, written
  Tensor append_slot;          // [streams, frames] int64 or int32: the slot of a frame, -1 = nowhere
  Tensor ring_key_scale, ring_value_scale;  // [heads] float32, with a ring of float8_e4m3 (devices only)
};

void ring_append(const RingAppend& op);  // throws std::invalid_argument

}  // namespace pyengine::ops
