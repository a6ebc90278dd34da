// pyengine._C: the ops on numpy arrays, and the choice of instruction set and threads.
#include "bindings/op_binding.h"
#include "core/cpu_isa.h"
#include "core/parallel.h"

namespace pyengine::bindings {

namespace {

std::vector<std::string> names_of(const std::vector<CpuIsa>& isas) {
  std::vector<std::string> names;
  for (CpuIsa isa : isas) names.push_back(name(isa));
  return names;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() =
      "Compiled ops. Arrays are numpy, C-contiguous, float32 or bfloat16 as uint16 bit patterns; outputs are "
      "written in place; ValueError says what was expected. SIGNATURES says what each op takes: its inputs, "
      "also by position, then other arrays and attributes by name.";
  for (const Definition define : definitions()) define(m);
  m.def(
      "cpu_isa", [] { return std::string(name(cpu_isa())); },
      "The instruction set in use: the best this CPU has, or PYENGINE_CPU_ISA.");
  m.def(
      "supported_isas", [] { return names_of(supported_isas()); },
      "Instruction sets that this build contains and this CPU can run.");
  m.def(
      "left_out_isas", [] { return names_of(left_out_isas()); },
      "Better ones, which this CPU can run but this build does not contain.");
  m.def("set_cpu_isa", &set_cpu_isa, py::arg("name"),
        "For tests: use this instruction set from now on; 'auto' undoes it.");
  m.def("threads", &threads, "Threads that an op may use, the caller's included.");
  m.def("set_threads", &set_threads, py::arg("count"),
        "Use this many threads; 0 = as many as this process may run on.");
}

}  // namespace pyengine::bindings
