// The conversions of core/cuda/numbers.h in software: round to nearest, ties to even; 8-bit values saturate.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace pyengine::cuda {

inline uint32_t float_bits(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}
inline float bits_float(uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}

// A float with `exponent_bits` and `mantissa_bits`, without infinities if `finite`.
inline float decode(uint32_t bits, int exponent_bits, int mantissa_bits, bool finite) {
  const uint32_t mantissa = bits & ((1u << mantissa_bits) - 1);
  const int exponent = static_cast<int>(bits >> mantissa_bits) & ((1 << exponent_bits) - 1);
  const float sign = bits >> (exponent_bits + mantissa_bits) & 1 ? -1.0f : 1.0f;
  const int bias = (1 << (exponent_bits - 1)) - 1, top = (1 << exponent_bits) - 1;
  if (exponent == top && !finite) return mantissa ? NAN : sign * INFINITY;
  if (finite && exponent == top && mantissa == (1u << mantissa_bits) - 1) return NAN;
  if (exponent == 0) return sign * std::ldexp(static_cast<float>(mantissa), 1 - bias - mantissa_bits);
  return sign * std::ldexp(1.0f + std::ldexp(static_cast<float>(mantissa), -mantissa_bits), exponent - bias);
}
inline uint32_t encode(float x, int exponent_bits, int mantissa_bits, bool finite) {
  const uint32_t sign = std::signbit(x) ? 1u << (exponent_bits + mantissa_bits) : 0;
  const int bias = (1 << (exponent_bits - 1)) - 1, top = (1 << exponent_bits) - 1;
  const uint32_t infinity = static_cast<uint32_t>(top) << mantissa_bits;
  if (std::isnan(x)) return sign | infinity | ((1u << mantissa_bits) - 1);
  const float a = std::fabs(x);
  const uint32_t largest = finite ? infinity | ((1u << mantissa_bits) - 2) : infinity - 1;
  const uint32_t overflow = finite ? largest : infinity;
  if (std::isinf(a)) return sign | overflow;
  if (a == 0) return sign;
  int exponent;
  std::frexp(a, &exponent);  // a = m * 2^exponent, m in [0.5, 1)
  exponent = std::max(exponent - 1, 1 - bias);
  const float steps = std::nearbyint(std::ldexp(a, mantissa_bits - exponent));
  const uint32_t code = static_cast<uint32_t>(steps) + (static_cast<uint32_t>(exponent + bias - 1) << mantissa_bits);
  return sign | (code > largest ? overflow : code);
}

inline float to_float(float x) { return x; }
inline float to_float(bfloat16 x) { return bits_float(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(float16 x) {
  static const std::vector<float> all = [] {
    std::vector<float> values(1 << 16);
    for (uint32_t bits = 0; bits < values.size(); ++bits) values[bits] = decode(bits, 5, 10, false);
    return values;
  }();
  return all[x.bits];
}
inline float to_float(float8_e4m3 x) { return decode(x.bits, 4, 3, true); }

template <class T>
inline T from_float(float x) {
  T y;
  if constexpr (sizeof(T) == 4) {
    y = x;
  } else if constexpr (sizeof(T) == 1) {
    y.bits = static_cast<uint8_t>(encode(x, 4, 3, true));
  } else if constexpr (kIsBfloat16<T>) {
    const uint32_t u = float_bits(x);
    y.bits = std::isnan(x) ? 0x7fff : static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16);
  } else {
    y.bits = static_cast<uint16_t>(encode(x, 5, 10, false));
  }
  return y;
}

template <class T>
inline uint32_t pack(float low, float high) {
  return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}
template <class T>
inline Pair unpack(uint32_t word) {
  T low, high;
  low.bits = static_cast<uint16_t>(word), high.bits = static_cast<uint16_t>(word >> 16);
  return {to_float(low), to_float(high)};
}

}  // namespace pyengine::cuda
