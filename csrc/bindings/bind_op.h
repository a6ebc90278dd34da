// How numpy arrays become tensors. Bindings hold no logic: they fill an op's struct and call it without the
// GIL.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "core/tensor.h"

namespace pyengine::bindings {

namespace py = pybind11;

// An argument's name, interned for good. pybind11 interns the names at every call; one that nothing else
// holds would enter and leave Python's table of interned strings each time, until that table doubles (about 1
// MB).
inline py::arg operator""_a(const char* name, size_t) {
  PyUnicode_InternFromString(name);  // this reference is kept on purpose
  return py::arg(name);
}

inline DType dtype_of(const py::array& array) {
  const py::dtype dtype = array.dtype();
  if (dtype.byteorder() == '>') return DType::other;
  const char kind = dtype.kind();
  const auto size = dtype.itemsize();
  if (kind == 'f' && size == 4) return DType::float32;
  if (kind == 'u' && size == 2) return DType::bfloat16;
  if (kind == 'i' && size == 4) return DType::int32;
  if (kind == 'i' && size == 8) return DType::int64;
  return DType::other;
}

inline Tensor tensor(const py::array& array) {
  check(array.ndim() <= kMaxRank, "expected an array of at most ", kMaxRank, " dimensions but got ",
        array.ndim());
  Tensor t;
  t.data = const_cast<void*>(array.data());
  t.dtype = dtype_of(array);
  t.rank = static_cast<int>(array.ndim());
  for (int i = 0; i < t.rank; ++i) t.shape[i] = array.shape(i);
  t.writable = array.writeable();
  t.contiguous = array.flags() & py::array::c_style;
  return t;
}

using OptionalArray = std::optional<py::array>;
inline Tensor tensor(const OptionalArray& array) {
  return array ? tensor(*array) : Tensor{};
}

// One name of a closed list, as the enum that it stands for.
template <class Enum, size_t n>
Enum parse(const char* op, const char* what, const std::string& text,
           const std::pair<const char*, Enum> (&names)[n]) {
  std::string known;
  for (const auto& [name, value] : names) {
    if (text == name) return value;
    known += (known.empty() ? "" : ", ") + std::string(name);
  }
  throw std::invalid_argument("[" + std::string(op) + "] expected " + what + " to be one of " + known +
                              " but got '" + text + "'");
}

}  // namespace pyengine::bindings
