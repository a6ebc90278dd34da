// Closed dispatch over the float dtypes that kernels are written for.
#pragma once

#include "core/bfloat16.h"
#include "core/tensor.h"

namespace pyengine {

template <class T>
struct Tag {
  using type = T;
};

template <class F>
void dispatch_float(DType dtype, const char* op, F&& f) {
  switch (dtype) {
    case DType::float32:
      return f(Tag<float>{});
    case DType::bfloat16:
      return f(Tag<bfloat16>{});
    default:
      check(false, "[", op, "] expected float32 or bfloat16 (uint16) data but got ", name(dtype));
  }
}

inline bool is_float(DType dtype) {
  return dtype == DType::float32 || dtype == DType::bfloat16;
}
inline int64_t bytes(DType dtype) {
  return dtype == DType::bfloat16 ? 2 : dtype == DType::int64 ? 8 : 4;
}

}  // namespace pyengine
