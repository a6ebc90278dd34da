// The bfloat16 storage type. Kernels include this, so: no std:: containers, nothing that could emit a weak
// symbol.
#pragma once

#include <cstdint>

namespace pyengine {

struct bfloat16 {  // the upper half of a float32; arithmetic happens in float32
  uint16_t bits;
};

}  // namespace pyengine
