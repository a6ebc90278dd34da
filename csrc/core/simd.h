// Vectors of float32 as wide as the compiler's macros allow. Only kernels (cpu.cc) include this: everything
// lives in the ISA's own namespace, so that no two builds of one function can be confused by the linker.
//
// A "word" is 32 bits: a float, or a pair of neighbouring bfloat16 where the CPU multiplies those. Words
// travel in Vec.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

#include "core/bfloat16.h"

namespace pyengine::PYENGINE_ISA {

// GCC keeps a function that takes vectors out of line, and so in memory, unless told otherwise.
#define PYENGINE_INLINE [[gnu::always_inline]] inline

#if defined(__AVX512F__)
constexpr int kWidth = 16;
using Vec = __m512;
PYENGINE_INLINE Vec load(const float* x) {
  return _mm512_loadu_ps(x);
}
PYENGINE_INLINE void store(float* y, Vec v) {
  _mm512_storeu_ps(y, v);
}
PYENGINE_INLINE Vec set(float x) {
  return _mm512_set1_ps(x);
}
PYENGINE_INLINE Vec max(Vec a, Vec b) {
  return _mm512_max_ps(a, b);
}
PYENGINE_INLINE Vec madd(Vec a, Vec b, Vec c) {
  return _mm512_fmadd_ps(a, b, c);
}
PYENGINE_INLINE float sum(Vec v) {
  return _mm512_reduce_add_ps(v);
}
PYENGINE_INLINE float highest(Vec v) {
  return _mm512_reduce_max_ps(v);
}
PYENGINE_INLINE Vec square_root(Vec v) {
  return _mm512_sqrt_ps(v);
}
PYENGINE_INLINE Vec swap_neighbours(Vec v) {
  return _mm512_permute_ps(v, 0xb1);
}
PYENGINE_INLINE Vec zip_low(Vec a, Vec b) {
  return _mm512_permutex2var_ps(a, _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23),
                                b);
}
PYENGINE_INLINE Vec zip_high(Vec a, Vec b) {
  return _mm512_permutex2var_ps(
      a, _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31), b);
}
PYENGINE_INLINE Vec load(const bfloat16* x) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
PYENGINE_INLINE __m256i narrow(Vec v) {
#ifdef __AVX512BF16__
  return (__m256i)_mm512_cvtneps_pbh(v);
#else
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const __mmask16 is_nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, is_nan, quiet), 16));
#endif
}
PYENGINE_INLINE void store(bfloat16* y, Vec v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(y), narrow(v));
}
PYENGINE_INLINE Vec load_part(const float* x, int n) {
  return _mm512_maskz_loadu_ps((1u << n) - 1, x);
}
PYENGINE_INLINE void store_part(float* y, Vec v, int n) {
  _mm512_mask_storeu_ps(y, (1u << n) - 1, v);
}
PYENGINE_INLINE Vec load_part(const bfloat16* x, int n) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16((1u << n) - 1, x));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
PYENGINE_INLINE void store_part(bfloat16* y, Vec v, int n) {
  _mm256_mask_storeu_epi16(y, (1u << n) - 1, narrow(v));
}
// The sum, or the highest, of each of kReduceRows vectors, in the first lanes: a tree that halves the vectors
// instead of as many chains of shuffles.
constexpr int kReduceRows = 8;
template <class F>
PYENGINE_INLINE Vec reduce_rows(const Vec* rows, const F& f) {
  Vec half[4], quarter[2];
  for (int i = 0; i < 4; ++i)  // rows i and i + 4, 8 lanes each
    half[i] =
        f(_mm512_shuffle_f32x4(rows[i], rows[i + 4], 0x44), _mm512_shuffle_f32x4(rows[i], rows[i + 4], 0xee));
  for (int i = 0; i < 2; ++i)  // rows i, i + 2, i + 4, i + 6, 4 lanes each
    quarter[i] =
        f(_mm512_shuffle_f32x4(half[i], half[i + 2], 0x88), _mm512_shuffle_f32x4(half[i], half[i + 2], 0xdd));
  const Vec pairs = f(_mm512_unpacklo_ps(quarter[0], quarter[1]), _mm512_unpackhi_ps(quarter[0], quarter[1]));
  const Vec one = f(pairs, _mm512_permute_ps(pairs, 0x4e));
  const __m512i order = _mm512_setr_epi32(0, 1, 8, 9, 4, 5, 12, 13, 0, 0, 0, 0, 0, 0, 0, 0);
  return _mm512_permutexvar_ps(order, one);
}
using IntVec = __m512i;
PYENGINE_INLINE IntVec to_int(Vec v) {
  return _mm512_cvtps_epi32(v);
}
PYENGINE_INLINE Vec power_of_two(IntVec n) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(n, _mm512_set1_epi32(127)), 23));
}

#else

#if defined(__AVX2__)
constexpr int kWidth = 8;
using Vec = __m256;
PYENGINE_INLINE Vec max(Vec a, Vec b) {
  return _mm256_max_ps(a, b);
}
PYENGINE_INLINE Vec swap_neighbours(Vec v) {
  return _mm256_permute_ps(v, 0xb1);
}
PYENGINE_INLINE Vec zip_low(Vec a, Vec b) {
  return _mm256_permute2f128_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b), 0x20);
}
PYENGINE_INLINE Vec zip_high(Vec a, Vec b) {
  return _mm256_permute2f128_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b), 0x31);
}
#elif defined(__SSE2__)
constexpr int kWidth = 4;
using Vec = __m128;
PYENGINE_INLINE Vec max(Vec a, Vec b) {
  return _mm_max_ps(a, b);
}
PYENGINE_INLINE Vec swap_neighbours(Vec v) {
  return _mm_shuffle_ps(v, v, 0xb1);
}
PYENGINE_INLINE Vec zip_low(Vec a, Vec b) {
  return _mm_unpacklo_ps(a, b);
}
PYENGINE_INLINE Vec zip_high(Vec a, Vec b) {
  return _mm_unpackhi_ps(a, b);
}
#else
constexpr int kWidth = 4;
using Vec = float __attribute__((vector_size(16)));
PYENGINE_INLINE Vec max(Vec a, Vec b) {
  return a > b ? a : b;
}
PYENGINE_INLINE Vec swap_neighbours(Vec v) {
  return Vec{v[1], v[0], v[3], v[2]};
}
PYENGINE_INLINE Vec zip_low(Vec a, Vec b) {
  return Vec{a[0], b[0], a[1], b[1]};
}
PYENGINE_INLINE Vec zip_high(Vec a, Vec b) {
  return Vec{a[2], b[2], a[3], b[3]};
}
#endif

using IntVec = int32_t __attribute__((vector_size(4 * kWidth)));
using WordVec = uint32_t __attribute__((vector_size(4 * kWidth)));
using HalfVec = uint16_t __attribute__((vector_size(2 * kWidth)));

PYENGINE_INLINE Vec load(const float* x) {
  Vec v;
  std::memcpy(&v, x, sizeof v);
  return v;
}
PYENGINE_INLINE void store(float* y, Vec v) {
  std::memcpy(y, &v, sizeof v);
}
PYENGINE_INLINE Vec set(float x) {
  return x - Vec{};
}
PYENGINE_INLINE Vec madd(Vec a, Vec b, Vec c) {
  return a * b + c;
}
PYENGINE_INLINE float sum(Vec v) {
  float s = 0;
  for (int i = 0; i < kWidth; ++i) s += v[i];
  return s;
}
PYENGINE_INLINE float highest(Vec v) {
  float m = v[0];
  for (int i = 1; i < kWidth; ++i) m = v[i] > m ? v[i] : m;
  return m;
}
PYENGINE_INLINE Vec load(const bfloat16* x) {
  HalfVec h;
  std::memcpy(&h, x, sizeof h);
  return (Vec)(__builtin_convertvector(h, WordVec) << 16);
}
PYENGINE_INLINE void store(bfloat16* y, Vec v) {
  const WordVec bits = (WordVec)v;
  const WordVec rounded = bits + (((bits >> 16) & 1) + 0x7fff);
  const WordVec is_nan = (WordVec)(v != v);
  const HalfVec h =
      __builtin_convertvector(((rounded & ~is_nan) | ((bits | 0x400000) & is_nan)) >> 16, HalfVec);
  std::memcpy(y, &h, sizeof h);
}
template <class T>
PYENGINE_INLINE Vec load_part(const T* x, int n) {
  T whole[kWidth] = {};
  for (int i = 0; i < n; ++i) whole[i] = x[i];
  return load(whole);
}
template <class T>
PYENGINE_INLINE void store_part(T* y, Vec v, int n) {
  T whole[kWidth];
  store(whole, v);
  for (int i = 0; i < n; ++i) y[i] = whole[i];
}
PYENGINE_INLINE Vec square_root(Vec v) {
  for (int i = 0; i < kWidth; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
}
constexpr int kReduceRows = kWidth;
template <class F>
PYENGINE_INLINE Vec reduce_rows(const Vec* rows, const F& f) {
  Vec result;
  for (int i = 0; i < kReduceRows; ++i) {
    float value = rows[i][0];
    for (int j = 1; j < kWidth; ++j) value = f(value, rows[i][j]);
    result[i] = value;
  }
  return result;
}
PYENGINE_INLINE IntVec to_int(Vec v) {
  return __builtin_convertvector(v, IntVec);
}
PYENGINE_INLINE Vec power_of_two(IntVec n) {
  return (Vec)((n + 127) << 23);
}
#endif

PYENGINE_INLINE float max(float a, float b) {
  return a > b ? a : b;
}
// What is in the lanes of each of `n` vectors (1 or kReduceRows), together, in the first lanes.
template <int n>
PYENGINE_INLINE Vec sum_rows(const Vec* rows) {
  if constexpr (n == 1) return set(sum(rows[0]));
  return reduce_rows(rows, [](auto a, auto b) { return a + b; });
}
template <int n>
PYENGINE_INLINE Vec highest_rows(const Vec* rows) {
  if constexpr (n == 1) return set(highest(rows[0]));
  return reduce_rows(rows, [](auto a, auto b) { return max(a, b); });
}

// 2^x for x <= 0, exactly zero for -inf; relative error 3e-9 plus rounding, or 4e-6 where bfloat16 follows.
template <bool coarse>
PYENGINE_INLINE Vec exp2(Vec x) {
  x = max(x, set(-127));
  const Vec magic = set(12582912);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec n = (x + magic) - magic;
  x = x - n;
  Vec p;
  if constexpr (coarse) {
    p = madd(x, set(0.00967603710f), set(0.0559220356f));
    p = madd(x, p, set(0.240221074f));
    p = madd(x, p, set(0.693121034f));
    p = madd(x, p, set(1.00000008f));
  } else {
    p = madd(x, set(0.000154697320f), set(0.00134004322f));
    p = madd(x, p, set(0.00961802560f));
    p = madd(x, p, set(0.0555032721f));
    p = madd(x, p, set(0.240226512f));
    p = madd(x, p, set(0.693147207f));
    p = madd(x, p, set(1));
  }
  // The exponent field of 2^-127 is zero, so everything at or below that becomes exactly zero. vscalefps
  // would do the same through a microcode assist, which made masked scores 20 times as slow as visible ones.
  return p * power_of_two(to_int(n));
}

// kWidth rows of kWidth words, `stride` words apart, to their transpose.
PYENGINE_INLINE void transpose_block(const float* x, int64_t stride, float* y, int64_t y_stride) {
  Vec rows[kWidth], zipped[kWidth];
  for (int i = 0; i < kWidth; ++i) rows[i] = load(x + i * stride);
  // Zipping the two halves rotates the bits of (row, column) by one; after log2(kWidth) times they have
  // swapped.
#pragma GCC unroll 4
  for (int round = 1; round < kWidth; round *= 2) {
    for (int i = 0; i < kWidth / 2; ++i) {
      zipped[2 * i] = zip_low(rows[i], rows[i + kWidth / 2]);
      zipped[2 * i + 1] = zip_high(rows[i], rows[i + kWidth / 2]);
    }
    for (int i = 0; i < kWidth; ++i) rows[i] = zipped[i];
  }
  for (int i = 0; i < kWidth; ++i) store(y + i * y_stride, rows[i]);
}

// What kernels multiply in: bfloat16 data as pairs where the CPU has such products, everything else as float.
#ifdef __AVX512BF16__
template <class T>
constexpr bool kPairs = sizeof(T) == 2;
#else
template <class T>
constexpr bool kPairs = false;
#endif

// acc + word a * word b: one product, or the two of a pair.
template <bool pairs>
PYENGINE_INLINE Vec multiply_add(Vec acc, Vec a, Vec b) {
#ifdef __AVX512BF16__
  if constexpr (pairs) return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b);
#endif
  return madd(a, b, acc);
}

#ifdef __AVX512BF16__
// Words of (even, odd) from two vectors that were loaded from bfloat16.
PYENGINE_INLINE Vec zip_pairs(Vec even, Vec odd) {
  const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(even), 16);
  return _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_castps_si512(odd)));
}
#else
PYENGINE_INLINE Vec zip_pairs(Vec even, Vec) {
  return even;
}  // never called: kPairs is false
#endif

// kWidth floats as words: themselves, or kWidth / 2 pairs.
template <bool pairs>
PYENGINE_INLINE void store_words(float* y, Vec v) {
  if constexpr (pairs)
    store(reinterpret_cast<bfloat16*>(y), v);
  else
    store(y, v);
}

}  // namespace pyengine::PYENGINE_ISA
