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

// Throws unless `t` holds floats that kernels of this place compute on.
inline void check_float(const char* op, const char* what, const Tensor& t, Place place) {
  const bool device = place == Place::device;
  check(t.dtype == DType::float32 || t.dtype == DType::bfloat16 || (device && t.dtype == DType::float16), "[",
        op, "] expected ", what, " of dtype float32",
        device ? ", float16 or bfloat16 but got " : " or bfloat16 (uint16) but got ", t);
}

inline int64_t bytes(DType dtype) {
  switch (dtype) {
    case DType::float32:
    case DType::int32:
      return 4;
    case DType::bfloat16:
    case DType::float16:
      return 2;
    case DType::float8_e4m3:
    case DType::uint8:
      return 1;
    case DType::int64:
      return 8;
    case DType::other:
      break;
  }
  throw std::logic_error("bytes(DType): unknown dtype");
}

}  // namespace pyengine
