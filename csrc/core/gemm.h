// C = A B for the small matrices of attention, from packed words (see simd.h).
//   A [rows, k] words, row major    B [k, columns] words, row major, columns = vectors * kWidth    C floats
// A pair word of B holds rows 2k and 2k + 1 of the matrix that it stands for. A and C have room for kTileRows
// rows: rows too many are computed and mean nothing. Where kDepthMultiple is more than 1, k is rounded up to
// it, so A and B are finite and one of them zero up to there.
#pragma once

#include "core/simd.h"

namespace pyengine::PYENGINE_ISA {

namespace {

#if defined(__AVX512F__)
constexpr int kBlockRows = 8, kBlockVectors = 3;  // 24 accumulators of 32 registers
#else
constexpr int kBlockRows = 4, kBlockVectors = 2;  // 8 of 16
#endif

// Every sum is one chain of products in the order of k, whatever the block: a row of C is the same to the bit
// in any matrix that it is part of.
template <bool pairs, int rows, int vectors>
PYENGINE_INLINE void sum_block(const float* a, int64_t lda, const float* b, int64_t ldb, int k,
                               Vec (&acc)[rows][vectors]) {
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
}

template <bool pairs, int rows, int vectors>
PYENGINE_INLINE void gemm_block(const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
                                int64_t ldc, int k) {
  Vec acc[rows][vectors];
  sum_block<pairs>(a, lda, b, ldb, k, acc);
  for (int m = 0; m < rows; ++m)
    for (int n = 0; n < vectors; ++n) store(c + m * ldc + n * kWidth, acc[m][n]);
}

template <bool pairs, int rows>
void gemm_rows(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int vectors,
               int k) {
  int n = 0;
  for (; n + kBlockVectors <= vectors; n += kBlockVectors)
    gemm_block<pairs, rows, kBlockVectors>(a, lda, b + n * kWidth, ldb, c + n * kWidth, ldc, k);
  if (kBlockVectors == 3 && vectors - n == 2)
    gemm_block<pairs, rows, 2>(a, lda, b + n * kWidth, ldb, c + n * kWidth, ldc, k);
  else if (vectors - n == 1)
    gemm_block<pairs, rows, 1>(a, lda, b + n * kWidth, ldb, c + n * kWidth, ldc, k);
}

#if defined(__AMX_BF16__)
constexpr int kTileRows = 16;
template <class T>
constexpr int kDepthMultiple = kPairs<T> ? 16 : 1;

// All eight tile registers as 16 rows of 64 bytes, for as long as this lives; one per thread and range of
// items.
struct Tiles {
  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    asm volatile("" ::"r"(&config) : "memory");
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
};

// `n` blocks of 16 columns: sums in tiles 0 to n - 1, A in 5, B in 6 and 7 by turns.
template <int n>
PYENGINE_INLINE void gemm_tiles(const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
                                int64_t ldc, int k) {
  _tile_zero(0);
  if constexpr (n > 1) _tile_zero(1);
  if constexpr (n > 2) _tile_zero(2);
  if constexpr (n > 3) _tile_zero(3);
  if constexpr (n > 4) _tile_zero(4);
  const int64_t b_bytes = ldb * 4, c_bytes = ldc * 4;
  for (int i = 0; i < k; i += 16, a += 16, b += 16 * ldb) {
    _tile_loadd(5, a, lda * 4);
    _tile_loadd(6, b, b_bytes);
    _tile_dpbf16ps(0, 5, 6);
    if constexpr (n > 1) {
      _tile_loadd(7, b + 16, b_bytes);
      _tile_dpbf16ps(1, 5, 7);
    }
    if constexpr (n > 2) {
      _tile_loadd(6, b + 32, b_bytes);
      _tile_dpbf16ps(2, 5, 6);
    }
    if constexpr (n > 3) {
      _tile_loadd(7, b + 48, b_bytes);
      _tile_dpbf16ps(3, 5, 7);
    }
    if constexpr (n > 4) {
      _tile_loadd(6, b + 64, b_bytes);
      _tile_dpbf16ps(4, 5, 6);
    }
  }
  _tile_stored(0, c, c_bytes);
  if constexpr (n > 1) _tile_stored(1, c + 16, c_bytes);
  if constexpr (n > 2) _tile_stored(2, c + 32, c_bytes);
  if constexpr (n > 3) _tile_stored(3, c + 48, c_bytes);
  if constexpr (n > 4) _tile_stored(4, c + 64, c_bytes);
}

inline void gemm_pairs(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc,
                       int vectors, int k) {
  asm volatile("" ::: "memory");  // the intrinsics do not say that they read memory
  for (; vectors > 5; vectors -= 3, b += 48, c += 48) gemm_tiles<3>(a, lda, b, ldb, c, ldc, k);
  switch (vectors) {
    case 5:
      gemm_tiles<5>(a, lda, b, ldb, c, ldc, k);
      break;
    case 4:
      gemm_tiles<4>(a, lda, b, ldb, c, ldc, k);
      break;
    case 3:
      gemm_tiles<3>(a, lda, b, ldb, c, ldc, k);
      break;
    case 2:
      gemm_tiles<2>(a, lda, b, ldb, c, ldc, k);
      break;
    case 1:
      gemm_tiles<1>(a, lda, b, ldb, c, ldc, k);
      break;
  }
  asm volatile("" ::: "memory");
}

#else
constexpr int kTileRows = kBlockRows;
template <class T>
constexpr int kDepthMultiple = 1;
struct Tiles {
  Tiles() {}  // not trivial, so that an unused one is no warning
};
#endif

// rows <= kTileRows.
template <bool pairs>
PYENGINE_INLINE void gemm(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc,
                          int rows, int vectors, int k) {
#if defined(__AMX_BF16__)
  if constexpr (pairs) return gemm_pairs(a, lda, b, ldb, c, ldc, vectors, k);
#endif
  for (; rows > 4; rows -= kBlockRows, a += kBlockRows * lda, c += kBlockRows * ldc)
    gemm_rows<pairs, kBlockRows>(a, lda, b, ldb, c, ldc, vectors, k);
  if (rows > 2)
    gemm_rows<pairs, 4>(a, lda, b, ldb, c, ldc, vectors, k);
  else if (rows > 0)
    gemm_rows<pairs, 2>(a, lda, b, ldb, c, ldc, vectors, k);
}

}  // namespace

}  // namespace pyengine::PYENGINE_ISA
