// How numpy arrays become tensors. bfloat16 is uint16 bit patterns.
#include <pybind11/numpy.h>

#include <algorithm>

#include "bindings/arguments.h"

namespace pyengine::bindings {

namespace {

DType dtype_of(const py::array& array) {
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

}  // namespace

Tensor tensor_of(const char* op, const char* name, py::handle object) {
  if (!py::isinstance<py::array>(object))
    check(false, "[", op, "] expected ", name, " to be a numpy array but got ",
          std::string(py::str(py::type::of(object).attr("__name__"))));
  const auto array = py::reinterpret_borrow<py::array>(object);
  check(array.ndim() <= kMaxRank, "[", op, "] expected ", name, " of at most ", kMaxRank,
        " dimensions but got ", array.ndim());
  Tensor t;
  t.data = const_cast<void*>(array.data());
  t.dtype = dtype_of(array);
  t.rank = static_cast<int>(array.ndim());
  for (int i = 0; i < t.rank; ++i) t.shape[i] = array.shape(i);
  t.writable = array.writeable();
  t.contiguous = array.flags() & py::array::c_style;
  return t;
}

// One array per stream in a list or tuple, or one array alone.
Rings rings_of(const char* op, const char* name, py::handle arrays, void** room) {
  Rings rings;
  const bool list = py::isinstance<py::list>(arrays);
  if (!list && !py::isinstance<py::tuple>(arrays)) {
    rings.one = tensor_of(op, name, arrays);
    return rings;
  }
  PyObject* sequence = arrays.ptr();
  rings.streams = PySequence_Fast_GET_SIZE(sequence);
  check(rings.streams > 0 && rings.streams <= kMaxStreams, "[", op, "] expected ", name, " of 1 to ",
        kMaxStreams, " streams but got ", rings.streams);
  rings.table = room;
  for (int64_t s = 0; s < rings.streams; ++s) {
    const Tensor t = tensor_of(op, name, PySequence_Fast_GET_ITEM(sequence, s));
    if (s == 0) rings.one = t;
    Tensor& one = rings.one;
    check(t.dtype == one.dtype && t.rank == one.rank && std::equal(t.shape, t.shape + t.rank, one.shape), "[",
          op, "] expected the ", name, " of stream ", s, " like that of stream 0, ", one, ", but got ", t);
    one.writable = one.writable && t.writable;
    one.contiguous = one.contiguous && t.contiguous;
    room[s] = t.data;
  }
  return rings;
}

}  // namespace pyengine::bindings
