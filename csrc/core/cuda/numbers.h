// 16- and 8-bit floats in kernels: conversion to and from float32, in hardware where there is any.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/bfloat16.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#define PYENGINE_DEVICE __device__ __forceinline__
#define PYENGINE_BOTH __host__ __device__ __forceinline__
#else
#define PYENGINE_DEVICE inline
#define PYENGINE_BOTH inline
#endif

namespace pyengine {

struct float16 {
  uint16_t bits;
};
struct float8_e4m3 {  // 4 exponent bits, 3 of mantissa, no infinity; largest value 448
  uint8_t bits;
};

}  // namespace pyengine

namespace pyengine::cuda {

template <class T>
constexpr bool kIsBfloat16 = false;
template <>
inline constexpr bool kIsBfloat16<bfloat16> = true;

struct alignas(16) Words4 {
  uint32_t w[4];
};
struct alignas(8) Pair {
  float x, y;
};

#ifdef __CUDACC__

PYENGINE_DEVICE float to_float(float x) { return x; }
PYENGINE_DEVICE float to_float(bfloat16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
PYENGINE_DEVICE float to_float(float16 x) { return __half2float(__ushort_as_half(x.bits)); }
PYENGINE_DEVICE float to_float(float8_e4m3 x) {
  const __half_raw h = __nv_cvt_fp8_to_halfraw(x.bits, __NV_E4M3);
  return __half2float(__half(h));
}

template <class T>
PYENGINE_DEVICE T from_float(float x) {
  T y;
  if constexpr (sizeof(T) == 4)
    y = x;
  else if constexpr (sizeof(T) == 1)
    y.bits = __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3);
  else if constexpr (kIsBfloat16<T>)
    y.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
  else
    y.bits = __half_as_ushort(__float2half_rn(x));
  return y;
}

// Two values as one word, the first in the lower half.
template <class T>
PYENGINE_DEVICE uint32_t pack(float low, float high) {
  if constexpr (kIsBfloat16<T>) {
    const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&v);
  } else {
    const __half2 v = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&v);
  }
}
template <class T>
PYENGINE_DEVICE Pair unpack(uint32_t word) {
  if constexpr (kIsBfloat16<T>) {
    return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
  } else {
    const float2 v = __half22float2(*reinterpret_cast<const __half2*>(&word));
    return {v.x, v.y};
  }
}

#else
}  // namespace pyengine::cuda
#include "soft_numbers.h"  // of the emulator: the same functions in software
namespace pyengine::cuda {
#endif

// Eight 16-bit values from eight 8-bit ones at an 8-byte boundary, times a scale.
template <class T>
PYENGINE_DEVICE Words4 widen(const float8_e4m3* x, float scale) {
  const uint64_t bytes = *reinterpret_cast<const uint64_t*>(x);
  const auto value = [&](int i) { return to_float(float8_e4m3{static_cast<uint8_t>(bytes >> (8 * i))}) * scale; };
  Words4 y;
  for (int i = 0; i < 4; ++i) y.w[i] = pack<T>(value(2 * i), value(2 * i + 1));
  return y;
}

}  // namespace pyengine::cuda
