#include "bindings/op_binding.h"
#include "ops/relative_attention/op.h"
#ifdef PYENGINE_BIND_CUDA
#include "ops/relative_attention/cuda.h"
#endif

namespace pyengine::ops {

void visit(bindings::Arguments& in, RelativeAttention& op) {
  in.input("qkv", op.qkv);
  in.input("key_table", op.key_table);
  in.input("value_table", op.value_table);
  in.array("out", op.out);
  in.attribute("transposed", op.transposed);
}

PYENGINE_BIND(RelativeAttention, relative_attention,
              "Attention of qkv [B,T,N,3,H,D] over the frames at each place, with tables [2L+1,D] of clipped "
              "distances, into out [B,T,N,H*D].")

}  // namespace pyengine::ops
