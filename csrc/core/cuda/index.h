// Arrays of int32 or int64 on a device, as kernels see them.
#pragma once

#include "core/cuda/numbers.h"
#include "core/tensor.h"

namespace pyengine::cuda {

struct Indices {
  const void* data;  // null: absent
  bool wide;         // int64, else int32

  PYENGINE_BOTH int64_t operator[](int64_t i) const {
    return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

inline Indices indices(const Tensor& t) { return {t.data, t.dtype == DType::int64}; }

}  // namespace pyengine::cuda
