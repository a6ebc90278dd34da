#include "bindings/op_binding.h"
#include "ops/frame_window_attention/op.h"
#ifdef PYENGINE_BIND_CUDA
#include "ops/frame_window_attention/cuda.h"
#endif

namespace pyengine::ops {

void visit(bindings::Arguments& in, FrameWindowAttention& op) {
  in.input("qkv", op.qkv);
  in.input("level", op.level);
  in.input("frame_index", op.frame_index);
  in.input("ring_key", op.ring_key);
  in.input("ring_value", op.ring_value);
  in.input("ring_index", op.ring_index);
  in.input("q_gain", op.q_gain);
  in.input("k_gain", op.k_gain);
  in.input("reach", op.reach);
  in.array("out", op.out);
  in.array("append_slot", op.append_slot);
  in.array("ring_key_scale", op.ring_key_scale);
  in.array("ring_value_scale", op.ring_value_scale);
  in.array("workspace", op.workspace);
  in.attribute("scope", op.scope, {{"temporal", Scope::temporal}, {"frame", Scope::frame}});
  in.attribute("mask", op.mask,
               {{"bidirectional", Mask::bidirectional},
                {"noise_causal", Mask::noise_causal},
                {"ranged", Mask::ranged}});
  in.attribute("theta", op.theta);
  in.attribute("rotary_dim", op.rotary_dim);
  in.attribute("interleaved", op.interleaved);
  in.attribute("epsilon", op.epsilon);
  in.attribute("scale", op.scale);
}

PYENGINE_BIND(FrameWindowAttention, frame_window_attention,
              "Attention of qkv [B,F,N,3,H,D] over [ring | active] frames of the same stream into out "
              "[B,F,N,H*D]; then appends to the rings, one [branches,R,N,H,D] per stream.")

}  // namespace pyengine::ops
