// pyengine._cuda: the ops on arrays of an NVIDIA device. A module of its own, so that _C never needs CUDA.
#include "bindings/op_binding.h"
#include "core/cuda/device_info.h"

#ifndef PYENGINE_CUDA_MODULE
#define PYENGINE_CUDA_MODULE _cuda
#endif

namespace pyengine::bindings {

PYBIND11_MODULE(PYENGINE_CUDA_MODULE, m) {
  m.doc() =
      "Compiled ops on an NVIDIA device. Arrays are objects with pointer, shape and dtype; outputs are "
      "written in place, in the order of `stream` (a cudaStream_t as int). ValueError says what was "
      "expected, "
      "RuntimeError what is wrong with the device. SIGNATURES says what each op takes: its inputs, also by "
      "position, then other arrays and attributes by name.";
  for (const Definition define : definitions()) define(m);
  m.def("device_count", &cuda::device_count, "Devices that a driver offers; 0 without a driver.");
  m.def("check_device", &cuda::check_device,
        "RuntimeError with what is missing, if there is no device to run on.");
  m.def(
      "has_warpgroups", [] { return cuda::device_info().warpgroups; },
      "Whether the current device has the warpgroups of compute capability 9.0, and this build code for "
      "them.");
}

}  // namespace pyengine::bindings
