// The arguments of one call of an op, read from Python by name into the op's struct. An op says what it takes
// once, in `visit` of its bind.cc; the same list serves arrays of numpy (_C), arrays of a device (_cuda) and
// `signature`. What may be absent, and of which shape it has to be, is not said here: the op checks that.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <utility>
#include <vector>

#include "core/index.h"

namespace pyengine::bindings {

namespace py = pybind11;

// What an op takes, in the order of its `visit`.
struct Signature {
  std::vector<std::string> inputs;      // arrays, as the ONNX node orders them; also by position
  std::vector<std::string> arrays;      // by name only: outputs, slots, scratch
  std::vector<std::string> attributes;  // by name only
  std::vector<PyObject*> interned;      // all of these names as Python has them, for good
};

class Arguments {
 public:
  // Reads a call: a tuple, and a dict or null.
  Arguments(const char* op, const Signature& signature, PyObject* positional, PyObject* named)
      : op_(op), signature_(signature), positional_(positional), named_(named) {}
  // Lists into `signature` what would be read.
  explicit Arguments(Signature& signature) : signature_(signature), listed_(&signature) {}
  Arguments(const Arguments&) = delete;

  void input(const char* name, Tensor& to);
  void input(const char* name, Rings& to);  // one array, or what rings_of takes
  void array(const char* name, Tensor& to);
  void attribute(const char* name, bool& to);
  void attribute(const char* name, int64_t& to);
  void attribute(const char* name, double& to);
  void attribute(const char* name, uintptr_t& to, const char* kind);

  // One name of a closed list, as the enum that it stands for.
  template <class Enum, size_t n>
  void attribute(const char* name, Enum& to, const std::pair<const char*, Enum> (&choices)[n]) {
    std::string text;
    if (!read(name, text)) return;
    std::string known;
    for (const auto& [choice, value] : choices) {
      if (text == choice) {
        to = value;
        return;
      }
      known += (known.empty() ? "" : ", ") + std::string(choice);
    }
    check(false, "[", op_, "] expected ", name, " to be one of ", known, " but got '", text, "'");
  }

  // After the last one: TypeError for an argument that the op does not take.
  void finish() const;

 private:
  void list(std::vector<std::string>& names, const char* name);
  PyObject* key() { return signature_.interned[visited_++]; }  // visits are always in the same order
  py::handle next(PyObject* name);   // by position or by name; null if absent or None
  py::handle named(PyObject* name);  // by name
  bool read(const char* name, std::string& to);
  template <class T>
  bool read_as(const char* name, T& to, const char* kind);

  const char* op_ = "";
  const Signature& signature_;
  Signature* listed_ = nullptr;
  PyObject *positional_ = nullptr, *named_ = nullptr;
  Py_ssize_t position_ = 0, found_ = 0;
  size_t visited_ = 0;
  int tables_ = 0;
  void* table_[2][kMaxStreams];  // the addresses of ring keys and of ring values
};

// Of numpy_array.cc or device_array.cc, as the module has it: how an array becomes a tensor, and several of
// them or a table become rings. `room` has space for kMaxStreams addresses.
Tensor tensor_of(const char* op, const char* name, py::handle array);
Rings rings_of(const char* op, const char* name, py::handle arrays, void** room);

}  // namespace pyengine::bindings
