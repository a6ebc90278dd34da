// Launching kernels: `launch(kernel, grid, threads, shared_bytes, stream, arguments...)`, and errors as exceptions.
// The tests' emulator defines the same functions, so callers are ordinary C++.
#pragma once

#include <cstdint>

namespace pyengine::cuda {

struct Grid {
  unsigned x = 1, y = 1, z = 1;
};

// Throws std::runtime_error with what `error`, a cudaError_t, means.
void check_call(int error, const char* what);

void launch_kernel(const void* kernel, const Grid& grid, int threads, int64_t shared_bytes, void* stream,
                   void** arguments);

#ifdef PYENGINE_EMULATE_CUDA
}  // namespace pyengine::cuda
#include "emulator.h"
namespace pyengine::cuda {
template <class Params>
void launch(void (*kernel)(Params), const Grid& grid, int threads, int64_t shared_bytes, void*,
            const Params& params) {
  emulator::run([&] { kernel(params); }, {grid.x, grid.y, grid.z}, threads, shared_bytes);
}
#else
// A kernel takes one plain struct.
template <class Params>
void launch(void (*kernel)(Params), const Grid& grid, int threads, int64_t shared_bytes, void* stream,
            const Params& params) {
  void* arguments[] = {const_cast<Params*>(&params)};
  launch_kernel(reinterpret_cast<const void*>(kernel), grid, threads, shared_bytes, stream, arguments);
}
#endif

}  // namespace pyengine::cuda
