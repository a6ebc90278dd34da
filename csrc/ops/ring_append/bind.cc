#include "bindings/op_binding.h"
#include "ops/ring_append/op.h"
#ifdef PYENGINE_BIND_CUDA
#include "ops/ring_append/cuda.h"
#endif

namespace pyengine::ops {

void visit(bindings::Arguments& in, RingAppend& op) {
  in.input("key", op.key);
  in.input("value", op.value);
  in.input("ring_key", op.ring_key);
  in.input("ring_value", op.ring_value);
  in.input("append_slot", op.append_slot);
  in.array("ring_key_scale", op.ring_key_scale);
  in.array("ring_value_scale", op.ring_value_scale);
}

PYENGINE_BIND(
    RingAppend, ring_append,
    "Copies key and value [B,F,N,H,D] of frame i of stream s to slot append_slot[s,i] of the stream's "
    "ring [branches,R,N,H,D], -1 = nowhere.")

}  // namespace pyengine::ops
