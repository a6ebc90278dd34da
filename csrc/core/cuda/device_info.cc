#include "core/cuda/device_info.h"

#include <cuda_runtime_api.h>

#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/cuda/launch.h"

namespace pyengine::cuda {

int device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  cudaGetLastError();  // forget it: the next call asks again
  return 0;
}

void check_device() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess && count > 0) return;
  cudaGetLastError();
  throw std::runtime_error(
      std::string("[cuda] expected an NVIDIA device with its driver but got: ") +
      (error == cudaSuccess ? "no CUDA-capable device is detected" : cudaGetErrorString(error)) +
      "; install the driver (nvidia-smi shows it) or use a CPU backend");
}

void check_call(int error, const char* what) {
  if (error == cudaSuccess) return;
  check_device();  // says it better where the driver is what is missing
  cudaGetLastError();
  throw std::runtime_error(std::string("[cuda] ") + what +
                           " failed: " + cudaGetErrorString(static_cast<cudaError_t>(error)));
}

void launch_kernel(const void* kernel, const Grid& grid, int threads, int64_t shared_bytes, void* stream,
                   void** arguments) {
  constexpr int64_t kAlwaysAllowed = 48 << 10;
  // All that the device has, not what this launch needs: the limit belongs to the kernel, and another thread
  // may be between setting it and launching. Kernels here have no static shared memory, which would count
  // too.
  if (shared_bytes > kAlwaysAllowed)
    check_call(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(device_info().block_bytes)),
               "reserving shared memory");
  check_call(cudaLaunchKernel(kernel, dim3(grid.x, grid.y, grid.z), dim3(threads), arguments,
                              static_cast<size_t>(shared_bytes), static_cast<cudaStream_t>(stream)),
             "launching a kernel");
}

const DeviceInfo& device_info() {
  static std::mutex mutex;
  static std::vector<DeviceInfo> known(64, DeviceInfo{});
  int device = 0;
  check_call(cudaGetDevice(&device), "asking for the current device");
  if (device >= static_cast<int>(known.size()))
    throw std::runtime_error("[cuda] expected at most 64 devices");
  std::lock_guard<std::mutex> lock(mutex);
  DeviceInfo& info = known[device];
  if (info.processors) return info;
  const auto attribute = [&](cudaDeviceAttr which) {
    int value = 0;
    check_call(cudaDeviceGetAttribute(&value, which, device), "asking for an attribute of the device");
    return value;
  };
  info.block_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  info.processor_bytes = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
#ifdef PYENGINE_HAVE_SM90A
  info.warpgroups =
      attribute(cudaDevAttrComputeCapabilityMajor) == 9 && attribute(cudaDevAttrComputeCapabilityMinor) == 0;
#endif
  info.processors = attribute(cudaDevAttrMultiProcessorCount);
  return info;
}

}  // namespace pyengine::cuda
