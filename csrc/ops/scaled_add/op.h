// ScaledAdd: out = x + scale * y.
#pragma once

#include "core/tensor.h"

namespace pyengine::ops {

struct ScaledAdd {
  Tensor x, y;  // float32, one shape
  Tensor out;
  double scale = 1;
};

void scaled_add(const ScaledAdd& op);

}  // namespace pyengine::ops
