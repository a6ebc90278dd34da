#include "core/tensor.h"

namespace pyengine {

namespace {

template <class Iterator>
std::string list(Iterator begin, Iterator end) {
  std::ostringstream out;
  out << '[';
  for (Iterator i = begin; i != end; ++i) out << (i == begin ? "" : ",") << *i;
  out << ']';
  return out.str();
}

}  // namespace

const char* name(DType dtype) {
  switch (dtype) {
    case DType::float32:
      return "float32";
    case DType::bfloat16:
      return "bfloat16 (uint16)";
    case DType::int32:
      return "int32";
    case DType::int64:
      return "int64";
    case DType::float16:
      return "float16";
    case DType::float8_e4m3:
      return "float8_e4m3";
    case DType::uint8:
      return "uint8";
    case DType::other:
      return "another dtype";
  }
  throw std::logic_error("name(DType): unknown dtype");
}

std::ostream& operator<<(std::ostream& out, const Tensor& tensor) {
  if (!tensor) return out << "nothing";
  return out << name(tensor.dtype) << ' ' << list(tensor.shape, tensor.shape + tensor.rank);
}

void Expect::shape(const char* what, const Tensor& t, std::initializer_list<int64_t> shape) const {
  bool same = t.rank == static_cast<int>(shape.size());
  int i = 0;
  for (int64_t extent : shape) same = same && t.shape[i++] == extent;
  if (!same)
    check(false, "[", op, "] expected ", what, " of shape ", list(shape.begin(), shape.end()), " but got ",
          t);
}

void Expect::dtype(const char* what, const Tensor& t, DType dtype) const {
  if (t.dtype != dtype) check(false, "[", op, "] expected ", what, " of dtype ", name(dtype), " but got ", t);
}

void Expect::layout(const char* what, const Tensor& t) const {
  if (!t.contiguous)
    check(false, "[", op, "] expected ", what, " to be C-contiguous but got a strided view of ", t,
          ": pass numpy.ascontiguousarray of it");
}

void Expect::writable(const char* what, const Tensor& t) const {
  if (!t.writable) check(false, "[", op, "] expected ", what, " to be writable but got a read-only array");
}

void Expect::input(const char* what, const Tensor& t, DType dtype,
                   std::initializer_list<int64_t> shape) const {
  this->dtype(what, t, dtype);
  this->shape(what, t, shape);
  layout(what, t);
}

void Expect::output(const char* what, const Tensor& t, DType dtype,
                    std::initializer_list<int64_t> shape) const {
  input(what, t, dtype, shape);
  writable(what, t);
}

}  // namespace pyengine
