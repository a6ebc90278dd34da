// The words of core/cuda/warpgroup.h.
#include <algorithm>
#include <cstring>
#include <utility>

#include "machine.h"

namespace pyengine::cuda {

namespace emulator {

namespace {

// One value of a panel. The manual's canonical layouts with 128-byte swizzling: rows of 128 bytes, eight rows
// to the stride offset, and bits 4 to 6 of the address xored with bits 7 to 9.
float panel_value(const Product& product, uint64_t descriptor, int row, int column) {
  const uint64_t start = (descriptor & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4;
  if (descriptor >> 62 != 1 || (descriptor >> 49 & 7)) fail("a descriptor that is not of 128-byte swizzling");
  uint64_t address = start + row / 8 * stride + row % 8 * 128 + 2 * column;
  address ^= (address >> 7 & 7) << 4;
  const char* at = machine.shared_start + address;
  if (at < machine.shared || at + 2 > machine.shared + machine.shared_bytes)
    fail("a product reads outside shared memory");
  if (machine.unpublished[(at - machine.shared) / 16]) fail("a product reads what was not published");
  uint16_t bits;
  std::memcpy(&bits, at, 2);
  return product.value(bits);
}

void run_product(const Product& product) {
  const int lane = machine.current % kLanes, warp = machine.current / kLanes % 4;
  float a[2][16];
  for (int r = 0; r < 2; ++r)
    for (int k = 0; k < 16; ++k)
      a[r][k] = product.in_registers ? product.a[r][k]
                                     : panel_value(product, product.a_panel, 16 * warp + lane / 4 + 8 * r, k);
  for (int j = 0; j < product.columns / 8; ++j)
    for (int i = 0; i < 4; ++i) {
      const int column = 8 * j + 2 * (lane % 4) + i % 2;
      double sum = product.add ? product.c[j][i] : 0;
      for (int k = 0; k < 16; ++k)
        sum += static_cast<double>(a[i / 2][k]) * (product.in_registers
                                                       ? panel_value(product, product.b_panel, k, column)
                                                       : panel_value(product, product.b_panel, column, k));
      product.c[j][i] = static_cast<float>(sum);
    }
}

}  // namespace

void multiply_group(float (*c)[4], int columns, const uint32_t* a, uint64_t a_panel, uint64_t b_panel,
                    bool add, float (*value)(uint16_t)) {
  Product product{c, columns, a != nullptr, add, {}, a_panel, b_panel, value};
  const Lanes all = meet(Instruction::multiply_group, columns / 64, a, a ? 4 : 0);
  const int lane = machine.current % kLanes;
  for (int r = 0; a && r < 2; ++r)
    for (int k = 0; k < 16; ++k) {  // lane t of the quad has columns 2t, 2t + 1, then 2t + 8, 2t + 9
      const uint32_t word = all[lane / 4 * 4 + k % 8 / 2][k / 8 * 2 + r];
      product.a[r][k] = value(static_cast<uint16_t>(k % 2 ? word >> 16 : word));
    }
  if (machine.early) return run_product(product);
  machine.fibers[machine.current].open_products.push_back(product);
}

}  // namespace emulator

using emulator::machine;

void sync_group() {
  auto& fiber = machine.fibers[machine.current];
  const int reached = ++fiber.group_barriers, first = machine.current / 128 * 128;
  for (;;) {
    bool all = true;
    for (int i = first; i < first + 128; ++i) all = all && machine.fibers[i].group_barriers >= reached;
    if (all) return;
    emulator::leave();
  }
}
void publish_shared() {
  auto& written = machine.fibers[machine.current].written;
  for (int64_t unit : written) machine.unpublished[unit] = 0;
  written.clear();
}
void store_unit(void* to, const Words4& unit) {
  std::memcpy(to, &unit, sizeof unit);
  emulator::mark(to);
}
void begin_products() {
  emulator::meet(emulator::Instruction::products, 0, nullptr, 0);
}
void commit_products() {
  emulator::meet(emulator::Instruction::products, 1, nullptr, 0);
  auto& fiber = machine.fibers[machine.current];
  fiber.product_groups.push_back(std::move(fiber.open_products));
  fiber.open_products.clear();
}
void wait_products(int pending) {
  emulator::meet(emulator::Instruction::products, 2 + pending, nullptr, 0);
  auto& groups = machine.fibers[machine.current].product_groups;
  const int done = std::max(0, static_cast<int>(groups.size()) - pending);
  for (int i = 0; i < done; ++i)
    for (const auto& product : groups[i]) emulator::run_product(product);
  groups.erase(groups.begin(), groups.begin() + done);
}
uint32_t panel_address(const void* p) {
  return static_cast<uint32_t>(static_cast<const char*>(p) - machine.shared_start);
}

}  // namespace pyengine::cuda
