// How arrays on a device become tensors: any Python object with `pointer: int`, `shape: tuple[int, ...]` and
// `dtype: str` will do, C-contiguous and writable.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "bindings/bind_op.h"

namespace pyengine::bindings {

inline DType dtype_of(const std::string& text) {
  if (text == "float32") return DType::float32;
  if (text == "float16") return DType::float16;
  if (text == "bfloat16") return DType::bfloat16;
  if (text == "float8_e4m3") return DType::float8_e4m3;
  if (text == "int64") return DType::int64;
  if (text == "int32") return DType::int32;
  if (text == "uint8") return DType::uint8;
  return DType::other;
}

// `what` names the argument in messages; None is an absent tensor.
inline Tensor device_tensor(const char* op, const char* what, const py::object& array) {
  Tensor t;
  if (array.is_none()) return t;
  for (const char* attribute : {"pointer", "shape", "dtype"})
    check(py::hasattr(array, attribute), "[", op, "] expected ", what,
          " to be an array on the device, with attributes pointer, shape and dtype, but got ",
          std::string(py::str(py::type::of(array).attr("__name__"))),
          ": copy it there with pyengine.device.array.DeviceArray");
  const py::tuple shape = array.attr("shape");
  check(shape.size() <= kMaxRank, "[", op, "] expected ", what, " of at most ", kMaxRank,
        " dimensions but got ", shape.size());
  t.data = reinterpret_cast<void*>(array.attr("pointer").cast<uintptr_t>());
  t.dtype = dtype_of(array.attr("dtype").cast<std::string>());
  t.rank = static_cast<int>(shape.size());
  for (int i = 0; i < t.rank; ++i) t.shape[i] = shape[i].cast<int64_t>();
  t.writable = true;
  check(t.data != nullptr || t.size() == 0, "[", op, "] expected ", what,
        " in memory but its pointer is null");
  return t;
}

}  // namespace pyengine::bindings
