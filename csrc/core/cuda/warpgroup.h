// The words of Hopper's warpgroups (sm_90a): four warps that multiply 64 rows at a time, asynchronously, from
// swizzled shared memory. Like warp.h they mean the same to nvcc and to the tests' emulator.
//
// A panel is a matrix of 16-bit values in shared memory, 64 values (128 bytes) to a row, at a multiple of
// 1024 bytes. Unit u (16 bytes) of row r lies at unit u ^ r % 8 of its row: `unit_of`. A wider matrix is
// several panels.
#pragma once

#include "core/cuda/warp.h"

namespace pyengine::cuda {

constexpr int kGroup = 128;        // threads of a warpgroup
constexpr int kGroupRows = 64;     // rows of a product
constexpr int kPanelRow = 64;      // values
constexpr int kPanelAlign = 1024;  // bytes

PYENGINE_DEVICE int group_index() {
  return thread_index() / kGroup;
}

// Where unit `u` of row `row` is in a matrix of panels of `rows` rows.
template <class T>
PYENGINE_DEVICE T* unit_of(T* matrix, int rows, int row, int u) {
  return matrix + (static_cast<int64_t>(u / 8) * rows + row) * kPanelRow + ((u ^ row) & 7) * 8;
}

#ifndef PYENGINE_EMULATE_CUDA

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define PYENGINE_WARPGROUP_ASM(...) asm volatile(__VA_ARGS__)
#else
#define PYENGINE_WARPGROUP_ASM(...) asm volatile("trap;")  // other architectures never launch such a kernel
#endif

// Waits for the other threads of this warpgroup.
PYENGINE_DEVICE void sync_group() {
  asm volatile("bar.sync %0, 128;\n" ::"r"(group_index() + 1) : "memory");
}
// What this thread, and its copies that it has waited for, wrote to shared memory is there for products that
// start after the next barrier.
PYENGINE_DEVICE void publish_shared() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
#endif
}
// Before the first product after registers of sums or weights were touched.
PYENGINE_DEVICE void begin_products() {
  PYENGINE_WARPGROUP_ASM("wgmma.fence.sync.aligned;\n" :: : "memory");
}
PYENGINE_DEVICE void commit_products() {
  PYENGINE_WARPGROUP_ASM("wgmma.commit_group.sync.aligned;\n" :: : "memory");
}
// Waits until at most `pending` of this warpgroup's latest groups of products are still under way.
template <int pending>
PYENGINE_DEVICE void wait_products() {
  PYENGINE_WARPGROUP_ASM("wgmma.wait_group.sync.aligned %0;\n" ::"n"(pending) : "memory");
}

PYENGINE_DEVICE uint32_t panel_address(const void* p) {
  return shared_address(p);
}

// A unit of a panel that this thread writes itself: not seen by products before it is published.
PYENGINE_DEVICE void store_unit(void* to, const Words4& unit) {
  *static_cast<Words4*>(to) = unit;
}

#define PYENGINE_TILE(i) "+f"(c[i][0]), "+f"(c[i][1]), "+f"(c[i][2]), "+f"(c[i][3])
#define PYENGINE_8_TILES(i)                                                                                 \
  PYENGINE_TILE(i), PYENGINE_TILE(i + 1), PYENGINE_TILE(i + 2), PYENGINE_TILE(i + 3), PYENGINE_TILE(i + 4), \
      PYENGINE_TILE(i + 5), PYENGINE_TILE(i + 6), PYENGINE_TILE(i + 7)
#define PYENGINE_32_REGISTERS                                                                       \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25," \
  "%26,%27,%28,%29,%30,%31"
#define PYENGINE_64_REGISTERS                                                                         \
  PYENGINE_32_REGISTERS                                                                               \
  ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55," \
  "%56,%57,%58,%59,%60,%61,%62,%63"

// c [64, 128] = (add ? c : 0) + a [64, 16] b^T, b [128, 16], both in panels. Warp w of the group has rows 16
// w and on; of those a lane holds what it holds of `multiply16`, c[j] being columns 8 j to 8 j + 7.
template <class T>
PYENGINE_DEVICE void multiply_panels(float (*c)[4], uint64_t a, uint64_t b, bool add) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  if constexpr (kIsBfloat16<T>)
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " PYENGINE_64_REGISTERS
        "}, %64, %65, p, 1, 1, 0, 0;\n}\n"
        : PYENGINE_8_TILES(0), PYENGINE_8_TILES(8)
        : "l"(a), "l"(b), "r"(static_cast<int>(add)));
  else
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 " PYENGINE_64_REGISTERS
        "}, %64, %65, p, 1, 1, 0, 0;\n}\n"
        : PYENGINE_8_TILES(0), PYENGINE_8_TILES(8)
        : "l"(a), "l"(b), "r"(static_cast<int>(add)));
#endif
}

// c [64, 64] += a [64, 16] b, b [16, 64] one panel; a in registers as for `multiply16`.
template <class T>
PYENGINE_DEVICE void multiply_weights(float (*c)[4], const uint32_t* a, uint64_t b) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  if constexpr (kIsBfloat16<T>)
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " PYENGINE_32_REGISTERS
        "}, {%32,%33,%34,%35}, %36, p, 1, 1, 1;\n}\n"
        : PYENGINE_8_TILES(0)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(1));
  else
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 " PYENGINE_32_REGISTERS
        "}, {%32,%33,%34,%35}, %36, p, 1, 1, 1;\n}\n"
        : PYENGINE_8_TILES(0)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(1));
#endif
}

#undef PYENGINE_TILE
#undef PYENGINE_8_TILES
#undef PYENGINE_32_REGISTERS
#undef PYENGINE_64_REGISTERS
#undef PYENGINE_WARPGROUP_ASM

#endif

// The descriptor of a panel from a row on, a multiple of 8, and from column `k` on, a multiple of 16:
// address, leading and stride offset (1024 bytes: eight rows) in units of 16 bytes, and 128-byte swizzling.
PYENGINE_DEVICE uint64_t panel_descriptor(const void* row, int k) {
  const uint64_t address = panel_address(row) + 2 * k;
  return (address & 0x3ffff) >> 4 | uint64_t{1} << 16 | uint64_t{64} << 32 | uint64_t{1} << 62;
}

}  // namespace pyengine::cuda
