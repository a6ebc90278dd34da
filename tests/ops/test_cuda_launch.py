"""Launching kernels, with a CUDA runtime that only keeps books."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
RUNTIME = """
#pragma once
#include <cstddef>
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin, cudaDevAttrMaxSharedMemoryPerMultiprocessor,
                      cudaDevAttrMultiProcessorCount, cudaDevAttrComputeCapabilityMajor,
                      cudaDevAttrComputeCapabilityMinor };
struct dim3 { unsigned x, y, z; dim3(unsigned a, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {} };
using cudaStream_t = void*;
extern "C" {
cudaError_t cudaGetDeviceCount(int*);
cudaError_t cudaGetDevice(int*);
cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t);
cudaError_t cudaDeviceGetAttribute(int*, cudaDeviceAttr, int);
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int);
cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t);
}
"""
# While one thread is between the limit and the launch, another launches the same kernel with less shared memory.
PROGRAM = """
#include <cstdio>
#include <cuda_runtime_api.h>
#include "core/cuda/launch.h"
static size_t limit = 48 << 10;
static int launched = 0, depth = 0;
static char kernel;
extern "C" {
cudaError_t cudaGetDeviceCount(int* n) { return *n = 1, cudaSuccess; }
cudaError_t cudaGetDevice(int* n) { return *n = 0, cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "invalid argument"; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = 99 << 10, cudaSuccess; }
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int bytes) {
  if (bytes > 99 << 10) return cudaErrorInvalidValue;
  limit = bytes;
  if (depth++ == 0) pyengine::cuda::launch_kernel(&kernel, {1}, 128, 60 << 10, nullptr, nullptr);
  return cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t bytes, cudaStream_t) {
  return bytes > limit ? cudaErrorInvalidValue : (++launched, cudaSuccess);
}
}
int main() {
  pyengine::cuda::launch_kernel(&kernel, {1}, 128, 90 << 10, nullptr, nullptr);
  std::printf("%d", launched);
}
"""


def test_threads_do_not_lower_each_others_shared_memory(tmp_path: Path) -> None:
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    (tmp_path / "cuda_runtime_api.h").write_text(RUNTIME)
    (tmp_path / "main.cc").write_text(PROGRAM)
    command = [compiler, "-std=c++17", f"-I{tmp_path}", f"-I{CSRC}", str(tmp_path / "main.cc"),
               str(CSRC / "core/cuda/device_info.cc"), "-o", str(tmp_path / "launches")]  # fmt: skip
    subprocess.run(command, check=True)
    assert subprocess.run([tmp_path / "launches"], check=True, capture_output=True, text=True).stdout == "2"
