#include "bindings/op_binding.h"
#include "ops/scaled_add/op.h"

namespace pyengine::ops {

void visit(bindings::Arguments& in, ScaledAdd& op) {
  in.input("x", op.x);
  in.input("y", op.y);
  in.array("out", op.out);
  in.attribute("scale", op.scale);
}

PYENGINE_BIND(ScaledAdd, scaled_add, "out = x + scale * y.")

}  // namespace pyengine::ops
