// How an op comes to Python: its bind.cc says what it takes and puts it into the list of its module.
//
//   void visit(bindings::Arguments& in, DenoiseStep& op) { in.input("sample", op.sample); ... }
//   PYENGINE_BIND(DenoiseStep, denoise_step, "What it does.")
//
// The file is compiled into _C, where denoise_step(op) runs, and where the op has a cuda.cu also into
// _cuda (with PYENGINE_BIND_CUDA), where cuda::denoise_step(op, stream) runs.
#pragma once

#include "bindings/arguments.h"

namespace pyengine::bindings {

using Definition = void (*)(py::module_&);

// Everything that the files of ops add to this module, in no particular order.
std::vector<Definition>& definitions();

struct Register {
  explicit Register(Definition definition) { definitions().push_back(definition); }
};

// What `name` takes, kept for good.
template <class Op>
const Signature& signature_of() {
  static const Signature* made = [] {
    auto* signature = new Signature;
    Op op;
    Arguments listing(*signature);
    visit(listing, op);
#ifdef PYENGINE_BIND_CUDA
    uintptr_t stream = 0;
    listing.attribute("stream", stream, "");
#endif
    return signature;
  }();
  return *made;
}

struct Nothing {};  // the result of a function that returns None
inline py::object to_python(Nothing) {
  return py::none();
}
inline py::object to_python(int64_t value) {
  return py::int_(value);
}

using Function = PyObject* (*)(PyObject* name, PyObject* positional, PyObject* named);
void add(py::module_& m, const char* name, const Signature& signature, const char* doc, Function function);

// Calls f, to a Python object; an exception becomes Python's. pybind11's own functions would copy arguments.
template <class F>
PyObject* guarded(const F& f) {
  try {
    return to_python(f()).release().ptr();
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const py::builtin_exception& error) {
    error.set_error();
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::bad_alloc& error) {
    PyErr_SetString(PyExc_MemoryError, error.what());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

// What Python calls. `run(op, stream)` runs without the GIL; on the CPU there is no stream.
template <class Op, auto run>
PyObject* call(PyObject* name, PyObject* positional, PyObject* named) {
  return guarded([&] {
    Op op;
    uintptr_t stream = 0;
    Arguments in(PyUnicode_AsUTF8(name), signature_of<Op>(), positional, named);
    visit(in, op);
#ifdef PYENGINE_BIND_CUDA
    in.attribute("stream", stream, "a cudaStream_t as an integer");
#endif
    in.finish();
    py::gil_scoped_release released;
    return run(op, reinterpret_cast<void*>(stream));
  });
}

// Adds the function `name` to the module, with its signature; `doc` has to be a literal.
template <class Op, auto run>
void define_op(py::module_& m, const char* name, const char* doc) {
  add(m, name, signature_of<Op>(), doc, call<Op, run>);
}

}  // namespace pyengine::bindings

// Runs an op, to None.
#ifdef PYENGINE_BIND_CUDA
#define PYENGINE_RUN(op, stream, function) cuda::function(op, stream)
#else
#define PYENGINE_RUN(op, stream, function) function(op)
#endif

#define PYENGINE_BIND(Op, function, doc)                                                 \
  static bindings::Nothing run_##function(const Op& op, [[maybe_unused]] void* stream) { \
    PYENGINE_RUN(op, stream, function);                                                  \
    return {};                                                                           \
  }                                                                                      \
  static const bindings::Register registered_##function(                                 \
      [](bindings::py::module_& m) { bindings::define_op<Op, run_##function>(m, #function, doc); });
