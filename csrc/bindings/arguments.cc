#include "bindings/arguments.h"

namespace pyengine::bindings {

// Interned once: interning at every call would let names enter and leave Python's table of interned strings
// until that table doubles (about 1 MB).
void Arguments::list(std::vector<std::string>& names, const char* name) {
  names.push_back(name);
  listed_->interned.push_back(PyUnicode_InternFromString(name));
}

py::handle Arguments::named(PyObject* name) {
  PyObject* value = named_ ? PyDict_GetItemWithError(named_, name) : nullptr;
  if (value) ++found_;
  return value == Py_None ? nullptr : value;
}

py::handle Arguments::next(PyObject* name) {
  if (position_ >= PyTuple_GET_SIZE(positional_)) return named(name);
  PyObject* value = PyTuple_GET_ITEM(positional_, position_++);
  return value == Py_None ? nullptr : value;
}

void Arguments::input(const char* name, Tensor& to) {
  if (listed_) return list(listed_->inputs, name);
  if (const py::handle array = next(key())) to = tensor_of(op_, name, array);
}

void Arguments::input(const char* name, Rings& to) {
  if (listed_) return list(listed_->inputs, name);
  if (const py::handle arrays = next(key())) to = rings_of(op_, name, arrays, table_[tables_++]);
}

void Arguments::array(const char* name, Tensor& to) {
  if (listed_) return list(listed_->arrays, name);
  if (const py::handle array = named(key())) to = tensor_of(op_, name, array);
}

template <class T>
bool Arguments::read_as(const char* name, T& to, const char* kind) {
  if (listed_) {
    list(listed_->attributes, name);
    return false;
  }
  const py::handle value = named(key());
  if (!value) return false;
  py::detail::make_caster<T> caster;
  if (!caster.load(value, true))
    check(false, "[", op_, "] expected ", name, " to be ", kind, " but got ", std::string(py::repr(value)));
  to = py::detail::cast_op<T>(caster);
  return true;
}

bool Arguments::read(const char* name, std::string& to) {
  return read_as(name, to, "a name");
}
void Arguments::attribute(const char* name, bool& to) {
  int64_t value = to;  // ONNX has no bool: 0 or 1
  if (read_as(name, value, "true or false")) to = value != 0;
}
void Arguments::attribute(const char* name, int64_t& to) {
  read_as(name, to, "an integer");
}
void Arguments::attribute(const char* name, double& to) {
  read_as(name, to, "a number");
}
void Arguments::attribute(const char* name, uintptr_t& to, const char* kind) {
  read_as(name, to, kind);
}

void Arguments::finish() const {
  const Py_ssize_t given = PyTuple_GET_SIZE(positional_);
  if (position_ < given)
    throw py::type_error("[" + std::string(op_) + "] expected at most " + std::to_string(position_) +
                         " arguments by position but got " + std::to_string(given));
  if (found_ == (named_ ? PyDict_GET_SIZE(named_) : 0)) return;
  for (const auto& [key, value] : py::reinterpret_borrow<py::dict>(named_)) {
    const auto name = key.cast<std::string>();
    bool known = false;
    size_t index = 0;
    for (const std::string& input : signature_.inputs)
      known = known || (input == name && static_cast<Py_ssize_t>(index) >= given), ++index;
    for (const auto* names : {&signature_.arrays, &signature_.attributes})
      for (const std::string& other : *names) known = known || other == name;
    if (!known) throw py::type_error("[" + std::string(op_) + "] got an unexpected argument '" + name + "'");
  }
}

}  // namespace pyengine::bindings
