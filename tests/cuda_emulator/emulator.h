// Runs kernels on an ordinary processor, exactly as they are written for a GPU: every thread of a block is a
// fiber, barriers and warp-wide instructions are where fibers meet. What it checks besides the numbers:
//   - all lanes of a warp meet at the same instruction, and all threads at the same barrier, else it throws
//   - shared memory starts as NaN patterns and may not be read past the bytes that the launch asked for
//   - an asynchronous copy lands as late as it may, when its thread waits for it, or at once, as
//     PYENGINE_EMULATOR_COPIES says (late, early)
//   - a warpgroup's product may only read what was published: units that were copied or stored are marked
//   until
//     the thread that wrote them calls publish_shared
//   - fibers run in the order that PYENGINE_EMULATOR_ORDER says (forward, backward, shuffled, or alone: a
//   warp
//     runs on until it has to wait for another): a missing barrier shows as a wrong result in one of them
// Instructions follow the PTX manual's fragment layouts (mma.m16n8k16, m16n8k8, ldmatrix, wgmma.m64nNk16).
#pragma once

#include <cmath>
#include <cstdint>
#include <functional>

#include "core/cuda/numbers.h"

namespace pyengine::cuda::emulator {

struct Size {
  unsigned x, y, z;
};
void run(const std::function<void()>& thread, Size grid, int threads, int64_t shared_bytes);

enum class Instruction { sync_warp, shuffle, load_matrices, multiply, multiply_group, products };

using Row = uint32_t[10];
using Lanes = const Row*;

// Meets the other lanes: every lane gives up to 10 words and says which instruction it is at; returns the
// words of all 32. The lane that comes last runs `last` on them.
Lanes meet(Instruction instruction, int variant, const uint32_t* words, int count,
           void (*last)(Row*) = nullptr);

void multiply(float* c, const uint32_t* a, const uint32_t* b, int depth, void (*last)(Row*));
// A warpgroup's product, c += a b for this lane's rows; a in registers (words of `multiply16`), or in a
// panel.
void multiply_group(float (*c)[4], int columns, const uint32_t* a, uint64_t a_panel, uint64_t b_panel,
                    bool add, float (*value)(uint16_t));
void load_matrices(uint32_t* r, const void* row, int count, bool transposed);

}  // namespace pyengine::cuda::emulator

namespace pyengine::cuda {

int thread_index();
int block_x();
int block_y();
int block_z();
int grid_x();
char* shared_memory();
void sync_block();
inline void sync_warp() {
  emulator::meet(emulator::Instruction::sync_warp, 0, nullptr, 0);
}
float shuffle_xor(float x, int mask);
void copy_async(void* to, const void* from, bool valid);
void commit_copies();
void wait_copies(int pending);
template <int pending>
void wait_copies() {
  wait_copies(pending);
}

inline void load_matrices4(uint32_t* r, const void* row) {
  emulator::load_matrices(r, row, 4, false);
}
inline void load_matrices2(uint32_t* r, const void* row) {
  emulator::load_matrices(r, row, 2, false);
}
inline void load_matrices4_transposed(uint32_t* r, const void* row) {
  emulator::load_matrices(r, row, 4, true);
}
inline void load_matrices2_transposed(uint32_t* r, const void* row) {
  emulator::load_matrices(r, row, 2, true);
}

// Rows hold a in words 0-3, b in 4-5, c in 6-9; c += a b for the whole warp.
template <class T, int depth>
void multiply_all(emulator::Row* rows) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < depth / 4;
         ++i) {  // word i: rows g, g + 8 of columns 2t, 2t + 1, then of columns 2t + 8, ...
      const Pair v = unpack<T>(rows[lane][i]);
      float* to = &a[g + 8 * (i % 2)][2 * t + 8 * (i / 2)];
      to[0] = v.x, to[1] = v.y;
    }
    for (int i = 0; i < depth / 8; ++i) {  // word i: rows 2t, 2t + 1, then 2t + 8, 2t + 9 of column g
      const Pair v = unpack<T>(rows[lane][4 + i]);
      b[2 * t + 8 * i][g] = v.x, b[2 * t + 8 * i + 1][g] = v.y;
    }
  }
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
      double sum = bits_float(rows[lane][6 + i]);
      for (int k = 0; k < depth; ++k) sum += static_cast<double>(a[row][k]) * b[k][column];
      rows[lane][6 + i] = float_bits(static_cast<float>(sum));
    }
}
template <class T>
void multiply16(float* c, const uint32_t* a, const uint32_t* b) {
  emulator::multiply(c, a, b, 16, multiply_all<T, 16>);
}
template <class T>
void multiply8(float* c, const uint32_t* a, const uint32_t* b) {
  emulator::multiply(c, a, b, 8, multiply_all<T, 8>);
}

// Warpgroups: products happen when they are waited for, or at once, as PYENGINE_EMULATOR_COPIES says; shared
// memory is read at the addresses that descriptors and the swizzling of 128 bytes make.
void sync_group();
void publish_shared();
void store_unit(void* to, const Words4& unit);
void begin_products();
void commit_products();
void wait_products(int pending);
template <int pending>
void wait_products() {
  wait_products(pending);
}
uint32_t panel_address(const void* p);
template <class T>
float value_of(uint16_t bits) {
  T x;
  x.bits = bits;
  return to_float(x);
}
template <class T>
void multiply_panels(float (*c)[4], uint64_t a, uint64_t b, bool add) {
  emulator::multiply_group(c, 128, nullptr, a, b, add, value_of<T>);
}
template <class T>
void multiply_weights(float (*c)[4], const uint32_t* a, uint64_t b) {
  emulator::multiply_group(c, 64, a, 0, b, true, value_of<T>);
}

inline float exp2_fast(float x) {
  return std::exp2(x);
}
inline float inverse_root(float x) {
  return 1 / std::sqrt(x);
}
inline void sine_cosine_pi(float x, float* sine, float* cosine) {
  *sine = static_cast<float>(std::sin(3.14159265358979323846 * x));
  *cosine = static_cast<float>(std::cos(3.14159265358979323846 * x));
}

}  // namespace pyengine::cuda
