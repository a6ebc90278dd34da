// How arrays on a device become tensors: any Python object with `pointer: int`, `shape: tuple[int, ...]` and
// `dtype: str` will do, C-contiguous and writable. The rings of several streams are an object with `bases`,
// an int64 array [streams] of their addresses on the device, and the `shape` and `dtype` of each.
#include "bindings/arguments.h"

namespace pyengine::bindings {

namespace {

DType dtype_of(const std::string& text) {
  if (text == "float32") return DType::float32;
  if (text == "float16") return DType::float16;
  if (text == "bfloat16") return DType::bfloat16;
  if (text == "float8_e4m3") return DType::float8_e4m3;
  if (text == "int64") return DType::int64;
  if (text == "int32") return DType::int32;
  if (text == "uint8") return DType::uint8;
  return DType::other;
}

// Dtype and shape of an array that may be anywhere.
Tensor form_of(const char* op, const char* name, py::handle array) {
  const py::tuple shape = array.attr("shape");
  check(shape.size() <= kMaxRank, "[", op, "] expected ", name, " of at most ", kMaxRank,
        " dimensions but got ", shape.size());
  Tensor t;
  t.dtype = dtype_of(array.attr("dtype").cast<std::string>());
  t.rank = static_cast<int>(shape.size());
  for (int i = 0; i < t.rank; ++i) t.shape[i] = shape[i].cast<int64_t>();
  t.writable = true;
  return t;
}

}  // namespace

Tensor tensor_of(const char* op, const char* name, py::handle array) {
  for (const char* attribute : {"pointer", "shape", "dtype"})
    if (!py::hasattr(array, attribute))
      check(false, "[", op, "] expected ", name,
            " to be an array on the device, with attributes pointer, shape and dtype, but got ",
            std::string(py::str(py::type::of(array).attr("__name__"))),
            ": copy it there with pyengine.device.array.DeviceArray");
  Tensor t = form_of(op, name, array);
  t.data = reinterpret_cast<void*>(array.attr("pointer").cast<uintptr_t>());
  check(t.data != nullptr || t.size() == 0, "[", op, "] expected ", name,
        " in memory but its pointer is null");
  return t;
}

Rings rings_of(const char* op, const char* name, py::handle arrays, void**) {
  Rings rings;
  if (!py::hasattr(arrays, "bases")) {
    rings.one = tensor_of(op, name, arrays);
    return rings;
  }
  const std::string what = std::string(name) + ".bases";
  const Tensor bases = tensor_of(op, what.c_str(), arrays.attr("bases"));
  check(bases.dtype == DType::int64 && bases.rank == 1, "[", op, "] expected ", what,
        " of dtype int64, one address per stream, but got ", bases);
  rings.one = form_of(op, name, arrays);
  rings.table = bases.as<void*>();
  rings.streams = bases.shape[0];
  return rings;
}

}  // namespace pyengine::bindings
