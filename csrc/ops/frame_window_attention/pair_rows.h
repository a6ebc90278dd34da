// Rows of bfloat16 that stay pairs, where the CPU multiplies pairs (see simd.h). A word holds two
// neighbouring lanes, which is what interleaved rotary embedding turns: they are split into two floats,
// turned, rounded and joined again, half the work of rows of floats. Only rows.h includes this.
#pragma once

#include <cstdint>

#include "core/simd.h"

namespace pyengine::ops::PYENGINE_ISA {

namespace {

using namespace pyengine::PYENGINE_ISA;

constexpr int kBlock = 2 * kWidth;  // lanes of one vector of pairs

#ifdef __AVX512BF16__

PYENGINE_INLINE __mmask32 first_lanes(int64_t n) {
  return static_cast<__mmask32>((uint64_t{1} << n) - 1);
}
// Lanes [0, n) of a block, n <= kBlock; zeros after them.
PYENGINE_INLINE __m512i load_pairs(const bfloat16* x, int64_t n) {
  return n >= kBlock ? _mm512_loadu_si512(x) : _mm512_maskz_loadu_epi16(first_lanes(n), x);
}
PYENGINE_INLINE void store_pairs(bfloat16* y, __m512i pairs, int64_t n) {
  if (n >= kBlock)
    _mm512_storeu_si512(y, pairs);
  else
    _mm512_mask_storeu_epi16(y, first_lanes(n), pairs);
}
PYENGINE_INLINE Vec even_lanes(__m512i pairs) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
}
PYENGINE_INLINE Vec odd_lanes(__m512i pairs) {
  return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
}
// A whole block may keep even lanes before odd ones: sums of products do not mind, if both sides do so.
template <bool whole>
PYENGINE_INLINE __m512i join_lanes(Vec even, Vec odd) {
  const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
  if constexpr (whole) return halves;
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7,
                                         22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, halves);
}

// Keeps a vector that is used twice in its register: the compiler would read it from memory again.
PYENGINE_INLINE Vec keep(Vec v) {
  asm("" : "+v"(v));
  return v;
}

// The gains of rows, [2, pair_stride] (even lanes, odd lanes), in registers where head_dim is known.
template <int dim>
struct PairGain {
  static constexpr int kBlocks = (dim + kBlock - 1) / kBlock;
  const float* from;
  int64_t pair_stride;
  Vec held[dim ? 2 * kBlocks : 1];

  PYENGINE_INLINE PairGain(const float* gain, int64_t stride) : from(gain), pair_stride(stride) {
    for (int i = 0; gain && i < kBlocks; ++i) {
      held[2 * i] = load(gain + i * kWidth);
      held[2 * i + 1] = load(gain + stride + i * kWidth);
    }
  }
  PYENGINE_INLINE Vec even(int64_t lane) const { return dim ? held[lane / kWidth] : load(from + lane / 2); }
  PYENGINE_INLINE Vec odd(int64_t lane) const {
    return dim ? held[lane / kWidth + 1] : load(from + pair_stride + lane / 2);
  }
};

// One query or key, all of whose choices are known to the compiler. rotary [2, pair_stride] (cosines, sines).
template <int dim, bool gained, bool rotated>
PYENGINE_INLINE void turn_pairs(const bfloat16* x, int64_t head_dim, const PairGain<dim>& gain,
                                const float* rotary, Vec factor, float* y) {
  const int64_t lanes = dim ? dim : head_dim;
  for (int64_t i = 0; i < lanes; i += kBlock) {
    const __m512i pairs = load_pairs(x + i, lanes - i);
    Vec even = even_lanes(pairs) * factor, odd = odd_lanes(pairs) * factor;
    if constexpr (gained) {
      even = even * gain.even(i);
      odd = odd * gain.odd(i);
    }
    if constexpr (rotated) {
      const Vec cosine = keep(load(rotary + i / 2)), sine = keep(load(rotary + gain.pair_stride + i / 2));
      const Vec turned = even * cosine - odd * sine;
      odd = madd(even, sine, odd * cosine);
      even = turned;
    }
    const bool whole = lanes - i >= kBlock;
    _mm512_storeu_si512(y + i / 2, whole ? join_lanes<true>(even, odd) : join_lanes<false>(even, odd));
  }
}

// Squares of a row, still to be summed.
template <int dim>
PYENGINE_INLINE Vec squares(const bfloat16* x, int64_t head_dim) {
  const int64_t lanes = dim ? dim : head_dim;
  Vec sums = set(0);
  for (int64_t i = 0; i < lanes; i += kBlock) {
    const __m512i pairs = load_pairs(x + i, lanes - i);
    sums = _mm512_dpbf16_ps(sums, (__m512bh)pairs, (__m512bh)pairs);
  }
  return sums;
}

// Two rows of values as words of (even row, odd row). A whole block is zipped within 128-bit lanes, which
// leaves its columns in another order; store_columns puts them back. A tail of up to kWidth columns keeps its
// order.
template <int dim>
PYENGINE_INLINE void zip_values(const bfloat16* even, const bfloat16* odd, int64_t head_dim, float* y) {
  const int64_t lanes = dim ? dim : head_dim;
  int64_t i = 0;
  for (; i + kWidth < lanes; i += kBlock) {
    const __m512i a = load_pairs(even + i, lanes - i);
    const __m512i b = odd ? load_pairs(odd + i, lanes - i) : _mm512_setzero_si512();
    _mm512_storeu_si512(y + i, _mm512_unpacklo_epi16(a, b));
    _mm512_storeu_si512(y + i + kWidth, _mm512_unpackhi_epi16(a, b));
  }
  if (i >= lanes) return;
  const __mmask16 tail = static_cast<__mmask16>(first_lanes(lanes - i));
  const __m512i a = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(tail, even + i));
  const __m512i b =
      odd ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(tail, odd + i)) : _mm512_setzero_si512();
  _mm512_storeu_si512(y + i, _mm512_or_si512(a, _mm512_slli_epi32(b, 16)));
}

// Column `i` and those after it, as sums of products with such values (one vector, or two where a block
// begins), to lanes of a row.
template <int dim>
PYENGINE_INLINE void store_columns(Vec first, Vec second, int64_t i, int64_t head_dim, bfloat16* y) {
  const int64_t rest = (dim ? dim : head_dim) - i;
  if (rest > kWidth) {
    const __m512i order = _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0);
    const __m512i mixed = (__m512i)_mm512_cvtne2ps_pbh(second, first);
    store_pairs(y + i, _mm512_permutexvar_epi64(order, mixed), rest);
  } else if (rest == kWidth) {
    store(y + i, first);
  } else {
    store_part(y + i, first, static_cast<int>(rest));
  }
}

#else

// Declared for code that is discarded.
template <int dim>
struct PairGain {
  PairGain(const float*, int64_t);
};
template <int dim, bool gained, bool rotated>
void turn_pairs(const bfloat16*, int64_t, const PairGain<dim>&, const float*, Vec, float*);
template <int dim>
Vec squares(const bfloat16*, int64_t);
template <int dim>
void zip_values(const bfloat16*, const bfloat16*, int64_t, float*);
template <int dim>
void store_columns(Vec, Vec, int64_t, int64_t, bfloat16*);

#endif

}  // namespace

}  // namespace pyengine::ops::PYENGINE_ISA
