// The device at hand. Ordinary C++: no CUDA header needed.
#pragma once

#include <cstdint>

namespace pyengine::cuda {

// What heuristics need to know of a device.
struct DeviceInfo {
  int processors;           // multiprocessors
  int64_t block_bytes;      // shared memory that one block may have
  int64_t processor_bytes;  // shared memory of a multiprocessor
  bool warpgroups = false;  // it has those of compute capability 9.0, and this build code for them (sm_90a)
};

int device_count();   // 0 without a driver
void check_device();  // throws std::runtime_error, saying what is missing, if there is none to run on

const DeviceInfo& device_info();  // of the current device; asked once per device

}  // namespace pyengine::cuda
