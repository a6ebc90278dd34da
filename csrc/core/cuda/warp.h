// The words kernels are written in: threads, barriers, shuffles, asynchronous copies and tensor-core products.
// nvcc gets instructions; the tests' emulator (tests/cuda_emulator) defines the same words for an ordinary
// processor, so that the very kernels that run on a GPU are checked without one.
#pragma once

#include <cstdint>

#include "core/cuda/numbers.h"

#ifdef PYENGINE_EMULATE_CUDA
#include "emulator.h"
#define PYENGINE_KERNEL(threads, blocks) void
#else
#define PYENGINE_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)

namespace pyengine::cuda {

PYENGINE_DEVICE int thread_index() { return threadIdx.x; }
PYENGINE_DEVICE int block_x() { return blockIdx.x; }
PYENGINE_DEVICE int block_y() { return blockIdx.y; }
PYENGINE_DEVICE int block_z() { return blockIdx.z; }
PYENGINE_DEVICE int grid_x() { return gridDim.x; }

PYENGINE_DEVICE char* shared_memory() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}

PYENGINE_DEVICE void sync_block() { __syncthreads(); }
PYENGINE_DEVICE void sync_warp() { __syncwarp(); }
PYENGINE_DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }

PYENGINE_DEVICE uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// 16 bytes from global to shared memory in the background; zeros instead of reading unless `valid`.
PYENGINE_DEVICE void copy_async(void* to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(to)), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
}
PYENGINE_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
// Waits until at most `pending` of this thread's latest groups are still under way.
template <int pending>
PYENGINE_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(pending) : "memory");
}

// 8x8 matrices of 16-bit values from shared memory: lane i names row i % 8 of matrix i / 8, 16-byte aligned; lane
// (g, t) = (lane / 4, lane % 4) gets columns 2t, 2t + 1 of row g of each. Transposed: rows 2t, 2t + 1 of column g.
PYENGINE_DEVICE void load_matrices4(uint32_t* r, const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
PYENGINE_DEVICE void load_matrices2(uint32_t* r, const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];\n"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}
PYENGINE_DEVICE void load_matrices4_transposed(uint32_t* r, const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
PYENGINE_DEVICE void load_matrices2_transposed(uint32_t* r, const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];\n"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}

// c [16,8] += a [16,16] b [16,8], fp32 sums. Lane (g, t) holds c rows g, g + 8 columns 2t, 2t + 1; a rows g, g + 8
// of columns 2t, 2t + 1, then of columns 2t + 8, 2t + 9; b rows 2t, 2t + 1, then 2t + 8, 2t + 9 of column g.
template <class T>
PYENGINE_DEVICE void multiply16(float* c, const uint32_t* a, const uint32_t* b) {
  if constexpr (sizeof(T) == 2 && kIsBfloat16<T>)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// The same with 8 products: a of columns 2t, 2t + 1 only, b of rows 2t, 2t + 1.
template <class T>
PYENGINE_DEVICE void multiply8(float* c, const uint32_t* a, const uint32_t* b) {
  if constexpr (sizeof(T) == 2 && kIsBfloat16<T>)
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(b[0]));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(b[0]));
}

PYENGINE_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
PYENGINE_DEVICE float inverse_root(float x) { return rsqrtf(x); }
PYENGINE_DEVICE void sine_cosine_pi(float x, float* sine, float* cosine) { sincospif(x, sine, cosine); }

}  // namespace pyengine::cuda
#endif

namespace pyengine::cuda {

constexpr int kWarp = 32;

PYENGINE_DEVICE int lane_index() { return thread_index() % kWarp; }
PYENGINE_DEVICE int warp_index() { return thread_index() / kWarp; }

// Over the lanes that differ in the bits below `width`.
template <int width>
PYENGINE_DEVICE float sum_over(float x) {
  for (int mask = width / 2; mask; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}
template <int width>
PYENGINE_DEVICE float max_over(float x) {
  for (int mask = width / 2; mask; mask /= 2) {
    const float y = shuffle_xor(x, mask);
    x = y > x ? y : x;
  }
  return x;
}

}  // namespace pyengine::cuda
