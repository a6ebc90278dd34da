#include "bindings/op_binding.h"

namespace pyengine::bindings {

std::vector<Definition>& definitions() {
  static std::vector<Definition> all;
  return all;
}

namespace {

std::string docstring(const char* name, const Signature& signature, const char* doc) {
  std::string text = name;
  text += "(";
  for (const std::string& input : signature.inputs) text += input + ", ";
  text += "*";
  for (const auto* names : {&signature.arrays, &signature.attributes})
    for (const std::string& other : *names) text += ", " + other;
  return text + ")\n\n" + doc;
}

}  // namespace

void add(py::module_& m, const char* name, const Signature& signature, const char* doc, Function function) {
  // Lives as long as the module does, which is never unloaded.
  auto* text = new std::string(docstring(name, signature, doc));
  auto* method = new PyMethodDef{name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)),
                                 METH_VARARGS | METH_KEYWORDS, text->c_str()};
  m.attr(name) = py::reinterpret_steal<py::object>(
      PyCFunction_NewEx(method, py::str(name).release().ptr(), m.attr("__name__").ptr()));
  if (!py::hasattr(m, "SIGNATURES")) m.attr("SIGNATURES") = py::dict();
  const py::dict signatures = m.attr("SIGNATURES");
  signatures[name] = py::dict(py::arg("inputs") = py::tuple(py::cast(signature.inputs)),
                              py::arg("arrays") = py::tuple(py::cast(signature.arrays)),
                              py::arg("attributes") = py::tuple(py::cast(signature.attributes)));
}

}  // namespace pyengine::bindings
