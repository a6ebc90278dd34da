// C = A B for the small matrices of attention, from packed words (see simd.h).
//   A [rows, k] words, row major        B [k, columns] words, row major, columns a multiple of kWidth        C floats
// A pair word of B holds rows 2k and 2k + 1 of the matrix that it stands for.
#pragma once

#include "core/simd.h"

namespace pyengine::PYENGINE_ISA {

#if defined(__AVX512F__)
constexpr int kTileRows = 8, kTileVectors = 3;  // 24 accumulators of 32 registers
#else
constexpr int kTileRows = 4, kTileVectors = 2;  // 8 of 16
#endif

template <bool pairs, int rows, int vectors>
PYENGINE_INLINE void gemm_tile(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int k) {
  Vec acc[rows][vectors];
  for (int m = 0; m < rows; ++m)
    for (int n = 0; n < vectors; ++n) acc[m][n] = set(0);
  for (int i = 0; i < k; ++i, ++a, b += ldb) {
    Vec column[vectors];
    for (int n = 0; n < vectors; ++n) column[n] = load(b + n * kWidth);
    for (int m = 0; m < rows; ++m) {
      const Vec row = set(a[m * lda]);
      for (int n = 0; n < vectors; ++n) acc[m][n] = multiply_add<pairs>(acc[m][n], row, column[n]);
    }
  }
  for (int m = 0; m < rows; ++m)
    for (int n = 0; n < vectors; ++n) store(c + m * ldc + n * kWidth, acc[m][n]);
}

// One block of at most kTileRows rows; up to 3 rows too many are computed, so A and C have kTileRows rows.
template <bool pairs, int rows>
inline void gemm_rows(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int vectors,
                      int k) {
  int n = 0;
  for (; n + kTileVectors <= vectors; n += kTileVectors)
    gemm_tile<pairs, rows, kTileVectors>(a, lda, b + n * kWidth, ldb, c + n * kWidth, ldc, k);
  if (kTileVectors == 3 && vectors - n == 2) {
    gemm_tile<pairs, rows, 2>(a, lda, b + n * kWidth, ldb, c + n * kWidth, ldc, k);
  } else if (vectors - n == 1) {
    gemm_tile<pairs, rows, 1>(a, lda, b + n * kWidth, ldb, c + n * kWidth, ldc, k);
  }
}

template <bool pairs>
inline void gemm(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int rows,
                 int vectors, int k) {
  if (kTileRows == 4 || rows <= 4)
    gemm_rows<pairs, 4>(a, lda, b, ldb, c, ldc, vectors, k);
  else
    gemm_rows<pairs, kTileRows>(a, lda, b, ldb, c, ldc, vectors, k);
}

}  // namespace pyengine::PYENGINE_ISA
