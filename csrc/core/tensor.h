// A view of an array that somebody else owns, and the checks ops make at the door.
#pragma once

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

namespace pyengine {

// float16, float8_e4m3 and uint8 exist on devices only.
enum class DType { float32, bfloat16, int32, int64, float16, float8_e4m3, uint8, other };

// Where the arrays of an op live. The values of arrays on a device cannot be looked at before the op runs.
enum class Place { host, device };

constexpr int kMaxRank = 8;

struct Tensor {
  void* data = nullptr;
  DType dtype = DType::other;
  int rank = 0;
  int64_t shape[kMaxRank] = {};
  bool writable = false;
  bool contiguous = true;  // C order

  explicit operator bool() const { return data != nullptr || rank > 0; }
  int64_t size() const {
    int64_t n = 1;
    for (int i = 0; i < rank; ++i) n *= shape[i];
    return n;
  }
  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

const char* name(DType dtype);
std::ostream& operator<<(std::ostream& out, const Tensor& tensor);  // "float32 [2,8,16]"

// Throws std::invalid_argument (ValueError in Python) with the parts as one sentence.
template <class... Parts>
void check(bool holds, const Parts&... parts) {
  if (holds) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

// One tensor's expectations: "[op] expected level to be float32 [2,8] but got float32 [2,9]".
struct Expect {
  const char* op;

  void shape(const char* what, const Tensor& t, std::initializer_list<int64_t> shape) const;
  void dtype(const char* what, const Tensor& t, DType dtype) const;
  void layout(const char* what, const Tensor& t) const;    // C-contiguous
  void writable(const char* what, const Tensor& t) const;  // an output
  // The usual three at once.
  void input(const char* what, const Tensor& t, DType dtype, std::initializer_list<int64_t> shape) const;
  void output(const char* what, const Tensor& t, DType dtype, std::initializer_list<int64_t> shape) const;
};

}  // namespace pyengine
